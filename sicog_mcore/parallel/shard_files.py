"""Opens torch's distributed checkpoints without running any code in them: the one place that opens pickles.

In: the files of a checkpoint folder   Out: torch's Metadata, or CheckpointError   Used by: checkpoint/trusted_files.py
A pickle may name any function and have it called. Here only names on two short lists are looked up, those that real saves
contain (megatron-core 0.16.1 and 0.19.2); every other name ends the reading before anything is called.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import FileSystemReader, Metadata, filesystem, metadata, planner

from sicog_mcore.errors import CheckpointError

METADATA = ".metadata"
# Classes of plain data, and no function: calling one only makes an object of it.
CLASSES: tuple[type, ...] = (
    metadata.Metadata,
    metadata.TensorStorageMetadata,
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.TensorProperties,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
    planner.SavePlan,
    planner.WriteItem,
    planner.WriteItemType,
    planner.TensorWriteData,
    torch.Size,
)
DTYPES: tuple[str, ...] = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
)
# Names that torch.save writes for tensors and plain containers; nothing is built from them.
TENSOR_NAMES: tuple[tuple[str, str], ...] = (
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch.storage", "UntypedStorage"),
    *(("torch", f"{kind}Storage") for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char")),
    ("torch", "ByteStorage"),
    ("torch", "BoolStorage"),
    *(("torch", name) for name in DTYPES),
    ("collections", "OrderedDict"),
)
# Errors that a damaged or hostile pickle makes the machinery of pickles raise.
UNREADABLE = (
    *(pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError),
    *(ImportError, OverflowError, MemoryError, RecursionError, OSError, NotImplementedError, zipfile.BadZipFile),
)


def _layout(name: str) -> torch.layout:
    """Stands for the function that a pickled layout names."""
    if name != "torch.strided":
        raise pickle.UnpicklingError(f"layout {str(name)[:40]!r}")
    return torch.strided


def _known_names() -> Mapping[tuple[str, str], Any]:
    known: dict[tuple[str, str], Any] = {(kind.__module__, kind.__qualname__): kind for kind in CLASSES}
    known |= {("torch", name): vars(torch)[name] for name in DTYPES}
    return known | {("torch.serialization", "_get_layout"): _layout}


class _ListedUnpickler(pickle._Unpickler):  # the one in Python, where an opcode can be looked at
    """Opens a pickle that names nothing but what is listed.

    Args:
        known: what each module and name stands for.
    """

    def __init__(self, content: bytes, known: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(io.BytesIO(content))
        self._known = known

    def find_class(self, module: str, name: str) -> Any:
        # Every opcode that names something comes through here, and a pickle can call only what it has named.
        if (module, name) not in self._known:
            raise pickle.UnpicklingError(f"it names {f'{module}.{name}'[:100]!r}")
        return self._known[module, name]

    def load_build(self) -> None:
        # The stack ends with the object and its state. On a class, BUILD would write into the class itself, for every
        # later user.
        if isinstance(self.stack[-2], type):  # type: ignore[attr-defined]
            raise pickle.UnpicklingError("it changes a class")
        super().load_build()  # type: ignore[misc]

    # The unpickler looks opcodes up in this table and not among its methods.
    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}  # type: ignore[dict-item]


class _NamesOnly(_ListedUnpickler):
    """Reads the names in a pickle of torch.save; nothing is built, every name stands for nothing."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content, dict.fromkeys(TENSOR_NAMES, _nothing))

    def persistent_load(self, pid: Any) -> None:
        return None  # a tensor's bytes


def _nothing(*values: Any) -> dict[Any, Any]:
    return {}


