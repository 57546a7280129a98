"""Surveys the rows of all data sets while they are indexed, and gives notes before the run starts.

In: every parsed row, every member of a shard   Out: a few lines of notes   Next: sources.py (SampleIndex.notes)
Texts of the data stand in the notes as ``repr`` writes them: no control sequence reaches a terminal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

from sicog_mcore.data.row_keys import (
    IGNORED,
    IGNORED_IN_TURNS,
    LLAVA_TURN,
    MAX_KEY_CHARS,
    MESSAGE_TURN,
    TURN_KEYS,
    WEIGHT,
    changed_weight,
    did_you_mean,
    is_empty,
    row_faults,
    shown_keys,
    suggestion,
    turn_faults,
    unused_keys,
)

MAX_DISTINCT = 1000  # things that are counted by name; further ones are counted together
MAX_NOTES = 6  # of each kind: refusals, remarks, keys that are not used
MAX_PLACE_CHARS = 300
STORED = ("text", "place", "unit", "number")  # of a count, in an index
UNITS: Mapping[str, str] = {
    "row": "rows",
    "sample": "samples",
    "member": "members",
    "file": "files",
    "shard": "shards",
    "entry": "entries",
}


@dataclass
class Count:
    """The number of times that something occurred, and its first place: a file, and a line, key or entry in it."""

    text: str
    path: str
    place: int | str
    unit: str
    number: int

    def __str__(self) -> str:
        units = self.unit if self.number == 1 else UNITS[self.unit]
        return f"{self.text}: {self.number:,} {units}, first at {escaped(f'{self.path}:{self.place}')}"


class NameCounts:
    """Occurrences by name; memory is bounded however many names there are."""

    def __init__(self, others: str) -> None:
        self._others = others
        self._counts: dict[str, Count] = {}

    def again(self, name: str) -> bool:
        """Counts a further occurrence; says whether it is one."""
        if count := self._counts.get(name):
            count.number += 1
        return count is not None

    def add(self, name: str, text: str, path: str, place: int | str, unit: str = "row", number: int = 1) -> None:
        """Counts an occurrence, or as many as ``number`` says.

        Args:
            name: what it is counted under.
            text: what the note says of it.
            path: file that holds the row.
            place: line, or key of the sample in a shard.
            unit: what is counted.
        """
        if len(self._counts) >= MAX_DISTINCT:
            # Keys come from the data, so that there may be as many as rows: further ones share one count.
            name = text = self._others
        if count := self._counts.get(name):
            count.number += number
        else:
            shown = place[-MAX_PLACE_CHARS - 1 :] if isinstance(place, str) else place  # as much as ``escaped`` shows
            self._counts[name] = Count(text, path, shown, unit, number)

    def state(self) -> list[list[Any]]:
        """The counts as JSON has them, in the order in which they began."""
        return [[name, *(getattr(count, part) for part in STORED)] for name, count in self._counts.items()]

    def merge(self, state: Sequence[Sequence[Any]], path: str, line: int) -> None:
        """Adds the counts of a part of a file.

        Args:
            state: of ``state``, where line numbers count from the beginning of the part.
            path: the file.
            line: number of the part's first line.
        """
        for name, text, place, unit, number in state:
            self.add(name, text, path, place + line - 1 if isinstance(place, int) else place, unit, number)

    def notes(self) -> Iterator[str]:
        """Gives notes on the most frequent names; the rest are one note with their number."""
        counts = sorted(self._counts.values(), key=lambda count: -count.number)
        shown = counts if len(counts) <= MAX_NOTES else counts[: MAX_NOTES - 1]
        yield from map(str, shown)
        if rest := counts[len(shown) :]:
            yield f"{len(rest):,} more of this kind, the most frequent of them: {rest[0]}"


class WeightRange:
    """The rows that name a weight for their losses: how many, the least and the greatest weight, and the first row."""

    def __init__(self) -> None:
        self._rows = 0
        self._least, self._most = float("inf"), 0.0
        self._path, self._first = "", cast(int | str, 0)

    def add(self, least: float, most: float, path: str, place: int | str, rows: int = 1) -> None:
        """Counts a row, or as many as ``rows`` says, with weights from ``least`` to ``most``."""
        if not self._rows:
            self._path, self._first = path, place
        self._rows += rows
        self._least, self._most = min(self._least, least), max(self._most, most)

    def state(self) -> list[list[Any]]:
        """The range as JSON has it: one entry, or none where no row names a weight."""
        return [[self._least, self._most, self._first, self._rows]] if self._rows else []

    def merge(self, state: Sequence[Sequence[Any]], path: str, line: int) -> None:
        """Adds the rows of a part of a file, see ``NameCounts.merge``."""
        for least, most, place, rows in state:
            self.add(least, most, path, place + line - 1 if isinstance(place, int) else place, rows)

    def notes(self) -> Iterator[str]:
        """Gives the note for the user, if any row names a weight."""
        if self._rows:
            text = f"losses are multiplied by the row's key {WEIGHT!r}, from {self._least:g} to {self._most:g}"
            yield str(Count(text, self._path, self._first, "row", self._rows))


class RowSurvey:
    """Counts what is not used and what is refused, over all files.

    Args:
        used: keys of a row that have a meaning in this run.
    """

    def __init__(self, used: frozenset[str]) -> None:
        self._used = used
        self._plain = used | IGNORED
        self._refused = NameCounts("other keys for which rows are refused")
        self._unused = NameCounts("other keys are not used")
        self._remarks = NameCounts("other remarks")
        self._weights = WeightRange()
        self._lacks: dict[str, str] = {}  # by missing key and keys of the row; looking for a suggestion takes its time

    def add_row(self, row: dict[str, Any], num_images: int, path: str, place: int | str) -> None:
        """Counts the keys of a row and of its turns, each once."""
        refused, unused = self._of_row(row, num_images)
        for name in ("conversations", "chosen", "rejected"):
            turns = row.get(name)
            for turn in turns if isinstance(turns, list) else [turns]:
                if isinstance(turn, dict) and turn.keys() != LLAVA_TURN and turn.keys() != MESSAGE_TURN:
                    _add_turn(turn, refused, unused)
        if (weight := changed_weight(row, self._used)) is not None:
            self._weights.add(weight, weight, path, place)
        for found, counts in ((refused, self._refused), (unused, self._unused)):
            for key, text in found.items():
                # The note is only worded for the first row: looking for a similar name takes its time.
                if not counts.again(key):
                    counts.add(key, text or self._not_used(key), path, place)

    def remark(self, text: str, path: str, place: int | str, unit: str = "sample") -> None:
        """Counts one sample, or another unit, of which ``text`` is true; data stand in the text as repr writes them."""
        if not self._remarks.again(text):
            self._remarks.add(text, text, path, place, unit)

    def state(self) -> list[list[list[Any]]]:
        """All counts as JSON has them; ``merge`` takes them."""
        return [counts.state() for counts in self._parts()]

    def merge(self, state: Sequence[Sequence[Sequence[Any]]], path: str, line: int = 1) -> None:
        """Adds what was counted in a part of a file, see ``NameCounts.merge``."""
        for counts, part in zip(self._parts(), state, strict=True):
            counts.merge(part, path, line)

    def notes(self) -> list[str]:
        """Gives the notes for the user; empty if every key is used in the usual way or known not to matter."""
        return [*self._weights.notes(), *self._refused.notes(), *self._remarks.notes(), *self._unused.notes()]

    def _parts(self) -> tuple[NameCounts | WeightRange, ...]:
        return self._refused, self._unused, self._remarks, self._weights

    def _of_row(self, row: dict[str, Any], num_images: int) -> tuple[dict[str, str], dict[str, str]]:
        """Sorts a row's own keys into those that are refused and those that are not used, with their texts."""
        texts = [self._lack(row, key) for key in self._missing(row)]
        refused = dict(zip(texts, texts, strict=True))
        if row.keys() <= self._plain:
            return refused, {}
        faults = row_faults(row, self._used, num_images)
        refused |= {fault.key: f"refused: {fault.detail}" for fault in faults}
        keys = (key[:MAX_KEY_CHARS] for key in unused_keys(row, self._used, num_images > 0))
        names = islice((key for key in keys if key not in refused), MAX_DISTINCT)
        return refused, dict.fromkeys(names, "")

    def _not_used(self, key: str) -> str:
        return f"key {key!r} is not used{did_you_mean(key, self._used)}"

    def _lack(self, row: dict[str, Any], key: str) -> str:
        # Rows with the same keys lack the same key for the same reason, and files mostly have one set of keys.
        looks = f"{key} {shown_keys(row)}"
        if looks not in self._lacks:
            if len(self._lacks) >= MAX_DISTINCT:
                return f"refused: no key {key!r}"
            self._lacks[looks] = f"refused: no key {key!r}{suggestion(row, key)}"
        return self._lacks[looks]

    def _missing(self, row: dict[str, Any]) -> list[str]:
        """Keys without which a row says nothing."""
        if "rejected" not in self._used:
            return [key for key in ("conversations",) if key not in row]
        wanted = [key for key in ("chosen", "rejected") if key not in row]
        return wanted if "prompt" in row or "conversations" in row else ["conversations", *wanted]


def _add_turn(turn: dict[str, Any], refused: dict[str, str], unused: dict[str, str]) -> None:
    is_answer = turn.get("from", turn.get("role")) in ("gpt", "assistant")
    for fault in turn_faults(turn, is_answer):
        refused.setdefault(f"turn {fault.key}", f"refused: {fault.detail}")
    for key, value in turn.items():
        name = f"turn {key[:MAX_KEY_CHARS]}"
        if key in TURN_KEYS or key in IGNORED_IN_TURNS or is_empty(value) or name in refused:
            continue
        if len(unused) < MAX_DISTINCT:
            unused.setdefault(name, f"key {key[:MAX_KEY_CHARS]!r} of turns is not used")


def escaped(text: str) -> str:
    """A place in the data as one printable line of bounded length."""
    cut = text if len(text) <= MAX_PLACE_CHARS else f"...{text[-MAX_PLACE_CHARS:]}"
    return repr(cut)[1:-1]
