"""Cuts a file of rows into blocks that are indexed, read and shuffled one by one.

In: a JSONL file or JSON list   Out: BlockSpan, one after the other   Next: block_rows.py
A block ends behind a row that its own bytes choose, once the block is long enough. So rows that are put in, taken out or
appended somewhere change the blocks around them, and the others keep their bytes, and with them their part of the index.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import xxhash

from sicog_mcore.data.row_spans import ListElement, ListMalformed, RowLine, find_elements, find_lines, read_latin
from sicog_mcore.data.sources import FILE_ERRORS, DataFile
from sicog_mcore.files import hash_bytes

BLOCK_ROWS = 8192  # a block has at least so many rows, or so many bytes; none has twice as many
BLOCK_BYTES = 16 << 20
ENDS_ONE_IN = 64  # of the rows behind that, by the hash of their bytes


class BlockSpan(NamedTuple):
    """Consecutive rows of a file.

    Attributes:
        start: of the first row's line, or of the first row in a list (bytes).
        length: up to the end of the last row (bytes); the whole file for a shard.
        line: number of the first line, which is 1 at the beginning of the file.
        first_row: number of the first row in the file.
        rows: number of rows.
        digest: hash of the rows' bytes and places; of a shard see ``block_rows.shard_digest``.
    """

    start: int
    length: int
    line: int
    first_row: int
    rows: int
    digest: str


class FileChanged(Exception):
    """A file of rows has other bytes than a moment ago."""


BLOCK_ERRORS: tuple[type[Exception], ...] = (*FILE_ERRORS, FileChanged)  # what keeps a block from being indexed


class BlockRow(NamedTuple):
    """A row of a block.

    Attributes:
        offset: of its first byte from the block's start.
        length: bytes.
        line: its number, where the block's first line is 1.
        raw: its bytes; none of a line that is too long to be a row.
        content: what it is recognised by, see ``RowIds.add_content``.
    """

    offset: int
    length: int
    line: int
    raw: bytes
    content: bytes


def cut_blocks(file: DataFile) -> Iterator[BlockSpan]:
    """Reads a JSONL file or a JSON list once, and tells its blocks.

    Args:
        file: no shard, which is a block by itself.

    Raises:
        OSError: it cannot be read.
        ListMalformed: it is no JSON list.
    """
    if file.kind == "lines":
        with open(file.path, "rb") as lines:
            yield from _cut(find_lines(lines))
    else:
        yield from _cut(find_elements(read_latin(file.path)))


def _cut(rows: Iterable[RowLine | ListElement]) -> Iterator[BlockSpan]:
    cut = _Cut()
    first_row = 0
    for row in rows:
        cut.add(row)
        if cut.is_full():
            yield cut.span(first_row)
            first_row += cut.rows
            cut = _Cut()
    if cut.rows:
        yield cut.span(first_row)


def read_block(file: DataFile, span: BlockSpan) -> Iterator[BlockRow]:
    """The rows of a block.

    Raises:
        OSError: the file cannot be read.
        FileChanged: its bytes are not those that the block was cut from; known only behind the last row.
    """
    cut = _Cut()
    try:
        for row in _rows_of(file, span):
            cut.add(row)
            content = row.start.strip() if isinstance(row, RowLine) else row.raw
            yield BlockRow(row.offset - cut.start, row.length, row.number - cut.line + 1, row.raw, content)
    except ListMalformed:
        cut = _Cut()
    if not cut.rows or cut.span(span.first_row)._replace(start=span.start, line=span.line) != span:
        raise FileChanged("was changed while it was indexed; start again when it is written")


def _rows_of(file: DataFile, span: BlockSpan) -> Iterator[RowLine | ListElement]:
    with open(file.path, "rb") as opened:
        if file.kind == "lines":
            yield from find_lines(opened, span.start, span.start + span.length)
        else:
            opened.seek(span.start)
            yield from find_elements(f"[{opened.read(span.length).decode('latin-1')}]")


class _Cut:
    """The block that is being cut.

    Attributes:
        start, line: offset and line number of its first row.
        rows: number of rows so far.
    """

    def __init__(self) -> None:
        self.start = self.line = self.rows = 0
        self._stop = 0
        self._hashes = array("Q")
        self._last = b""

    def add(self, row: RowLine | ListElement) -> None:
        if not self.rows:
            self.start, self.line = row.offset, row.number
        self._last = row.start if isinstance(row, RowLine) else row.raw
        # Where rows stand in their block is part of what is hashed: blank lines between them move the others.
        place = b"%d %d %d\n" % (row.offset - self.start, row.length, row.number - self.line)
        self._hashes.append(xxhash.xxh3_64_intdigest(place + self._last))
        self._stop = row.offset + row.length
        self.rows += 1

    def is_full(self) -> bool:
        size = self._stop - self.start
        if self.rows < BLOCK_ROWS and size < BLOCK_BYTES:
            return False
        is_long = self.rows >= 2 * BLOCK_ROWS or size >= 2 * BLOCK_BYTES
        return is_long or xxhash.xxh3_64_intdigest(self._last) % ENDS_ONE_IN == 0

    def span(self, first_row: int) -> BlockSpan:
        size = self._stop - self.start
        return BlockSpan(self.start, size, self.line, first_row, self.rows, hash_bytes(self._hashes.tobytes()))
