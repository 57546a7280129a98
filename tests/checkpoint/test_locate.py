"""A path stands for a checkpoint, for the newest of a run, or for neither; one rule for all who ask."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sicog_mcore.checkpoint.commit import MANIFEST, step_folder
from sicog_mcore.checkpoint.locate import CHECKPOINTS, find_folder, newest_folder, newest_step
from sicog_mcore.errors import CheckpointError


def commit(root: Path, *steps: int) -> None:
    for step in steps:
        step_folder(root, step).mkdir(parents=True)
        (step_folder(root, step) / MANIFEST).touch()


def test_the_newest_committed_checkpoint_counts(tmp_path: Path) -> None:
    root = tmp_path / CHECKPOINTS
    assert newest_step(root) is newest_folder(root) is None
    commit(root, 2, 10, 9)
    step_folder(root, 11).mkdir()  # a save that was killed
    assert newest_step(root) == 10 and newest_folder(root) == step_folder(root, 10)
    assert find_folder(tmp_path) == step_folder(root, 10)
    assert find_folder(step_folder(root, 2)) == step_folder(root, 2)


def test_a_run_without_a_checkpoint_is_an_error_and_another_folder_is_none(tmp_path: Path) -> None:
    assert find_folder(tmp_path) is None and find_folder(tmp_path / "nowhere") is None
    step_folder(tmp_path / CHECKPOINTS, 1).mkdir(parents=True)
    assert find_folder(step_folder(tmp_path / CHECKPOINTS, 1)) is None
    with pytest.raises(CheckpointError, match="checkpoints has no committed checkpoint; name another run"):
        find_folder(tmp_path)


def test_whoever_looks_for_a_checkpoint_does_not_import_torch() -> None:
    code = (
        "import sys, sicog_mcore.checkpoint.locate, sicog_mcore.cognition.loop.steps; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
