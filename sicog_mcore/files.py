"""Durable files: every file or folder that must survive a kill, a crash or a full disk is written, renamed and hashed here.

In: what a step writes   Out: the file, whole and on disk, or one error and nothing   Next: decoding.py (reads JSON)
The one place that calls rename and fsync. A temporary file stands beside its target, ends in ``.partial``, is synced before
the rename, and is removed when the block that writes it fails: a reader sees the old content or the new one, never a part.
Imports nothing heavy: lock.py uses it before torch is there.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import xxhash

from sicog_mcore.errors import DENIED, ConfigError, ConfigProblem, MachineError, is_machine_fault

CHUNK_BYTES = 1 << 22  # of a file that is hashed, at a time
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
TAIL_BYTES = 1 << 16  # of a file whose last line end is looked for, at a time


@contextmanager
def disk_faults(path: Path) -> Iterator[None]:
    """Turns what a full or broken disk raises in the block into one message about ``path``; other errors pass.

    It is for blocks that also read: a file that is missing or forbidden there is not ``path``, and keeps its own error.

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
def writing(path: object) -> Iterator[None]:
    """Turns every error of the operating system in a block that only writes ``path`` into one message about it.

    Raises:
        MachineError: the disk is full or fails.
        ConfigError: the place may not be written to.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in DENIED:
            fix = "choose an output folder that you may write to"
            raise ConfigError([ConfigProblem("output", str(path), f"cannot be written ({reason})", fix)]) from error
        raise MachineError(
            f"{path} cannot be written: {reason}; make room or check the disk, and run the same command again"
        ) from error


@contextmanager
def whole_file(path: Path, shared: bool = False) -> Iterator[Path]:
    """Yields a temporary file beside ``path`` to write to; it is renamed to ``path`` when the block ends.

    A block that fails removes the temporary file, and leaves ``path`` as it was.

    Args:
        shared: several processes may write this file at the same time.

    Raises:
        MachineError: as ``disk_faults``.
    """
    with disk_faults(path), made_folder(path.parent):
        # Not the process id: processes of two machines, or of two containers, may have the same one.
        temporary = path.with_name(f"{path.name}.{os.urandom(8).hex()}.partial" if shared else f"{path.name}.partial")
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def whole_folder(temporary: Path) -> Iterator[None]:
    """Makes an empty temporary folder, and removes it with all that it holds if the block fails.

    Raises:
        MachineError: as ``disk_faults``.
    """
    with disk_faults(temporary), made_folder(temporary.parent):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
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


def sync(path: Path) -> None:
    """Returns when a file, or the list of names in a folder, is on disk; before that, a loss of power may undo it.

    Raises:
        OSError: some disks tell only now that they are full.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder: they bring its names to the server as they change.
        if error.errno not in NO_FOLDER_SYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Syncs every file below a folder, then every folder, itself the last: names are synced after what they name."""
    entries = sorted(folder.rglob("*"))
    for path in [entry for entry in entries if entry.is_file()]:
        sync(path)
    for path in [*(entry for entry in entries if entry.is_dir()), folder]:
        sync(path)


def move(source: Path, target: Path) -> None:
    """Renames a file or folder in one act, and returns when the new name is on disk.

    A file in the target's place is replaced; a folder there must be empty.
    """
    os.replace(source, target)
    sync(target.parent)


def commit_folder(temporary: Path, folder: Path) -> None:
    """Shows a temporary folder under its final name, once all that it holds is on disk."""
    sync_tree(temporary)
    move(temporary, folder)


def write_json(path: Path, value: Any, shared: bool = False) -> None:
    """Writes a JSON file that appears whole or not at all.

    Raises:
        MachineError: as ``disk_faults``.
    """
    with whole_file(path, shared) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


class LineFile:
    """A file that only grows, line by line, as JSONL logs and ledgers do; use it as a context.

    Args:
        path: it and its folder are made where there are none.

    Raises:
        MachineError, ConfigError: as ``writing``, from every method. A disk that is full may have taken half a line, which
            ``cut_torn_line`` removes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")

    def append(self, line: str, is_synced: bool = False) -> None:
        """Writes a line, given without its end, and hands it to the operating system: it outlives this process.

        Args:
            is_synced: return only when it is on disk, so that it outlives the machine.
        """
        with writing(self.path):
            self._file.write(line.encode() + b"\n")
            self._file.flush()
            if is_synced:
                os.fsync(self._file.fileno())

    def fileno(self) -> int:
        """The file's descriptor, e.g. for a lock on it."""
        return self._file.fileno()

    def close(self) -> None:
        """Closes the file; lines that a full disk refused are tried once more."""
        with writing(self.path):
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def append_lines(path: Path, lines: Iterable[str], is_synced: bool = False) -> None:
    """Appends lines, given without their ends, to a file that is opened for them alone.

    Args:
        is_synced: return only when they are on disk.

    Raises:
        MachineError, ConfigError: as ``writing``.
    """
    with LineFile(path) as file:
        if text := "\n".join(lines):
            file.append(text, is_synced)


def cut_torn_line(path: Path) -> None:
    """Truncates a file behind its last line end: what stands there was being written when the writer was killed."""
    with path.open("r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        # Read backwards: the file may be large, and the torn line is short.
        while end:
            start = max(0, end - TAIL_BYTES)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            file.truncate(end)
            os.fsync(file.fileno())


def read_chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, in order, without holding all of them.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def hash_chunks(chunks: Iterable[bytes]) -> str:
    """Hashes the concatenation of the chunks with xxh3-128; returns 32 hexadecimal digits."""
    state = xxhash.xxh3_128()
    for chunk in chunks:
        state.update(chunk)
    return state.hexdigest()


def hash_file(path: Path) -> str:
    """Hashes the bytes of a file, as ``hash_chunks``.

    Raises:
        OSError: it cannot be read.
    """
    return hash_chunks(read_chunks(path))


def hash_bytes(data: bytes | bytearray | memoryview) -> str:
    """Hashes bytes that are in memory, as ``hash_chunks``."""
    return xxhash.xxh3_128_hexdigest(data)


def hash_json(value: Any) -> str:
    """Hashes a JSON value, as ``hash_chunks``; the order of names in an object does not count."""
    return hash_bytes(json.dumps(value, sort_keys=True).encode())
