"""Reads the cells of a benchmark's row: texts, options, the letter of the reference, and the keys that nothing reads.

In: a row of JSON or TSV   Out: texts and letters; UnreadCells, which names and counts the other keys   Next: benchmark.py
An empty cell is "", null, or what pandas writes for it: nan. "None", "null" and "N/A" are texts like any other.
"""

from __future__ import annotations

import ast
import json
import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from sicog_mcore.cognition.answer_grammar import lone_letter
from sicog_mcore.cognition.answers import normalise
from sicog_mcore.data.rows import JsonRow
from sicog_mcore.errors import SampleError

MAX_LIST = 1 << 20  # characters of a cell that holds a list
MISSING = frozenset(("", "nan", "NaN", "NAN", "<NA>"))
LETTERS = string.ascii_uppercase
OPTION_KEYS = ("options", "choices")
USED = frozenset(
    (
        "id",
        "index",
        "question",
        "answer",
        "hint",
        "category",
        "image",
        "image_path",
        "pixels",
        "conversations",
        *OPTION_KEYS,
    )
)
IRRELEVANT = frozenset(  # that say where a row comes from, and nothing that is asked
    "split source dataset license url author version language lang image_id image_hash question_id meta_info metadata meta"
    " comment difficulty subject subfield topic l2-category l2_category pid bench".split()
)
LIKE_OPTIONS = re.compile(
    r".*(?:option|choice|distractor|candidate|alternative|possible_answer).*|opts?|endings|mc\d?_\w+"
    r"|[a-j]|(?:opt|answer)[ _-]?(?:[a-j]|\d{1,2})",
    re.I,
)
LIKE_PICTURES = re.compile(
    r"images|pictures?|imgs?|photos?|videos?|audios?|frames?"
    r"|(?:image|img|picture|video|audio)[ _-]?(?:\d{1,2}|paths?|urls?|files?|file_?names?|names?|list|base64|bytes)",
    re.I,
)


