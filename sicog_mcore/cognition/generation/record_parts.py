"""Records that survive whatever happens to the run that makes them: one append-only file per writer, merged at the end.

In: Generation per item, in any order   Out: ``parts/*.jsonl``, then one file in the order of the items
A record is on disk before the next one is begun. A header says what the records depend on; whoever goes on must depend on
the same, or is refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from sicog_mcore.cognition.records import Generation, from_json, to_json, write_records
from sicog_mcore.errors import RecordError
from sicog_mcore.files import LineFile, cut_torn_line, whole_file

FOLDER = "parts"
HEADER = "header.json"
SUFFIX = ".jsonl"

Header = Mapping[str, Any]  # JSON values by name


@dataclass(frozen=True)
class _ByteRange:
    path: Path
    offset: int
    length: int


class PartWriter:
    """Appends records to a file of its own; use it as a context."""

    def __init__(self, folder: Path, name: str):
        self._file = LineFile(folder / FOLDER / f"{name}{SUFFIX}")

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def commit(self, record: Generation) -> None:
        """Returns when the record is on disk.

        Raises:
            MachineError: the disk is full or broken; half a line that is left is cut off by ``open_parts``.
        """
        self._file.append(to_json(record), is_synced=True)


def open_parts(folder: Path, header: Header) -> frozenset[str]:
    """Prepares a folder for this run. To be called by one process, before anybody writes.

    Half-written last lines of a run that was killed are cut off.

    Returns:
        ids of the items that are done.

    Raises:
        RecordError: records are there that depend on something else.
    """
    parts = folder / FOLDER
    path = parts / HEADER
    if path.is_file():
        _require_same(_read_header(path), json.loads(json.dumps(header)), folder)
    elif parts.is_dir() and any(parts.glob(f"*{SUFFIX}")):
        raise RecordError(f"{parts} holds records without {HEADER}; choose another --out, or remove {parts}")
    else:
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(header, indent=1, ensure_ascii=False), encoding="utf-8")
    for part in parts.glob(f"*{SUFFIX}"):
        cut_torn_line(part)
    return frozenset(_index(parts))


def merge_parts(folder: Path, ids: Sequence[str], target: Path, failures: Counter[str] | None = None) -> int:
    """Writes the records of these items, in this order, by one rename. Returns their number.

    Args:
        failures: counts the records by their failure; the empty one stands for answered items.

    Raises:
        RecordError: an item has no record.
    """
    ranges = _index(folder / FOLDER)
    missing = [name for name in ids if name not in ranges]
    if missing:
        raise RecordError(f"{folder / FOLDER} lacks {len(missing)} items, e.g. {missing[0]!r}; run the command again")
    counts: Counter[str] = Counter() if failures is None else failures

    def records() -> Iterator[Generation]:
        for name in ids:
            record = _read(ranges[name])
            counts[record.failure] += 1
            yield record

    return write_records(target, records())


def _read_header(path: Path) -> dict[str, Any]:
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordError(f"{path} is damaged ({error}); remove {path.parent} to start anew") from error
    return header if isinstance(header, dict) else {}


def _require_same(found: Header, wanted: Header, folder: Path) -> None:
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if names:
        listed = "\n".join(f"  - {name}: {found.get(name)} -> {wanted.get(name)}" for name in names)
        raise RecordError(
            f"{folder} holds records made with other inputs; restore these, choose another --out, or remove "
            f"{folder / FOLDER}:\n{listed}"
        )


def _index(parts: Path) -> dict[str, _ByteRange]:
    """Where each item's record stands; the first counts."""
    ranges: dict[str, _ByteRange] = {}
    for path in sorted(parts.glob(f"*{SUFFIX}")):
        for number, (offset, line) in enumerate(_lines(path), 1):
            try:
                name = json.loads(line)["id"]
            except (ValueError, KeyError, TypeError) as error:
                raise RecordError(f"{path}:{number}: not a record ({error}); remove the line") from error
            ranges.setdefault(name, _ByteRange(path, offset, len(line)))
    return ranges


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    offset = 0
    with path.open("rb") as file:
        for line in file:
            yield offset, line
            offset += len(line)


def _read(byte_range: _ByteRange) -> Generation:
    with byte_range.path.open("rb") as file:
        file.seek(byte_range.offset)
        return from_json(file.read(byte_range.length), Generation, f"{byte_range.path} at byte {byte_range.offset}")
