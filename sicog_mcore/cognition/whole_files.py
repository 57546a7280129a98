"""Files that appear whole or not at all, and disks that fill up while they are written.

In: what a step writes   Out: the file, or MachineError and nothing left behind   Used by: every step of the loop, tools
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sicog_mcore.errors import MachineError, is_machine_fault


@contextmanager
def disk_faults(path: Path) -> Iterator[None]:
    """Turns what a full or broken disk raises in the block into one message about ``path``; other errors pass.

    Raises:
        MachineError: the disk is full or broken; the same command may work later.
    """
    try:
        yield
    except OSError as error:
        if not is_machine_fault(error):
            raise
        found = error.strerror or str(error)
        raise MachineError(f"{path} cannot be written: {found}; make room, then give the same command again") from error


@contextmanager
def whole_file(path: Path, shared: bool = False) -> Iterator[Path]:
    """A path beside ``path`` to write to. It takes its place when the block ends, and is removed if the block fails.

    Args:
        shared: several processes may write this file at the same time.

    Raises:
        MachineError: as ``disk_faults``.
    """
    with disk_faults(path), made_folder(path.parent):
        aside = path.with_name(f"{path.name}.{os.getpid()}.partial" if shared else f"{path.name}.partial")
        try:
            yield aside
            _sync(aside)
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


@contextmanager
def whole_folder(aside: Path) -> Iterator[None]:
    """Makes a folder, empty, and removes it with all it holds if the block fails.

    Raises:
        MachineError: as ``disk_faults``.
    """
    with disk_faults(aside), made_folder(aside.parent):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            yield
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Makes a folder where there is none, and takes it away again if the block fails and has left nothing in it."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with suppress(OSError):  # it holds something
            while folder != existing:
                folder.rmdir()
                folder = folder.parent
        raise


def _sync(path: Path) -> None:
    """Until this returns, a loss of power may undo what was written; some disks tell only now that they are full."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
