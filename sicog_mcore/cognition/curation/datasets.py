"""Writes rows of training data to files, in the forms that trainers read; equal rows give equal bytes.

In: TrainingRow, folder of images   Out: train.json, train.jsonl, train.parquet, train-N.tar   Next: data/sources.py
Files are streamed. A tar shard holds the images too: bytes as they are for JPEG, PNG and WebP, pixels as PNG for the rest.
Parquet is for others: its columns are id, image, conversations (a list of from and value), record, form, prompt.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

from sicog_mcore.cognition.curation.conversations import TrainingRow
from sicog_mcore.config import DataConfig
from sicog_mcore.data.decode import decode_image, read_bytes
from sicog_mcore.data.rows import locate_image

Format = Literal["json", "jsonl", "parquet", "webdataset"]

NAME = "train"
PARQUET_ROWS = 1024  # in a row group
SHARD_BYTES = 256 << 20
# How a file begins -> the ending of its member.
MEMBERS: Mapping[bytes, str] = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp"}


class RowWriter(Protocol):
    """Takes rows one by one."""

    def write(self, row: TrainingRow) -> None: ...


@contextmanager
def open_writers(
    folder: Path, formats: Sequence[Format], images: Path, shard_bytes: int = SHARD_BYTES
) -> Iterator[list[RowWriter]]:
    """Writers of all formats; their files are whole when the block ends.

    Args:
        folder: exists, and holds none of these files.
        images: folder that the rows' image paths are relative to.
        shard_bytes: size at which a shard is full.
    """
    with ExitStack() as stack:
        writers: list[RowWriter] = []
        for name in formats:
            if name == "webdataset":
                writers.append(stack.enter_context(_open_shards(folder, images, shard_bytes)))
            elif name == "parquet":
                writers.append(stack.enter_context(_open_parquet(folder)))
            else:
                writers.append(stack.enter_context(_open_json(folder, name)))
        yield writers


def encode(fields: Mapping[str, Any]) -> str:
    """One line of JSON, without its end."""
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


class _JsonWriter:
    """Rows with something before, between and behind them."""

    def __init__(self, file: io.TextIOBase, separator: str) -> None:
        self._file, self._separator = file, separator
        self._first = True

    def write(self, row: TrainingRow) -> None:
        self._file.write(("" if self._first else self._separator) + encode(row.fields()))
        self._first = False


@contextmanager
def _open_json(folder: Path, name: Literal["json", "jsonl"]) -> Iterator[_JsonWriter]:
    before, between, behind = ("[\n", ",\n", "\n]\n") if name == "json" else ("", "\n", "\n")
    with (folder / f"{NAME}.{name}").open("w", encoding="utf-8") as file:
        file.write(before)
        yield _JsonWriter(file, between)
        file.write(behind)


class _ParquetWriter:
    def __init__(self, path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        text = pyarrow.string()
        turn = pyarrow.struct([("from", text), ("value", text)])
        types = {"conversations": pyarrow.list_(turn)}
        names = ("id", "image", "conversations", "record", "form", "prompt")
        self._schema = pyarrow.schema([(name, types.get(name, text)) for name in names])
        self._file = pyarrow.parquet.ParquetWriter(path, self._schema, compression="zstd")
        self._table = pyarrow.Table.from_pylist
        self._rows: list[dict[str, Any]] = []

    def write(self, row: TrainingRow) -> None:
        # Row groups have a fixed number of rows, so equal rows give equal bytes.
        self._rows.append(row.fields())
        if len(self._rows) == PARQUET_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._file.write_table(self._table(self._rows, schema=self._schema))
        self._rows = []

    def close(self) -> None:
        self._flush()
        self._file.close()


@contextmanager
def _open_parquet(folder: Path) -> Iterator[_ParquetWriter]:
    writer = _ParquetWriter(folder / f"{NAME}.parquet")
    try:
        yield writer
    finally:
        writer.close()


class _ShardWriter:
    """Groups of members named by the row's number: an id may hold dots and slashes, which mean something in a tar."""

    def __init__(self, folder: Path, images: Path, shard_bytes: int) -> None:
        self._folder, self._images, self._shard_bytes = folder, os.path.realpath(images), shard_bytes
        self._archive: tarfile.TarFile | None = None
        self._shards = self._rows = 0

    def write(self, row: TrainingRow) -> None:
        # A shard ends between two rows, never between a row and its image.
        if self._archive is None or self._archive.offset >= self._shard_bytes:
            self.close()
            path = self._folder / f"{NAME}-{self._shards:06d}.tar"
            self._archive = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # closed by close()
            self._shards += 1
        key = f"{self._rows:09d}"
        self._rows += 1
        _add(self._archive, f"{key}.json", encode(row.fields()).encode())
        if row.image:
            data = read_bytes(locate_image(row.image, self._images))
            _add(self._archive, *_member(key, data))

    def close(self) -> None:
        if self._archive is not None:
            self._archive.close()


@contextmanager
def _open_shards(folder: Path, images: Path, shard_bytes: int) -> Iterator[_ShardWriter]:
    writer = _ShardWriter(folder, images, shard_bytes)
    try:
        yield writer
    finally:
        writer.close()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)  # time and owner are zero, so equal rows give equal bytes
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))
    archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every entry until it is closed


def _member(key: str, data: bytes) -> tuple[str, bytes]:
    """Name and bytes of an image in a shard."""
    for start, ending in MEMBERS.items():
        if data.startswith(start):
            return f"{key}.{ending}", data
    png = io.BytesIO()
    Image.fromarray(decode_image(data, DataConfig())).save(png, "PNG")
    return f"{key}.png", png.getvalue()
