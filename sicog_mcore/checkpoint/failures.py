"""Finds out why a checkpoint could not be written: a full disk, no right to write, another rank, a disk that fails.

In: what pathlib, torch.save, safetensors, Megatron's writers or a collective raised   Out: one error with its remedy
Each cause has its own remedy and exit code; a wrong one sends people to the wrong machine.   For: store.py, part_writer.py
"""

from __future__ import annotations

import errno
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from sicog_mcore.checkpoint.trusted_files import first_line
from sicog_mcore.errors import DENIED, CheckpointError, MachineError, SicogError, WriteError
from sicog_mcore.parallel.topology import WritersFailed

FailureKind = Literal["full", "denied", "peer", "disk", "writer"]
# As pathlib, torch.save, safetensors, Megatron's writers, their pipes, and collectives fail.
WRITE_ERRORS = (OSError, EOFError, RuntimeError, SafetensorError, WritersFailed)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PIPES = (errno.EPIPE, errno.ECONNRESET, errno.ECONNREFUSED)
# Where only a text arrives: torch's and Rust's libraries, and failures that crossed a process.
# The order counts: "os error 28" is a full disk before "os error" is any other failure of a disk.
WORDS: tuple[tuple[FailureKind, tuple[str, ...]], ...] = (
    ("full", ("No space left on device", "Disk quota exceeded", "File too large", "os error 28", "os error 122")),
    ("denied", ("Permission denied", "Read-only file system", "Operation not permitted")),
    ("peer", ("Connection closed by peer", "Timed out waiting", "NCCL", "gloo", "Socket closed", "TCPStore")),
    ("writer", ("Broken pipe", "Connection reset by peer", "Connection refused", "results_queue")),
    ("disk", ("PytorchStreamWriter", "inline_container", "Input/output error", "os error", "[Errno")),
)
REMEDIES: tuple[tuple[FailureKind, str], ...] = (
    ("full", "make room and run the command again"),
    ("denied", "choose an output folder that you may write to"),
    ("peer", "another rank, or the network to it, failed and not the disk; run the command again"),
    ("writer", "a process that writes was ended, maybe for want of memory; run the command again"),
    ("disk", "make room or check the disk, and run the command again"),
)


@dataclass(frozen=True)
class Failure:
    """The cause of a failed save, small enough to send to other ranks."""

    kind: FailureKind
    text: str


class SaveFailed(OSError):
    """A part of a save failed on one rank, and therefore on all."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text)
        self.failure = failure


def failure_of(error: BaseException) -> Failure:
    """Tells what an exception out of a save means.

    Raises:
        BaseException: the exception itself, where it has nothing to do with writing: a mistake in a program.
    """
    if isinstance(error, SaveFailed):
        return error.failure
    text = first_line(error)
    kind = _kind_of_number(error) or next((kind for kind, words in WORDS if any(word in text for word in words)), None)
    if any(parent.__name__ == "DistError" for parent in type(error).__mro__):  # torch's own, of collectives
        kind = "peer"
    # A bare RuntimeError without a known word is a fault of the program; calling it a fault of the disk would hide it.
    if kind is None and type(error) is RuntimeError:
        raise error
    if kind is None:
        kind = "writer" if isinstance(error, EOFError | WritersFailed) else "disk"
    return Failure(kind, text)


def _kind_of_number(error: BaseException) -> FailureKind | None:
    number = error.errno if isinstance(error, OSError) else None
    if number in FULL:
        return "full"
    if number in DENIED:
        return "denied"
    return "writer" if number in PIPES else None


def write_failure(folder: Path, error: BaseException, failure: Failure | None = None) -> SicogError:
    """Returns the one error that a save ends with.

    Args:
        failure: the cause that the ranks agreed on; None to read it from the exception.
    """
    failure = failure or failure_of(error)
    text = f"checkpoint {folder} cannot be written: {failure.text}{_free_text(folder)}; {dict(REMEDIES)[failure.kind]}"
    if failure.kind == "denied":
        return CheckpointError(text)
    if failure.kind == "peer":
        return MachineError(text)
    found = WriteError(text)
    found.same_on_all_ranks = isinstance(error, SaveFailed)
    return found


def free_bytes(folder: Path) -> int:
    """Returns the free bytes where a folder is, or will be.

    Raises:
        OSError: the free space cannot be known.
    """
    # The folder may not exist yet; the nearest one above it that does is asked.
    place = next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.is_dir())
    return shutil.disk_usage(place).free


def _free_text(folder: Path) -> str:
    try:
        return f" ({free_bytes(folder) / 2**30:.1f} GiB free)"
    except OSError:
        return ""