def read_metadata(path: Path) -> Metadata:
    """Reads ``.metadata``: names, shapes, and the file of each piece. Nothing else of it is kept.

    Raises:
        CheckpointError: it is damaged, or names a class or a function that has no place in it.
    """
    try:
        found = _ListedUnpickler(path.read_bytes(), _known_names()).load()
        # Exact types here and below, not isinstance; state that BUILD has written into an object may be of any kind.
        _require(type(found) is Metadata, "it is no description of a checkpoint")
        entries, places = dict(found.state_dict_metadata), dict(found.storage_data)
        for name, entry in entries.items():
            _require(type(name) is str and _is_described(entry), f"its entry {str(name)[:80]!r} is odd")
        for index, place in places.items():
            is_known = type(index) is metadata.MetadataIndex and index.fqn in entries
            _require(is_known and _is_placed(place), f"the place of {str(index)[:80]!r} is odd")
    except UNREADABLE as error:
        raise refused(path, error) from error
    # A new object of checked parts: the saved plan and whatever else the file holds stays behind.
    return Metadata(entries, storage_data=places, storage_meta=metadata.StorageMeta())


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)


def _is_described(entry: Any) -> bool:
    if type(entry) is metadata.BytesStorageMetadata:
        return True
    is_tensor = type(entry) is metadata.TensorStorageMetadata and type(entry.properties) is metadata.TensorProperties
    return (
        is_tensor
        and type(entry.properties.dtype) is torch.dtype
        and _is_shape(entry.size)
        and all(_is_shape(chunk.offsets) and _is_shape(chunk.sizes) for chunk in entry.chunks)
    )


def _is_shape(value: Any) -> bool:
    return type(value) is torch.Size and all(length >= 0 for length in value)


def _is_placed(place: Any) -> bool:
    # A place outside the file shows when its bytes are read. A transform would be run over the bytes, and no save of
    # ours has one.
    is_place = type(place) is filesystem._StorageInfo and type(place.relative_path) is str
    is_span = is_place and all(type(value) is int and value >= 0 for value in (place.offset, place.length))
    return is_span and not place.transform_descriptors


def require_tensors_only(path: Path, offset: int = 0, length: int | None = None) -> None:
    """Looks at the names in what torch.save wrote into a file, or into a part of one; builds nothing.

    Raises:
        CheckpointError: it is damaged, or holds more than tensors and plain containers.
    """
    try:
        with path.open("rb") as file:
            whole = file.seek(0, io.SEEK_END)
            # A shard file is several torch.save archives in a row, each a zip file whose directory is at its own end.
            with zipfile.ZipFile(
                io.BufferedReader(_Part(file, offset, whole if length is None else length))
            ) as archive:
                pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
                _require(len(pickles) == 1, f"it holds {len(pickles)} descriptions of data, expected one")
                _NamesOnly(archive.read(pickles[0])).load()
    except UNREADABLE as error:
        raise refused(path, error) from error


class _Part(io.RawIOBase):
    """A part of an open file as a file of its own."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = start + offset
        _require(0 <= self._at, "a place before its beginning")
        return self._at

    def readinto(self, buffer: Any) -> int:
        # Each read states its place: archives of one open file share its position.
        self._file.seek(self._offset + self._at)
        found = self._file.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


def refused(path: Path, error: BaseException) -> CheckpointError:
    """Makes the error for a file that holds something it must not."""
    return CheckpointError(
        f"{path} holds something else than a checkpoint's data ({error}), and is not opened: it may be damaged or run a "
        "program; use a checkpoint from a source you trust"
    )


@contextmanager
def guarded(described: Metadata) -> Iterator[None]:
    """Guards the readers inside: ``.metadata`` is the one read before, and torch.load gives tensors, whatever is asked.

    Megatron and torch read both in several places, some of them with full pickles; the guard covers all of them.
    """
    load, read = torch.load, FileSystemReader.read_metadata

    def load_tensors(*arguments: Any, **options: Any) -> Any:
        # Last, so that it wins: Megatron asks for full pickles in places.
        return load(*arguments, **{**options, "weights_only": True})

    def give(reader: FileSystemReader, *arguments: Any, **options: Any) -> Metadata:
        return described

    _replace(load_tensors, give)
    try:
        yield
    finally:
        _replace(load, read)


def _replace(load: Callable[..., Any], read: Callable[..., Any]) -> None:
    torch.load = load
    FileSystemReader.read_metadata = read  # type: ignore[method-assign]
