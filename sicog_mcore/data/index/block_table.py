"""The numbers of one block of rows as a file: Arrow IPC, uncompressed, so that it is memory-mapped and nothing is copied.

The file is an Arrow stream, behind whose end stand 16 bytes: the hash of all before them. Arrow checks no number that it
reads, so a file with one wrong bit would plan other packs, or crash.

In: columns of a block   Out: a file that appears whole or not at all; BlockTable   Next: block_rows.py, indexed_files.py
Columns, one entry per row: offset and length (bytes from the block's start; 0 in shards), line (from the block's first line,
which is 1; 0 in shards), num_tokens, num_slices, attention, truncated, reason (0: usable, or a place in the header's
``reasons``), id_hash, content_hash, detail and bad_id (of bad rows alone), image_sizes (height, width, px);
in shards also key, state and members (kind, offset, length and number of the type, see shards.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sicog_mcore.files import hash_bytes, whole_file

NUMBERS: Mapping[str, str] = {
    "offset": "int64",
    "length": "int64",
    "line": "int32",
    "num_tokens": "int32",
    "num_slices": "int32",
    "attention": "int64",
    "truncated": "uint8",
    "reason": "uint8",
    "id_hash": "uint64",
    "content_hash": "uint64",
}
TEXTS = ("detail", "bad_id")
SIZES, MEMBERS = "image_sizes", "members"
LISTS: Mapping[str, tuple[str, int]] = {
    SIZES: ("int32", 2),
    MEMBERS: ("int64", 4),
}  # type and number of an entry's fields
HEADER = b"sicog"
SEAL_BYTES = 16  # of the hash behind the stream
DAMAGE = (pa.ArrowException, OSError, ValueError, LookupError, TypeError)


class BlockUnreadable(Exception):
    """A block's file is not there, or holds other bytes than were written to it."""


@dataclass(frozen=True)
class BlockHeader:
    """The header that a block's file holds for all its rows.

    Attributes:
        rows: number of rows.
        name, first_row: what the default ids of rows without an id were made of, "<name>-<number of the row>"; nothing
            where all rows have ids.
        nameless: numbers of these rows, from the block's first one.
        reasons: reason codes of bad rows; the first, of usable ones, is empty.
        types: of a shard's members, see ShardFile.
        survey: what was counted, see RowSurvey.state.
    """

    rows: int
    name: str
    first_row: int
    nameless: Sequence[int]
    reasons: Sequence[str]
    types: Sequence[str]
    survey: Sequence[Any]


@dataclass(frozen=True)
class BlockColumns:
    """A block before it is written.

    Attributes:
        numbers: by name of NUMBERS.
        texts: by name of TEXTS; None where there is none.
        lists: by name of LISTS: for each row its entries.
        keys: of a shard's groups; None for other files.
        states: of a shard's groups.
    """

    numbers: Mapping[str, Sequence[int] | NDArray[Any]]
    texts: Mapping[str, Sequence[str | None]]
    lists: Mapping[str, Sequence[Sequence[Sequence[int]]]]
    keys: NDArray[np.bytes_] | None = None
    states: NDArray[np.int64] | None = None


def write_block(path: Path, header: BlockHeader, columns: BlockColumns) -> None:
    """Writes a block's file; equal blocks give equal bytes.

    Raises:
        MachineError: the disk is full or broken.
    """
    arrays = {name: pa.array(np.asarray(columns.numbers[name], kind)) for name, kind in NUMBERS.items()}
    for name in TEXTS:  # as bytes: a detail may quote what is no Unicode
        values = [None if text is None else text.encode("utf-8", "surrogatepass") for text in columns.texts[name]]
        arrays[name] = pa.array(values, pa.binary())
    for name, entries in columns.lists.items():
        arrays[name] = _list_array(entries, *LISTS[name])
    if columns.keys is not None:
        width = max(1, columns.keys.dtype.itemsize)
        padded = columns.keys.astype(f"S{width}").tobytes()
        arrays["key"] = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(width), len(columns.keys), [None, pa.py_buffer(padded)]
        )
        arrays["state"] = pa.array(np.asarray(columns.states, np.int64))
    metadata = {HEADER: json.dumps(asdict(header)).encode()}
    schema = pa.schema([(name, array.type) for name, array in arrays.items()], metadata=metadata)
    batch = pa.record_batch(list(arrays.values()), schema=schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(batch)
    stream = sink.getvalue()
    with whole_file(path, shared=True) as temporary, temporary.open("wb") as file:
        file.write(stream)
        file.write(_seal(stream))


def _seal(stream: Any) -> bytes:
    return bytes.fromhex(hash_bytes(memoryview(stream)))


def _list_array(entries: Sequence[Sequence[Sequence[int]]], kind: str, fields: int) -> Any:
    """A list column whose entries have a fixed number of integers each."""
    flat = np.array([number for row in entries for entry in row for number in entry], dtype=kind)
    borders = np.cumsum([0, *map(len, entries)], dtype=np.int32)
    values = pa.FixedSizeListArray.from_arrays(pa.array(flat), fields)
    return pa.ListArray.from_arrays(pa.array(borders), values)


class BlockTable:
    """A block's file, mapped into memory when it is first asked for; picklable by its path.

    Args:
        path: the file; using it raises BlockUnreadable if it cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[type[BlockTable], tuple[str]]:
        return BlockTable, (self.path,)

    @cached_property
    def _batch(self) -> Any:
        try:
            with pa.memory_map(self.path) as source:  # the mapping outlives the file, which many could not keep open
                whole = source.read_buffer()
            stream = whole.slice(0, max(0, whole.size - SEAL_BYTES))
            if whole.slice(stream.size).to_pybytes() != _seal(stream):
                raise ValueError("its hash is wrong")
            with pa.ipc.open_stream(stream) as reader:
                return reader.read_next_batch()
        except DAMAGE as error:
            raise BlockUnreadable(f"{self.path} cannot be read: {error}") from error

    @cached_property
    def header(self) -> BlockHeader:
        try:
            return BlockHeader(**json.loads(self._batch.schema.metadata[HEADER]))
        except DAMAGE as error:
            raise BlockUnreadable(f"{self.path} has no header of ours: {error}") from error

    def __len__(self) -> int:
        return int(self._batch.num_rows)

    def numbers(self, name: str) -> NDArray[Any]:
        """A column of NUMBERS, or "state", [rows]; a view of the file."""
        return np.asarray(self._batch.column(name).to_numpy(zero_copy_only=True))

    def text(self, name: str, row: int) -> str | None:
        """An entry of a column of TEXTS."""
        value = self._batch.column(name)[row].as_py()
        return None if value is None else value.decode("utf-8", "surrogatepass")

    def keys(self) -> NDArray[np.bytes_]:
        """Keys of a shard's groups: bytes [rows]."""
        column = self._batch.column("key")
        return np.frombuffer(column.buffers()[1], dtype=f"S{column.type.byte_width}", count=len(column))

    def entries(self, name: str) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """A column of LISTS: int64 [rows + 1], where each row's entries begin, and all entries [entries, fields]."""
        column = self._batch.column(name)
        flat = column.values.values.to_numpy(zero_copy_only=True).reshape(-1, LISTS[name][1])
        return column.offsets.to_numpy().astype(np.int64), flat
