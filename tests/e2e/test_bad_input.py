"""The launcher as a new user meets it: mistakes, unusable data and Ctrl-C end with one message each, and no traceback."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from sicog_mcore.config import Experiment, SourceConfig
from sicog_mcore.errors import EXIT_CONFIG, EXIT_GIVE_UP, EXIT_INTERRUPTED
from sicog_mcore.launcher import start_training
from sicog_mcore.stages import PRETRAIN
from tests.builders import tiny_experiment, write_dataset
from tests.e2e.runs import LAUNCHER, PATIENCE_S, read_metrics, start_launcher

MISTAKE_LIMIT_S = 5
LAYOUT_MISTAKE = (
    "error: 1 configuration problem:\n"
    "  - parallel.tensor = 3: tensor=3 does not divide 4 attention heads, 2 key/value heads, "
    "the padded vocabulary of 1024 rows; use 1 or 2\n"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, 10)
    return folder


def _arguments(experiment: Experiment, folder: Path) -> list[str]:
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(experiment.to_dict()))
    return ["--config", str(config)]


def _experiment(data: Path, folder: Path, rows: str = "data.jsonl", steps: int = 2) -> Experiment:
    source = SourceConfig(path=str(data / rows), images=str(data / "images"))
    train = {"steps": steps, "tensorboard": False, "packs_per_step": 1}
    return tiny_experiment(data, output=str(folder / "run"), train=train, data={"sources": (source,)})


def test_a_mistake_is_reported_before_anything_starts(data: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    arguments = _arguments(_experiment(data, tmp_path), tmp_path)
    process = start_launcher([*arguments, "--parallel.tensor", "3"], ranks=0)
    printed, _ = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, printed) == (EXIT_CONFIG, LAYOUT_MISTAKE)
    assert time.monotonic() - started < MISTAKE_LIMIT_S
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_three_ranks_report_a_mistake_once_and_first(data: Path, tmp_path: Path) -> None:
    arguments = _arguments(_experiment(data, tmp_path), tmp_path)
    process = start_launcher([*arguments, "--parallel.tensor", "3"], ranks=3)
    printed, _ = process.communicate(timeout=PATIENCE_S)
    ours = printed[: printed.index("torch/distributed/elastic")]  # what follows is the report of torchrun
    assert ours.count(LAYOUT_MISTAKE) == 1 and printed.count("configuration problem") == 1
    assert "Traceback" not in ours
    assert "rank      : 0 (local_rank: 0)\n  exitcode  : 2" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_malformed_json_file_is_one_message(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "malformed.json").write_text('[{"id": 1},\n {"id": 2,}]')
    arguments = _arguments(_experiment(data, tmp_path, "malformed.json"), tmp_path)
    assert start_training([LAUNCHER, *arguments], {}, PRETRAIN) == EXIT_CONFIG
    title, problem = capsys.readouterr().err.splitlines()
    assert title == "error: 1 configuration problem:"
    assert problem.startswith(f"  - data.sources[0].path = '{data}/malformed.json': is no JSON list of rows: ")
    assert "line 2 column 11" in problem and problem.endswith("where a broken row costs only itself")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "content", "problem"),
    [
        ("blank.jsonl", b"\n\n", "holds no row"),
        ("empty.json", b"[ ]", "holds no row"),
        ("listed.jsonl", b'[{"id": 1}]', "is a JSON list, expected one row per line; rename it to .json"),
        (
            "packed.tar",
            b"\x1f\x8b\x08\0",
            "is compressed (gzip), samples are read in place from a plain tar: unpack it",
        ),
        ("cut.tar", b"a.json" + bytes(600) + b"x", "is cut off or no tar: its 607 bytes do not end with the mark"),
    ],
)
def test_a_file_without_usable_rows_is_a_mistake_before_anything_starts(
    rows: str, content: bytes, problem: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / rows).write_bytes(content)
    arguments = _arguments(_experiment(data, tmp_path, rows), tmp_path)
    assert start_training([LAUNCHER, *arguments], {}, PRETRAIN) == EXIT_CONFIG
    _, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"  - data.sources[0].path = '{data}/{rows}': {problem}")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_data_that_cannot_be_used_ends_the_run_for_good(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line for line in (data / "data.jsonl").read_text().splitlines() if '"image"' in line]
    (data / "lost.jsonl").write_text("\n".join(line.replace('"image": "', '"image": "lost_') for line in lines))
    renamed = [line.replace('"image": ', '"images": ') for line in lines]
    (data / "renamed.jsonl").write_text("\n".join(renamed))
    for rows in ("lost.jsonl", "renamed.jsonl"):
        arguments = _arguments(_experiment(data, tmp_path, rows), tmp_path)
        assert start_training([LAUNCHER, *arguments], {}, PRETRAIN) == EXIT_GIVE_UP
        printed = capsys.readouterr()
        [error] = printed.err.splitlines()
        assert error.startswith("error: no sample of a whole epoch can be used")
    note = "data: refused: the key 'images' holds pictures, expected under 'image'; rename it, and write one <image>"
    assert printed.out.count(note) == 1 and f"{len(lines)} rows, first at {data}/renamed.jsonl:1\n" in printed.out


@pytest.mark.slow
@pytest.mark.fault
def test_an_interrupted_run_says_how_to_go_on(data: Path, tmp_path: Path) -> None:
    experiment = _experiment(data, tmp_path, steps=100_000)
    process = start_launcher(_arguments(experiment, tmp_path), ranks=0)
    metrics, deadline = Path(experiment.output) / "metrics.jsonl", time.monotonic() + PATIENCE_S
    while not metrics.exists() or metrics.read_text().count("\n") < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == EXIT_INTERRUPTED and "Traceback" not in printed, printed
    *_, progress, last = printed.splitlines()
    done = len(read_metrics(Path(experiment.output)))
    assert progress.startswith("step") and "Warning" not in printed
    assert last in [
        f"interrupted after step {step}; the same command resumes from the newest checkpoint"
        for step in (done - 1, done)  # a step is reported before it is counted as done
    ]
