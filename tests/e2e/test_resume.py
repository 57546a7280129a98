"""A run that was stopped goes on as if it had not been: the same weights, the same samples, under any layout."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from sicog_mcore.config import Experiment
from tests.builders import tiny_experiment, write_dataset
from tests.e2e.runs import PATIENCE_S, consumed_ids, kill_after, read_metrics, start_launcher, train_ranks
from tests.tolerances import RESHARDED_RESUME

pytestmark = [pytest.mark.slow, pytest.mark.fault]
STEPS, SAVED = 10, 5


def _experiment(data: Path, output: Path, **parallel: Any) -> Experiment:
    return tiny_experiment(
        data,
        output=str(output),
        train={"steps": STEPS, "packs_per_step": 4, "tensorboard": False},
        data={"token_budget": 256, "window_samples": 16},
        checkpoint={"every_steps": SAVED},
        parallel=parallel,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, 40)
    return folder


def _losses(output: Path) -> list[str]:
    """Bit for bit: as hexadecimal floats."""
    return [float(line["loss"]).hex() for line in read_metrics(output)]


def _start(experiment: Experiment, ranks: int) -> subprocess.Popen[str]:
    config = Path(experiment.output).with_suffix(".yaml")
    config.write_text(yaml.safe_dump(experiment.to_dict()))
    return start_launcher(["--config", str(config)], ranks)


def _finish(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, text
    return text


def test_a_killed_run_resumes_bit_for_bit(data: Path, tmp_path: Path) -> None:
    straight, killed = (
        _experiment(data, tmp_path / "straight", tensor=2),
        _experiment(data, tmp_path / "killed", tensor=2),
    )
    _finish(_start(straight, 2))
    kill_after(_start(killed, 2), tmp_path / "killed" / "metrics.jsonl", SAVED + 2)
    assert not (tmp_path / "killed" / "checkpoints" / f"step_{STEPS:08d}").exists()
    printed = _finish(_start(killed, 2))
    assert f"resuming from {killed.output}/checkpoints/step_{SAVED:08d}: {SAVED} of {STEPS} steps are done" in printed
    assert _losses(tmp_path / "killed") == _losses(tmp_path / "straight")
    assert consumed_ids(tmp_path / "killed") == consumed_ids(tmp_path / "straight")
    assert "this run is complete" in _finish(_start(killed, 2))


@pytest.mark.parametrize(
    "before, after",
    [((2, {"tensor": 2}), (2, {"pipeline": 2})), ((1, {}), (2, {})), ((2, {}), (1, {}))],
    ids=["TP2 to PP2", "DP1 to DP2", "DP2 to DP1"],
)
def test_a_run_resumes_under_another_layout(before: Any, after: Any, data: Path, tmp_path: Path) -> None:
    output, moved = tmp_path / "straight", tmp_path / "moved"
    train_ranks(_experiment(data, output, **before[1]), before[0])
    shutil.copytree(output, moved)
    shutil.rmtree(moved / "checkpoints" / f"step_{STEPS:08d}")
    metrics = train_ranks(_experiment(data, moved, **after[1]), after[0])
    expected = read_metrics(output)
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in metrics] == pytest.approx(
        [line["loss"] for line in expected], rel=RESHARDED_RESUME
    )
    assert consumed_ids(moved) == consumed_ids(output)
