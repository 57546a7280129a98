"""The verb builds the index that training looks for, from the words that training takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sicog_mcore.commands.front import main
from sicog_mcore.data.index.index_store import IndexStore
from sicog_mcore.data.index.indexed_files import open_index
from sicog_mcore.errors import EXIT_CONFIG, EXIT_OK
from tests.builders import tiny_experiment, write_dataset

NUM_ROWS = 12


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    write_dataset(tmp_path, NUM_ROWS)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_experiment(tmp_path).to_dict()))
    return ["index", "--config", str(tmp_path / "run.yaml")]


def test_training_finds_what_the_verb_has_built(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = ["--parallel.tensor", "2", "--parallel.pipeline", "2"]  # for four ranks; here is one process
    assert main([*words, *layout, "--processes", "1"]) == EXIT_OK
    experiment = tiny_experiment(tmp_path)
    folder = IndexStore(experiment).folder
    assert capsys.readouterr().out.startswith("indexed 12 of 12 rows (1 of 1 blocks) in ")
    assert len(open_index(experiment).files[0].sizes) == NUM_ROWS
    assert main(["index", "--config", str(folder / "experiment.yaml")]) == EXIT_OK  # as a refused start asks for
    assert capsys.readouterr().out == f"the index in {folder} has all 12 rows in 1 blocks\n"


def test_a_stage_brings_its_values(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bare.yaml").write_text(
        yaml.safe_dump(
            {"preset": "tiny", "data": tiny_experiment(tmp_path).to_dict()["data"], "output": str(tmp_path / "s")}
        )
    )
    folders = set()
    for stage in (["--stage", "align"], []):
        assert main(["index", "--config", str(tmp_path / "bare.yaml"), *stage]) == EXIT_OK
        folders.add(capsys.readouterr().out.partition("written to ")[2].partition(":")[0])
    assert len(folders) == 2  # overviews alone are other numbers of slices


def test_mistakes_are_one_message(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--data.sources", '[{"path": "nowhere.jsonl"}]', "--data.tokenbudget", "3"]) == EXIT_CONFIG
    found = capsys.readouterr().err
    assert found.startswith("index: 2 configuration problems:") and "data.tokenbudget" in found and "nowhere" in found


def test_a_negative_number_of_processes_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*words, "--processes", "-3"])
    assert caught.value.code == EXIT_CONFIG and "--processes -3: expected 0 or more" in capsys.readouterr().err
