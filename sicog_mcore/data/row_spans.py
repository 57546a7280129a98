"""Where the rows of a JSONL file or a JSON list are: their bytes and line numbers, found without knowing what they mean.

In: an open file, or the text of a list   Out: RowLine or ListElement, one after the other   Next: sources.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sicog_mcore.data.rows import MAX_ROW_BYTES

BOM = "\xef\xbb\xbf"  # UTF-8's byte order mark, read as Latin-1
JSON_SPACE = re.compile(r"[ \t\r\n]*")


class ListMalformed(Exception):
    """A .json file is not one list."""


class RowLine(NamedTuple):
    """A row of a JSONL file.

    Attributes:
        offset: of its first byte in the file.
        length: bytes with the line end.
        number: of its line; the first line is 1.
        start: its bytes, as many as a row may have and one more.
    """

    offset: int
    length: int
    number: int
    start: bytes

    @property
    def raw(self) -> bytes:
        """Bytes of the row; none of a line that is too long to be a row."""
        return self.start if self.length <= MAX_ROW_BYTES else b""


class ListElement(NamedTuple):
    """A row of a JSON list.

    Attributes:
        offset: of its first byte in the text.
        length: bytes.
        number: of the line in which it begins; the first line is 1.
        raw: its bytes.
        value: the same as parsed from Latin-1: right if the bytes are ASCII.
    """

    offset: int
    length: int
    number: int
    raw: bytes
    value: Any


def find_lines(file: BinaryIO, start: int = 0, stop: int | None = None, number: int = 1) -> Iterator[RowLine]:
    """Finds the rows of a JSONL file; blank lines are none. An over-long line is never held in memory whole.

    Args:
        file: opened for reading.
        start: where a line begins; lines are found from there on.
        stop: where a line begins that is not looked at any more; None reads to the end of the file.
        number: of the line at ``start``.
    """
    file.seek(start)
    offset, number = start, number - 1
    while (stop is None or offset < stop) and (line := file.readline(MAX_ROW_BYTES + 1)):
        number += 1
        length = len(line)
        if length > MAX_ROW_BYTES:
            length += _skip_rest(file, line)
        if length > MAX_ROW_BYTES or not line.isspace():
            yield RowLine(offset, length, number, line)
        offset += length


def _skip_rest(file: BinaryIO, chunk: bytes) -> int:
    """Reads on to the end of the line that ``chunk`` belongs to; returns the bytes read."""
    skipped = 0
    while not chunk.endswith(b"\n") and (chunk := file.readline(MAX_ROW_BYTES)):
        skipped += len(chunk)
    return skipped


def read_latin(path: Path) -> str:
    """The bytes of a file as Latin-1: a character is a byte, so positions are offsets.

    JSON's own characters are the same in UTF-8.
    """
    with open(path, encoding="latin-1", newline="") as file:
        return file.read()


def find_elements(text: str, number: int = 1) -> Iterator[ListElement]:
    """Finds the elements of a JSON list.

    Args:
        text: of ``read_latin``.
        number: of the text's first line.

    Raises:
        ListMalformed: the text is not one JSON list; the message has line and column.
    """
    counted = 0
    try:
        for value, start, end in _elements(text):
            number += text.count("\n", counted, start)
            counted = start
            yield ListElement(start, end - start, number, text[start:end].encode("latin-1"), value)
    except (ValueError, RecursionError) as error:
        raise ListMalformed(f"is no JSON list of rows: {error}") from error


def _elements(text: str) -> Iterator[tuple[Any, int, int]]:
    """The elements of a JSON list, one by one: value, start and end.

    Raises:
        json.JSONDecodeError: the text is not one JSON list; the message has line and column.
    """
    decoder = json.JSONDecoder()
    at = _next(text, len(BOM) if text.startswith(BOM) else 0)
    if text[at : at + 1] != "[":
        hint = ", found one object: name the file .jsonl if it holds a row per line" if text[at : at + 1] == "{" else ""
        raise json.JSONDecodeError(f"Expecting a list{hint}", text, at)
    at = _next(text, at + 1)
    more = text[at : at + 1] != "]"
    while more:
        value, end = decoder.raw_decode(text, at)
        yield value, at, end
        at = _next(text, end)
        more = text[at : at + 1] == ","
        if more:
            at = _next(text, at + 1)
        elif text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
    at = _next(text, at + 1)
    if at < len(text):
        raise json.JSONDecodeError("Expecting the end of the file", text, at)


def _next(text: str, at: int) -> int:
    """Position of the next character that is not white space."""
    match = JSON_SPACE.match(text, at)
    return match.end() if match else at