class UnreadCells:
    """Counts keys of a benchmark's rows that nothing reads, and remembers where each stands first."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self.indices = 0

    def add(self, keys: list[str], origin: str) -> None:
        """Notes the keys of one row."""
        for key in keys:
            self._counts[key] += 1
            self._first.setdefault(key, origin)

    def lines(self) -> Iterator[str]:
        """One line per key, and one about answers that were taken as indices."""
        for key, count in sorted(self._counts.items()):
            yield f"{self._first[key]}: the key {key!r} is not read ({count} rows have it); rename it if it matters"
        if self.indices:
            yield f"{self.indices} answers are numbers, taken as indices of options from 0; give letters if they start at 1"


def is_missing(value: object) -> bool:
    """Whether a cell is empty, or holds what pandas writes for an empty one."""
    if isinstance(value, float):
        return value != value
    return value is None or (isinstance(value, str) and value.strip() in MISSING)


def texts(value: object) -> list[str]:
    """Reads one text, several, or none. A cell of a TSV file may hold a list, in the form of JSON or of Python.

    Raises:
        SampleError: field_type.
    """
    if value is None or value == "":
        return []
    if isinstance(value, str):
        # Only what begins like a list of texts: "[1] is larger" is a question.
        listed = _literal(value) if value.startswith(("['", '["')) else None
        return (
            listed
            if isinstance(listed, list) and all(isinstance(entry, str) for entry in listed) and listed
            else [value]
        )
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, str | int | float) and not isinstance(entry, bool) for entry in values):
        raise SampleError("field_type", f"found {value!r:.80}, expected a text, a number, or a list of them")
    return [str(entry) for entry in values]


def unread_keys(row: Mapping[str, Any]) -> list[str]:
    """Keys with a value that nothing reads.

    Raises:
        SampleError: field_unknown; without the key the question would be another one: it holds options or pictures.
    """
    # With a list of options, columns A, B, ... are ordinary keys; without one they are the options.
    letters = [] if any(not is_missing(row.get(key)) for key in OPTION_KEYS) else list(LETTERS)
    known = USED | IRRELEVANT | set(letters)
    keys = [key for key, value in row.items() if key not in known and not is_missing(value) and value not in ([], {})]
    has_options = len(letters) == 0 or sum(not is_missing(row.get(letter)) for letter in LETTERS) > 1
    for looks, name, lost in (
        (LIKE_OPTIONS, "options (a list or an object by letter), or A, B, ...", not has_options),
        (LIKE_PICTURES, "image", True),
    ):
        if lost and (found := [key for key in keys if looks.fullmatch(key) and not isinstance(row[key], int)]):
            raise SampleError(
                "field_unknown", f"nothing reads {', '.join(map(repr, found))!s:.80}; name it {name}, or remove it"
            )
    return keys


def read_options(row: JsonRow) -> tuple[dict[str, str], dict[str, str]]:
    """From "options" or "choices" (a list, or an object by letter), or from columns A, B, ....

    Returns:
        text by letter, and letter by the key that the row itself gives an option.

    Raises:
        SampleError: options, field_type.
    """
    given = {key: row[key] for key in OPTION_KEYS if not is_missing(row.get(key)) and row[key] not in ([], {})}
    if len(given) > 1 and len({json.dumps(value, sort_keys=True, default=str) for value in given.values()}) > 1:
        raise SampleError("options", f"found {given!r:.200}, expected options or choices; keep one of them")
    columns = {letter: row[letter] for letter in LETTERS if not is_missing(row.get(letter))}
    if given and columns:
        raise SampleError("options", f"found {next(iter(given))} beside {', '.join(columns)}; keep one of them")
    keyed = _keyed(next(iter(given.values()))) if given else columns
    names = [str(key).strip().upper() for key in keyed]
    # Keys 0, 1, 2 or 1, 2, 3 number the options; anything else must be letters already.
    if all(name.isdecimal() for name in names) and [int(name) for name in names] in _runs(len(names)):
        letters = list(LETTERS[: len(names)])
    else:
        letters = names
    if odd := [letter for letter in letters if letter not in LETTERS or len(letter) != 1]:
        raise SampleError("options", f"found the letters {', '.join(odd)!r:.80}, expected A to Z")
    if len(set(letters)) < len(letters):
        raise SampleError("options", f"found the letters {', '.join(letters)}, expected each of them once")
    found = {
        letter: "" if is_missing(value) else _one_text(value)
        for letter, value in zip(letters, keyed.values(), strict=True)
    }
    options = {letter: text for letter, text in found.items() if text}
    return options, {name: letter for name, letter in zip(names, letters, strict=True) if letter in options and given}


def read_letter(answer: object, options: Mapping[str, str], keys: Mapping[str, str]) -> tuple[str, bool]:
    """The letter of the right option, which the row gives as letter, text, key or index from 0; and whether as index.

    Args:
        answer: as the row has it.
        keys: letter by the row's own key.

    Raises:
        SampleError: options; it names no option, or could name two.
    """
    given = [text.strip() for text in texts(answer)]
    shown = f"options {', '.join(options)} and answer {', '.join(given)!r:.80}"
    if len(options) < 2 or len(given) != 1:
        raise SampleError("options", f"found {shown}, expected two or more, and the letter of one")
    (text,) = given
    if (letter := lone_letter(text, options).value) is not None:
        return letter, False
    # The option's exact words first: normalise would make "10" and "ten" one.
    named = {letter for letter, words in options.items() if words == text}
    named = named or {letter for letter, words in options.items() if normalise(words) == normalise(text)}
    index = re.fullmatch(r"\d{1,2}(?:\.0)?", text)
    # An index is read by the row's own numbering where it has one; otherwise it counts from 0.
    if index and not named and keys.get(text):
        return keys[text], False
    places = {
        letter for place, letter in enumerate(LETTERS) if index and letter in options and place == int(float(text))
    }
    if len(named | places) != 1:
        expected = "the letter, the text or the index (from 0) of one"
        raise SampleError(
            "options", f"found {shown}, expected {expected}" + ("; give the letter" if named | places else "")
        )
    return (named | places).pop(), not named


def _keyed(given: object) -> dict[str, Any]:
    """Options by letter, or by the keys that they have."""
    if isinstance(given, str):
        given = _literal(given)
    if isinstance(given, list):
        if len(given) > len(LETTERS):
            raise SampleError("options", f"found {len(given)} options, expected at most {len(LETTERS)}")
        return dict(zip(LETTERS, given, strict=False))
    if isinstance(given, dict) and given.keys() == {"text", "label"}:  # two lists, as in ARC
        labels, words = given["label"], given["text"]
        if not isinstance(labels, list) or not isinstance(words, list) or len(labels) != len(words):
            raise SampleError("options", f"found {given!r:.80}, expected as many labels as texts")
        if len(set(map(str, labels))) < len(labels):
            raise SampleError("options", f"found the labels {labels!r:.80}, expected each of them once")
        return dict(zip(map(str, labels), words, strict=True))
    if isinstance(given, dict):
        return given
    raise SampleError("options", f"found {given!r:.80}, expected a list or an object of options")


def _one_text(value: object) -> str:
    found = texts(value)
    if len(found) != 1 or isinstance(value, list):
        raise SampleError("options", f"found {value!r:.80}, expected the text of one option")
    return found[0].strip()


def _runs(length: int) -> tuple[list[int], list[int]]:
    return list(range(length)), list(range(1, length + 1))


def _literal(cell: str) -> Any:
    """Parses a literal in a cell; None if it is none. Literals only: nothing is called or looked up."""
    if len(cell) > MAX_LIST:
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(cell)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
    return None
