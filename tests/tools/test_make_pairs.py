"""Spoiled images and joined answers: by id, the same every time, and nothing left out silently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sicog_mcore.data.corrupt import corrupt
from sicog_mcore.data.pairs import build_pair
from sicog_mcore.data.sources import open_sources
from tests.builders import write_dataset
from tests.pairs import pair_experiment
from tools.make_pairs import main

NUM_ROWS = 5  # the third has no image


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    write_dataset(tmp_path, NUM_ROWS)
    return ["--rows", str(tmp_path / "data.jsonl"), "--images", str(tmp_path / "images")]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers(path: Path, **by_id: str) -> str:
    path.write_text("".join(json.dumps({"id": name, "answer": text}) + "\n" for name, text in by_id.items()))
    return str(path)


def test_spoiled_images_are_those_of_the_ids(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "spoiled"
    assert main(["corrupt", *data, "--out", str(out), "--seed", "3", "--kinds", "mask", "mirror_rotation"]) == 0
    assert capsys.readouterr().out == f"{out}: 4 rows; left out: 1 x no_image\n"
    rows = lines(out / "rows.jsonl")
    assert [row["id"] for row in rows] == ["s0", "s1", "s3", "s4"]
    assert all(row["conversations"][-1]["from"] == "human" for row in rows)
    clean = np.asarray(Image.open(tmp_path / "images" / "s1.png").convert("RGB"))
    expected, kind = corrupt(clean, "s1#0", 3, ["mask", "mirror_rotation"])
    assert rows[1]["corruption"] == [kind]
    assert (np.asarray(Image.open(out / "images" / rows[1]["image"][0])) == expected).all()


def test_joined_rows_are_pairs_on_the_clean_image(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rejected = answers(tmp_path / "rejected.jsonl", s0="Wrong.", s1="Wrong too.", s2=" ", s4="It is a dog.")
    out = tmp_path / "pairs.jsonl"
    assert main(["join", *data, "--rejected", rejected, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 3 rows; left out: 1 x answer_empty, 1 x no_answer\n"
    assert [row["id"] for row in lines(out)] == ["s0", "s1", "s4"]
    out.rename(tmp_path / "data.jsonl")
    experiment = pair_experiment(tmp_path)
    pairs = open_sources(experiment.data.sources, experiment.data, build_pair)
    assert (pairs.read(0).turns[-1].text, pairs.read(0).answers) == ("It is 0.", ("Wrong.",))
    assert pairs.read(1).images[0].path == str((tmp_path / "images" / "s1.png").resolve())


def test_chosen_answers_may_come_from_a_file(data: list[str], tmp_path: Path) -> None:
    chosen, rejected = answers(tmp_path / "c.jsonl", s1="Good."), answers(tmp_path / "r.jsonl", s1="Bad.", s0="Bad.")
    out = tmp_path / "pairs.jsonl"
    assert main(["join", *data, "--chosen", chosen, "--rejected", rejected, "--out", str(out)]) == 0
    assert [(row["id"], row["chosen"], row["rejected"]) for row in lines(out)] == [("s1", "Good.", "Bad.")]


@pytest.mark.parametrize("broken", ['{"id": "s1"}', "{", '{"id": "s1", "answer": "a"}\n{"id": "s1", "answer": "b"}'])
def test_broken_answers_stop_everything_and_write_nothing(data: list[str], tmp_path: Path, broken: str) -> None:
    (tmp_path / "r.jsonl").write_text(broken + "\n")
    out = tmp_path / "pairs.jsonl"
    assert main(["join", *data, "--rejected", str(tmp_path / "r.jsonl"), "--out", str(out)]) == 2
    assert not out.exists()
