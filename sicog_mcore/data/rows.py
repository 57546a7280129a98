"""One row in LLaVA form to a Sample: fields, turns, placeholders and image paths, each checked.

In: bytes of a row   Out: Sample   Next: sources.py, shards.py (which find the rows)
Reasons: json_invalid, key_repeated, not_utf8, line_too_long, row_unreadable, field_missing, field_type, key_unsupported,
role_unknown, turns_order, system_ambiguous, answer_empty, media_missing, image_token_in_answer, image_count_mismatch,
image_path_unsafe.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from sicog_mcore.data.mentions import lost_tag
from sicog_mcore.data.row_keys import (
    MAX_KEY_CHARS,
    ROW_KEYS,
    row_faults,
    row_weight,
    shown,
    shown_keys,
    suggestion,
    turn_faults,
)
from sicog_mcore.data.row_survey import RowSurvey
from sicog_mcore.data.sample import IMAGE_PLACEHOLDER, ImageRef, Role, Sample, Turn
from sicog_mcore.errors import SampleError

MAX_ROW_BYTES = 16 * 2**20
MAX_ROW_IMAGES = 4096  # each is looked up in its folder before anything else is known of it
MAX_PATH_CHARS = 300  # of a path as shown in messages
ROLES: Mapping[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
# Any character but blanks, controls and what has no width or shows nothing: joiners, marks of direction, fillers.
VISIBLE = re.compile(
    r"[^\s\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    r"\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
URL_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")

JsonRow = dict[str, Any]
BuildSample = Callable[[JsonRow, Sequence[ImageRef], str, str], Sample]  # row, its images, default id, origin
Hashes = NDArray[np.uint64]


class RowHashes(NamedTuple):
    """The hashes by which the rows of a file are recognised, in order.

    Attributes:
        ids: uint64 [rows]: hash of every row's id.
        contents: uint64 [rows]: hash of every row's bytes.
    """

    ids: Hashes
    contents: Hashes


class RowIds:
    """Hashes of a file's rows, in order; a broken row, or one without an id, counts under its default id.

    Args:
        name: what default ids start with.
        path: the file, for messages.
        survey: counts the keys of the rows.
        first_row: number in the file of the first row that is counted.

    Attributes:
        nameless: numbers of the rows without an id, counted from the first one here.
    """

    def __init__(self, name: str, path: str, survey: RowSurvey, first_row: int = 0) -> None:
        self.nameless = array("q")
        self._first_row = first_row
        self._name = name
        self._path = path
        self._survey = survey
        # Eight bytes a row each, for files of many millions.
        self._hashes = array("Q")
        self._contents = array("Q")

    def add(self, row: object, place: int | str, num_images: int | None = None) -> None:
        """Counts a row.

        Args:
            row: as parsed; anything but an object is a broken row.
            place: line of the file, or key of the sample in a shard.
            num_images: images of the row; None asks its field ``image``.
        """
        row_id = None
        if isinstance(row, dict):
            row_id = row.get("id")
            self._survey.add_row(row, _count_images(row) if num_images is None else num_images, self._path, place)
        self.add_id(row_id)

    def add_id(self, row_id: object) -> None:
        """Counts a row by its id alone."""
        if row_id in (None, ""):
            self.nameless.append(len(self._hashes))
            row_id = default_id(self._name, self._first_row + len(self._hashes))
        self._hashes.append(hash_id(str(row_id)))

    def add_encoded(self, raw: bytes, place: int | str) -> None:
        """Counts a row of a file; whether it is whole is seen when it is read."""
        try:
            self.add(json.loads(decode_text(raw)), place)
        except (SampleError, ValueError, RecursionError):
            self.add_id(None)

    def add_content(self, content: bytes) -> None:
        """Adds what makes a row what it is: its bytes, without the white space around them."""
        self._contents.append(xxhash.xxh3_64_intdigest(content))

    def hashes(self) -> RowHashes:
        return RowHashes(np.frombuffer(self._hashes, np.uint64), np.frombuffer(self._contents, np.uint64))


def hash_id(row_id: str) -> int:
    """Hash by which rows with one id are found."""
    return xxhash.xxh3_64_intdigest(row_id.encode("utf-8", "surrogatepass"))


def default_id(name: str, row: int) -> str:
    """Id of a row that brings none."""
    return f"{name}-{row}"


def read_range(path: str, offset: int, length: int) -> bytes:
    """Bytes of a row.

    Raises:
        SampleError: line_too_long; row_unreadable.
    """
    check_length(length)
    try:
        with open(path, "rb", buffering=0) as file:  # a buffer would read on beyond the row
            file.seek(offset)
            return file.read(length)
    except OSError as error:
        raise SampleError("row_unreadable", f"{error}; the file was there when the run started") from error


def check_length(length: int) -> None:
    """Refuses a row of too many bytes.

    Raises:
        SampleError: line_too_long.
    """
    if length > MAX_ROW_BYTES:
        raise SampleError("line_too_long", f"the row has {length} bytes, at most {MAX_ROW_BYTES}; split or remove it")


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


def parse_row(raw: bytes, nan_is_null: bool = False) -> JsonRow:
    """Parses the JSON object of a row.

    Args:
        nan_is_null: take NaN, which pandas writes for an empty cell, for null; otherwise it is refused, as in JSON.

    Raises:
        SampleError: not_utf8; json_invalid; key_repeated; field_type.
    """
    try:
        constant = partial(_refuse_constant, nan_is_null=nan_is_null)
        row = json.loads(decode_text(raw), object_pairs_hook=_unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise SampleError("json_invalid", f"{error} ({raw[:40]!r}...); repair or remove the row") from error
    if not isinstance(row, dict):
        raise SampleError("field_type", f"the row is a {type(row).__name__}, expected an object")
    return row


def _unique(pairs: list[tuple[str, Any]]) -> JsonRow:
    """An object whose keys are its own; of a repeated one, JSON does not say which counts."""
    # json keeps the last of two equal keys without a word; only the pairs show that there were two.
    fields = dict(pairs)
    if len(fields) != len(pairs):
        key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise SampleError(
            "key_repeated", f"the key {key[:MAX_KEY_CHARS]!r} stands twice in an object; keep one of them"
        )
    return fields


def _refuse_constant(name: str, nan_is_null: bool) -> None:
    if name == "NaN" and nan_is_null:
        return
    raise ValueError(f"{name} is no JSON; write null")


def build_sample(row: JsonRow, images: Sequence[ImageRef], fallback_id: str, origin: str) -> Sample:
    """Checks a row and gives it its meaning.

    A turn with exactly one ``<image>`` that does not start with it gets it moved to its start, followed by a newline.
    The field ``system`` becomes the system turn, and the number in ``weight`` the weight of the answers' losses.

    Args:
        row: the parsed row.
        images: its images, in the order of their placeholders.
        fallback_id: id of a row that brings none.
        origin: where the row stands, for messages.

    Raises:
        SampleError: field_missing, field_type, key_unsupported, not_utf8, role_unknown, turns_order, system_ambiguous,
            answer_empty, media_missing, image_token_in_answer, image_count_mismatch.
    """
    if "conversations" not in row:
        raise SampleError("field_missing", missing(row, "conversations", ROW_KEYS, len(images)))
    check_keys(row, ROW_KEYS, len(images))
    sample, weight = build_dialogue(row, images, fallback_id, origin), row_weight(row)
    return sample if weight == 1 else replace(sample, weights=(weight,))


def build_dialogue(row: JsonRow, images: Sequence[ImageRef], fallback_id: str, origin: str) -> Sample:
    """Builds the Sample of a row whose other keys were judged before."""
    turns = _turns(row)
    _check_order(turns)
    _check_media(turns, bool(images))
    _check_placeholders(turns, len(images))
    return Sample(_id(row, fallback_id), origin, tuple(_image_first(turn) for turn in turns), tuple(images))


def check_keys(row: JsonRow, used: frozenset[str], num_images: int) -> None:
    """Makes sure that no key is left aside that changes what the row means.

    Raises:
        SampleError: key_unsupported.
    """
    if faults := row_faults(row, used, num_images):
        raise SampleError("key_unsupported", "; ".join(fault.detail for fault in faults))


def missing(row: JsonRow, wanted: str, used: frozenset[str], num_images: int) -> str:
    """Says which keys were found where one is missing, and which may be meant."""
    faults = "".join(f"; {fault.detail}" for fault in row_faults(row, used, num_images))
    return f"found {shown_keys(row)}, expected {wanted}{suggestion(row, wanted)}{faults}"


def image_paths(row: JsonRow) -> list[str]:
    """Paths in the row's ``image`` field: none (also for a blank text), one, or a list.

    Raises:
        SampleError: field_type; not_utf8; image_count_mismatch.
    """
    value = row.get("image")
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    if isinstance(value, list) and len(value) > MAX_ROW_IMAGES:
        raise SampleError(
            "image_count_mismatch", f"image lists {len(value):,}, at most {MAX_ROW_IMAGES:,} fit a sample"
        )
    paths = [_text(path, "image") for path in (value if isinstance(value, list) else [value])]
    if not all(path.strip() for path in paths):
        raise SampleError("field_type", f"image is {shown(value)}, expected paths; remove the empty ones")
    return paths


def _count_images(row: JsonRow) -> int:
    try:
        return len(image_paths(row))
    except SampleError:
        return 0


def locate_images(row: JsonRow, root: str) -> list[ImageRef]:
    """The images that a row names, see ``image_paths`` and ``locate_image``."""
    return [locate_image(path, root) for path in image_paths(row)]


def locate_image(path: str, root: str) -> ImageRef:
    """Resolves an image path inside its root, symbolic links included.

    Args:
        path: as written in the row.
        root: real path of the image folder.

    Raises:
        SampleError: image_path_unsafe.
    """
    if not is_unsafe_path(path):
        # Links are followed first. commonpath compares whole names, so that /data-2 does not count as inside /data.
        real = os.path.realpath(os.path.join(root, path))
        if os.path.commonpath([root, real]) == root:
            return ImageRef(real)
    raise SampleError(
        "image_path_unsafe", f"{path[:MAX_PATH_CHARS]!r} must be a relative path that stays inside {root}"
    )


def is_unsafe_path(path: str) -> bool:
    """Whether a path is absolute, climbs, holds NUL, or is a URL."""
    windows = PureWindowsPath(path)  # splits at both kinds of slashes
    return "\0" in path or windows.anchor != "" or ".." in windows.parts or URL_SCHEME.match(path) is not None


def _id(row: JsonRow, fallback: str) -> str:
    value = row.get("id")
    if value is None or value == "":
        return fallback
    return str(value) if type(value) is int else _text(value, "id")


def _text(value: object, name: str) -> str:
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise SampleError("not_utf8", f"{name} holds half a surrogate pair at {error.start}; repair it") from error
        return value
    parts = isinstance(value, list) and value and isinstance(value[0], dict) and "type" in value[0]
    remedy = f"; join its parts to one text with {IMAGE_PLACEHOLDER} where an image belongs" if parts else ""
    raise SampleError("field_type", f"{name} is {shown(value)}, expected a text{remedy}")


def _turns(row: JsonRow) -> list[Turn]:
    conversation = row["conversations"]
    if not isinstance(conversation, list):
        raise SampleError("field_type", f"conversations is {shown(conversation)}, expected a list of turns")
    turns = [read_turn(turn, f"turn {number}") for number, turn in enumerate(conversation)]
    if row.get("system") is None or row["system"] == "":
        return turns
    system = Turn("system", _text(row["system"], "system"))
    # Both ways of giving a system turn are in use; together they must agree.
    if turns[:1] and turns[0].role == "system":
        if turns[0] != system:
            detail = "the field 'system' and the conversation's system turn differ; keep one of them"
            raise SampleError("system_ambiguous", detail)
        return turns
    return [system, *turns]


def read_turn(turn: object, name: str) -> Turn:
    """One turn, {from, value} or {role, content}.

    Args:
        turn: as parsed.
        name: of the turn, for messages.

    Raises:
        SampleError: field_type, field_missing, key_unsupported, role_unknown, not_utf8.
    """
    if not isinstance(turn, dict):
        raise SampleError("field_type", f"{name} is {shown(turn)}, expected an object")
    role, text = _either(turn, "from", "role", name), _either(turn, "value", "content", name)
    role = _text(role, f"the role of {name}")
    if role not in ROLES:
        raise SampleError("role_unknown", f"{name} is from {shown(role)}, expected one of {', '.join(ROLES)}")
    if faults := turn_faults(turn, ROLES[role] == "assistant"):
        raise SampleError("key_unsupported", f"{name}: " + "; ".join(fault.detail for fault in faults))
    return Turn(ROLES[role], _text(text, f"the text of {name}"))


def _either(turn: JsonRow, llava: str, message: str, name: str) -> Any:
    """The field of a turn, which has two names in the field; both together must say the same."""
    if llava in turn and message in turn:
        one, other = turn[llava], turn[message]
        roles = (ROLES.get(role) if isinstance(role, str) else None for role in (one, other))
        if one != other and (llava != "from" or len({*roles, None}) != 2):
            raise SampleError(
                "key_unsupported", f"{name} has {llava!r} and {message!r}, which differ; keep one of them"
            )
    for key in (llava, message):
        if key in turn:
            return turn[key]
    hint = suggestion(turn, llava) or suggestion(turn, message)
    raise SampleError("field_missing", f"{name} has {shown_keys(turn)}, expected {llava} or {message}{hint}")


def _check_order(turns: Sequence[Turn]) -> None:
    roles = [turn.role for turn in turns]
    dialogue = roles[1:] if roles[:1] == ["system"] else roles
    if not dialogue or dialogue != ["user", "assistant"] * (len(dialogue) // 2):
        expected = "an optional system turn, then user and assistant in turn, the assistant last"
        raise SampleError("turns_order", f"found {roles[:20]}, expected {expected}")
    for number, turn in enumerate(turns):
        # Zero-width signs are no white space to strip(), but nothing to learn either.
        if turn.role == "assistant" and not VISIBLE.search(turn.text):
            raise SampleError("answer_empty", f"turn {number} has no text to learn; remove the row")


def _check_media(turns: Sequence[Turn], has_images: bool) -> None:
    for number, turn in enumerate(turns):
        if tag := lost_tag(turn.text, turn.role == "assistant", has_images):
            remedy = f"write {IMAGE_PLACEHOLDER} and the path under 'image', or remove the row"
            raise SampleError("media_missing", f"turn {number} shows {tag!r}, which the row does not give; {remedy}")


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
    # Training data has the image in front of the question; where several are, their order is part of the text.
    rest = turn.text.replace(IMAGE_PLACEHOLDER, "").strip()
    return replace(turn, text=f"{IMAGE_PLACEHOLDER}\n{rest}")
