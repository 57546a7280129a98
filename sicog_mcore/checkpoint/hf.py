"""Reads and writes safetensors: names and shapes by headers, rows of one tensor at a time, shards of bounded size.

In: a file, or a folder with or without an index   Out: rows of tensors; a folder that appears whole or not at all
Pickle files are never opened here.   Used by: weights.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sicog_mcore.checkpoint.commit import write_tensors
from sicog_mcore.checkpoint.hf_beside import read_json
from sicog_mcore.checkpoint.mapping import Shape
from sicog_mcore.errors import CheckpointError
from sicog_mcore.files import commit_folder, move

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
SHARD_BYTES = 4 << 30
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Entry:
    """The header entry of one tensor in a file."""

    file: Path
    shape: Shape
    dtype: str  # as safetensors spells it: "F32", "BF16"


class WeightFiles:
    """The tensors of a safetensors file or of a folder. It is a context manager; files stay mapped until it ends.

    Raises:
        CheckpointError: a file is missing, damaged, a pickle, or at odds with the index.
    """

    def __init__(self, path: Path):
        self.path = path
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}
        self.entries: dict[str, Entry] = {}
        try:
            for file, expected in _files(path).items():
                self._add(file, expected)
        except CheckpointError:
            self._stack.close()
            raise

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _add(self, file: Path, expected: Collection[str] | None) -> None:
        try:
            handle = self._stack.enter_context(safe_open(file, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} cannot be read ({error}): truncated or no safetensors file; copy it again"
            ) from error
        self._open[file] = handle
        names = set(handle.keys())
        # Names stand in messages; one with control characters could write to the user's terminal.
        if odd := [name for name in sorted(names) if not name.isprintable()]:
            raise CheckpointError(f"{file} holds a tensor named {odd[0]!r}; expected a name that can be printed")
        if expected is not None and names != set(expected):
            problems = [f"{INDEX} names {name}, which is not there" for name in sorted(set(expected) - names)]
            problems += [f"it holds {name}, which {INDEX} places elsewhere" for name in sorted(names - set(expected))]
            raise CheckpointError(f"{file}: {shortened(problems)}; copy the files of one checkpoint into one folder")
        for name in sorted(names):
            header = handle.get_slice(name)
            self.entries[name] = Entry(file, tuple(header.get_shape()), header.get_dtype())

    def read(self, name: str, axis: int, start: int, length: int) -> Tensor:
        """Reads rows of one tensor along an axis, and nothing else of it.

        Raises:
            CheckpointError: the file cannot be read; the message names tensor and file.
        """
        entry = self.entries[name]
        try:
            rows = self._open[entry.file].get_slice(name)
            return rows[:, start : start + length] if axis else rows[start : start + length]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{name} in {entry.file} cannot be read ({error}); copy the file again") from error

    def whole(self, name: str) -> Tensor:
        """Reads one tensor."""
        return self._open[self.entries[name].file].get_tensor(name)


def _files(path: Path) -> Mapping[Path, Collection[str] | None]:
    """Lists the files to read, each with the names that the index promises for it, if there is an index."""
    if path.is_file():
        if path.name == INDEX:
            return _indexed(path)
        if path.suffix in PICKLES:
            raise _pickle([path])
        return {path: None}
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; give a folder or a .safetensors file")
    if (path / INDEX).is_file():
        return _indexed(path / INDEX)
    found = sorted(path.glob("*.safetensors"))
    if (path / SINGLE) in found or len(found) == 1:
        return {path / SINGLE if (path / SINGLE) in found else found[0]: None}
    if found:
        raise CheckpointError(f"{path} has {len(found)} .safetensors files but no {INDEX}; copy the index as well")
    if pickles := sorted(file for file in path.iterdir() if file.suffix in PICKLES):
        raise _pickle(pickles)
    raise CheckpointError(f"{path} holds no weights; expected {SINGLE} or {INDEX}")


def _indexed(index: Path) -> Mapping[Path, Collection[str]]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read ({error!r}); copy it again") from error
    files: dict[Path, list[str]] = {}
    for name, file in places:
        # An index comes from strangers: a path such as ../../x in it must not open a file elsewhere.
        if Path(file).name != file:
            raise CheckpointError(f"{index} places {name} in {file!r}; only files beside the index are read")
        files.setdefault(index.parent / file, []).append(name)
    missing = [
        f"{file.name} (with {names[0]} and {len(names) - 1} more)"
        for file, names in files.items()
        if not file.is_file()
    ]
    if missing:
        raise CheckpointError(f"{index} names files that are missing: {', '.join(missing)}; copy them as well")
    return files


def _pickle(files: list[Path]) -> CheckpointError:
    return CheckpointError(
        f"{', '.join(map(str, files))}: a pickle can run any program and is never opened; use a .safetensors release, or "
        "convert it once: sicog convert unpickle OLD --out NEW.safetensors"
    )


def read_config(path: Path) -> dict[str, Any]:
    """Reads config.json of a folder, or beside a file; empty if there is none."""
    return read_json((path if path.is_dir() else path.parent) / CONFIG)


def shortened(lines: Collection[str], most: int = 12) -> str:
    """Joins lines for a message, and cuts the list where it gets long."""
    more = len(lines) - most
    return ", ".join([*list(lines)[:most], *([f"and {more} more"] if more > 0 else [])])


class ShardWriter:
    """Writes tensors into shards in a temporary folder, in the order they come; ``finish`` gives it its name.

    It holds one shard in memory.

    Args:
        folder: the final name; nothing may be there yet but an empty folder.
        shard_bytes: largest shard; a larger tensor gets one of its own.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES):
        self.folder, self.shard_bytes = folder, shard_bytes
        self.temporary = folder.parent / f"{folder.name}.tmp"
        self._shard: dict[str, Tensor] = {}
        self._names: list[list[str]] = []
        self._held = self._bytes = 0
        require_free(folder)
        if self.temporary.exists():
            shutil.rmtree(self.temporary)
        self.temporary.mkdir(parents=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Adds one tensor; the shard so far is written first where this tensor does not fit into it."""
        assert name not in self._shard and not any(name in names for names in self._names), f"{name} is written twice"
        size = tensor.numel() * tensor.element_size()
        if self._shard and self._held + size > self.shard_bytes:
            self._flush()
        self._shard[name] = tensor
        self._held += size
        self._bytes += size

    def finish(self) -> int:
        """Completes the folder and gives it its final name. Returns the bytes of all tensors."""
        self._flush()
        count = len(self._names)
        places: dict[str, str] = {}
        for number, names in enumerate(self._names):
            file = SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            # By convention every name holds the number of shards, which is known only now.
            move(self._shard_path(number), self.temporary / file)
            places |= dict.fromkeys(names, file)
        if count > 1:
            index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(places.items()))}
            (self.temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        if self.folder.exists():
            self.folder.rmdir()  # empty, see require_free
        commit_folder(self.temporary, self.folder)
        return self._bytes

    def abandon(self) -> None:
        """Removes the temporary folder."""
        shutil.rmtree(self.temporary, ignore_errors=True)

    def _flush(self) -> None:
        if self._shard:
            write_tensors(self._shard_path(len(self._names)), self._shard)
            self._names.append(list(self._shard))
            self._shard, self._held = {}, 0

    def _shard_path(self, number: int) -> Path:
        return self.temporary / f"shard-{number:05d}"


def require_free(folder: Path) -> None:
    """Refuses a folder that holds something: an export never mixes with other files.

    Raises:
        CheckpointError: the folder holds something, or is a file.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists already; choose another folder, or remove it")
