"""One row in LLaVA form to a Sample: fields, turns, placeholders and image paths, each checked.

In: bytes of a row   Out: Sample   Next: sources.py, shards.py (which find the rows)
Reasons: json_invalid, not_utf8, line_too_long, row_unreadable, field_missing, field_type, role_unknown, turns_order,
answer_empty, image_token_in_answer, image_count_mismatch, image_path_unsafe.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from sicog_mcore.data.sample import IMAGE_PLACEHOLDER, ImageRef, Role, Sample, Turn
from sicog_mcore.errors import SampleError

MAX_ROW_BYTES = 16 * 2**20
ROLES: Mapping[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
URL_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")

Row = dict[str, Any]
BuildSample = Callable[[Row, Sequence[ImageRef], str, str], Sample]  # row, its images, default id, origin
Hashes = NDArray[np.uint64]


class RowHashes(NamedTuple):
    """What the rows of a file are recognised by, in order.

    Attributes:
        ids: uint64 [rows]: hash of every row's id.
        contents: uint64 [rows]: hash of every row's bytes.
    """

    ids: Hashes
    contents: Hashes


class RowIds:
    """Hashes of a file's rows, in order; a broken row, or one without an id, counts under its default id."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._hashes = array("Q")
        self._contents = array("Q")

    def add(self, row: object) -> None:
        row_id = row.get("id") if isinstance(row, dict) else None
        text = default_id(self._name, len(self._hashes)) if row_id in (None, "") else str(row_id)
        self._hashes.append(xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")))

    def add_encoded(self, raw: bytes) -> None:
        try:
            self.add(parse_row(raw))
        except SampleError:
            self.add(None)

    def add_content(self, content: bytes) -> None:
        """Adds what makes a row what it is: its bytes, without the white space around them."""
        self._contents.append(xxhash.xxh3_64_intdigest(content))

    def hashes(self) -> RowHashes:
        return RowHashes(np.frombuffer(self._hashes, np.uint64), np.frombuffer(self._contents, np.uint64))


def default_id(name: str, row: int) -> str:
    """Id of a row that brings none."""
    return f"{name}-{row}"


def read_range(path: str, offset: int, length: int) -> bytes:
    """Bytes of a row.

    Raises:
        SampleError: line_too_long; row_unreadable.
    """
    if length > MAX_ROW_BYTES:
        raise SampleError("line_too_long", f"the row has {length} bytes, at most {MAX_ROW_BYTES}; split or remove it")
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(length)
    except OSError as error:
        raise SampleError("row_unreadable", f"{error}; the file was there when the run started") from error


def decode_text(raw: bytes) -> str:
    """UTF-8 text; a byte order mark at the start is dropped.

    Raises:
        SampleError: not_utf8.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        detail = f"byte {error.start} of the row is {raw[error.start]:#04x}; convert the file to UTF-8"
        raise SampleError("not_utf8", detail) from error


def parse_row(raw: bytes) -> Row:
    """Parses the JSON object of a row.

    Raises:
        SampleError: not_utf8; json_invalid; field_type.
    """
    try:
        row = json.loads(decode_text(raw))
    except (ValueError, RecursionError) as error:
        raise SampleError("json_invalid", f"{error} ({raw[:40]!r}...); repair or remove the row") from error
    if not isinstance(row, dict):
        raise SampleError("field_type", f"the row is a {type(row).__name__}, expected an object")
    return row


def build_sample(row: Row, images: Sequence[ImageRef], fallback_id: str, origin: str) -> Sample:
    """Checks a row and gives it its meaning.

    A turn with exactly one ``<image>`` that does not start with it gets it moved to its start, followed by a newline.

    Args:
        row: the parsed row.
        images: its images, in the order of their placeholders.
        fallback_id: id of a row that brings none.
        origin: where the row stands, for messages.

    Raises:
        SampleError: field_missing, field_type, not_utf8, role_unknown, turns_order, answer_empty,
            image_token_in_answer, image_count_mismatch.
    """
    turns = _turns(row)
    _check_order(turns)
    _check_placeholders(turns, len(images))
    return Sample(_id(row, fallback_id), origin, tuple(_image_first(turn) for turn in turns), tuple(images))


def image_paths(row: Row) -> list[str]:
    """Paths in the row's ``image`` field: none, one, or a list.

    Raises:
        SampleError: field_type; not_utf8.
    """
    value = row.get("image")
    if value is None:
        return []
    return [_text(path, "image") for path in (value if isinstance(value, list) else [value])]


def locate_image(path: str, root: str) -> ImageRef:
    """Resolves an image path inside its root, symbolic links included.

    Args:
        path: as written in the row.
        root: real path of the image folder.

    Raises:
        SampleError: image_path_unsafe.
    """
    if not is_unsafe_path(path):
        real = os.path.realpath(os.path.join(root, path))
        if os.path.commonpath([root, real]) == root:
            return ImageRef(real)
    raise SampleError("image_path_unsafe", f"{path!r} must be a relative path that stays inside {root}")


def is_unsafe_path(path: str) -> bool:
    """Whether a path is absolute, climbs, holds NUL, or is a URL."""
    windows = PureWindowsPath(path)  # splits at both kinds of slashes
    return "\0" in path or windows.anchor != "" or ".." in windows.parts or URL_SCHEME.match(path) is not None


def _id(row: Row, fallback: str) -> str:
    value = row.get("id")
    if value is None or value == "":
        return fallback
    return str(value) if type(value) is int else _text(value, "id")


def _field(row: Row, *names: str) -> Any:
    """The first of these fields that the row has."""
    for name in names:
        if name in row:
            return row[name]
    raise SampleError("field_missing", f"found {sorted(row)}, expected {' or '.join(names)}")


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise SampleError("field_type", f"{name} is {value!r:.80}, expected a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SampleError("not_utf8", f"{name} holds half a surrogate pair at {error.start}; repair it") from error
    return value


def _turns(row: Row) -> list[Turn]:
    conversation = _field(row, "conversations")
    if not isinstance(conversation, list):
        raise SampleError("field_type", f"conversations is {conversation!r:.80}, expected a list of turns")
    turns = []
    for number, turn in enumerate(conversation):
        if not isinstance(turn, dict):
            raise SampleError("field_type", f"turn {number} is {turn!r:.80}, expected an object")
        role = _text(_field(turn, "from", "role"), "from")
        if role not in ROLES:
            raise SampleError("role_unknown", f"turn {number} is from {role!r:.80}, expected one of {', '.join(ROLES)}")
        turns.append(Turn(ROLES[role], _text(_field(turn, "value", "content"), "value")))
    return turns


def _check_order(turns: Sequence[Turn]) -> None:
    roles = [turn.role for turn in turns]
    dialogue = roles[1:] if roles[:1] == ["system"] else roles
    if not dialogue or dialogue != ["user", "assistant"] * (len(dialogue) // 2):
        expected = "an optional system turn, then user and assistant in turn, the assistant last"
        raise SampleError("turns_order", f"found {roles[:20]}, expected {expected}")
    for number, turn in enumerate(turns):
        if turn.role == "assistant" and not turn.text.strip():
            raise SampleError("answer_empty", f"turn {number} has no text to learn; remove the row")


def _check_placeholders(turns: Sequence[Turn], num_images: int) -> None:
    counts = dict.fromkeys(ROLES.values(), 0)
    for turn in turns:
        counts[turn.role] += turn.text.count(IMAGE_PLACEHOLDER)
    if counts["assistant"]:
        raise SampleError("image_token_in_answer", f"an answer holds {IMAGE_PLACEHOLDER}; only user turns may")
    if counts["system"] or counts["user"] != num_images:
        found = f"{counts['user']} {IMAGE_PLACEHOLDER} in user turns and {counts['system']} in the system turn"
        raise SampleError("image_count_mismatch", f"found {found} for {num_images} images; write one per image")


def _image_first(turn: Turn) -> Turn:
    if turn.text.count(IMAGE_PLACEHOLDER) != 1 or turn.text.startswith(IMAGE_PLACEHOLDER):
        return turn
    rest = turn.text.replace(IMAGE_PLACEHOLDER, "").strip()
    return replace(turn, text=f"{IMAGE_PLACEHOLDER}\n{rest}")
