"""Finds the checkpoint that a path stands for: itself, or the newest committed one of a run.

In: a folder ``step_N``, or the output folder of a run   Out: a committed folder, not yet verified   Next: commit.py
Reads names only. Imports no torch: the loop asks before anything heavy is loaded.
"""

from __future__ import annotations

from pathlib import Path

from sicog_mcore.checkpoint.commit import MANIFEST, committed_steps, step_folder
from sicog_mcore.errors import CheckpointError

CHECKPOINTS = "checkpoints"  # in the output folder of a run


def newest_step(root: Path) -> int | None:
    """The largest step that is committed below a folder of checkpoints."""
    steps = committed_steps(root)
    return steps[-1] if steps else None


def newest_folder(root: Path) -> Path | None:
    """The folder of ``newest_step``."""
    step = newest_step(root)
    return None if step is None else step_folder(root, step)


def find_folder(path: Path) -> Path | None:
    """The committed checkpoint folder that ``path`` stands for; None where it is neither a checkpoint nor a run.

    Raises:
        CheckpointError: it is a run without a committed checkpoint.
    """
    if (path / MANIFEST).is_file():
        return path
    root = path / CHECKPOINTS
    if not root.is_dir():
        return None
    found = newest_folder(root)
    if found is None:
        raise CheckpointError(f"{root} has no committed checkpoint; name another run")
    return found
