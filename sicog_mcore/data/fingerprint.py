"""Is the data what it was? What a place in the stream of packs depends on, in a few numbers that a checkpoint holds.

In: indexed files, Experiment   Out: DataFingerprint, what changed in words   Next: resume.py, train/reference_key.py
Covered: the bytes of every row, texts, names and sizes of a shard's members, the tokenizer file, every setting that decides
which rows are packed together. Not covered: pixels, that is image files and the image members of shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from sicog_mcore.config import DataConfig, Experiment
from sicog_mcore.data.chat import TEMPLATES
from sicog_mcore.data.rows import Hashes
from sicog_mcore.data.sources import IndexedFile
from sicog_mcore.data.tokenizer import find_tokenizer_file
from sicog_mcore.files import hash_bytes, hash_file

# Fields of DataConfig that move no row to another pack. The tokenizer and the sources count by their content.
HARMLESS = (
    *("sources", "tokenizer", "workers", "worker_timeout_s", "on_change", "max_bad_rate", "bad_window"),
    *("index", "index_limit_s"),
)
ORDER = "version of the order of packs"
ORDER_VERSION = 2  # to be raised whenever the same rows and settings give another order; 1 was never written down
STEP_ROWS = "train.samples_per_step"
ORDER_SETTINGS = (ORDER, STEP_ROWS, "data.window_samples")  # these move rows inside an epoch, and do nothing else
TOKENIZER = "content of data.tokenizer"
SYSTEM_PROMPT = "data.system_prompt"


class FileFingerprint(NamedTuple):
    """The fingerprint that recognises a file of rows, whatever its path.

    Attributes:
        path: as it was configured, for messages.
        rows: number of rows.
        ordered: hash of the rows in their order.
        unordered: sum of the rows' hashes, equal for the same rows in another order.
    """

    path: str
    rows: int
    ordered: str
    unordered: str


@dataclass(frozen=True)
class DataFingerprint:
    """The fingerprint of the data and settings that a position in the stream of packs depends on.

    Attributes:
        settings: values by name.
        files: of all sources, in order.
    """

    settings: Mapping[str, Any]
    files: tuple[FileFingerprint, ...]

    @classmethod
    def of(cls, experiment: Experiment, files: Sequence[IndexedFile]) -> DataFingerprint:
        return cls(stream_settings(experiment), mark_files(files))


def stream_settings(experiment: Experiment) -> dict[str, Any]:
    """Every setting that decides which rows a pack holds, by name; values are what JSON has."""
    data, model = experiment.data, experiment.model
    settings = {f"data.{name}": value for name, value in asdict(data).items() if name not in HARMLESS}
    if not TEMPLATES[data.template].names_roles:
        settings[SYSTEM_PROMPT] = ""  # such a template writes none
    return {
        **settings,
        ORDER: ORDER_VERSION,
        STEP_ROWS: experiment.train.samples_per_step,
        TOKENIZER: tokenizer_digest(data.tokenizer),
        "train.seed": experiment.train.seed,
        "objective": experiment.objective,
        **{f"model.slicing.{name}": value for name, value in asdict(model.slicing).items()},
        "model.resampler.query_grid": model.resampler.query_grid,
        "model.tower.patch_px": model.tower.patch_px,
    }


def tokenizer_digest(path: str) -> str:
    """Hash of the tokenizer's file."""
    file = find_tokenizer_file(path)
    return hash_file(file) if file else ""


def mark_files(files: Iterable[IndexedFile]) -> tuple[FileFingerprint, ...]:
    """A mark per file; no file is read again."""
    return tuple(_mark(file.path, file.hashes.contents) for file in files)


def find_prefixes(marks: Sequence[FileFingerprint], files: Sequence[IndexedFile]) -> list[int] | None:
    """For each mark the file whose first rows it stands for, in the same order; None if there is no such choice."""
    found: list[int] = []
    start = 0
    for mark in marks:
        places = (i for i in range(start, len(files)) if _begins_with(files[i].hashes.contents, mark))
        place = next(places, None)
        if place is None:
            return None
        found.append(place)
        start = place + 1
    return found


def describe_settings(old: Mapping[str, Any], new: Mapping[str, Any], free: Sequence[str] = ()) -> list[str]:
    """One line for each setting that differs and is not ``free``. One that an older version did not have had its default."""
    defaults = {f"data.{name}": value for name, value in asdict(DataConfig()).items()} | {ORDER: 1, STEP_ROWS: 0}
    return [
        f"{name}: {before!r} -> {value!r}"
        for name, value in new.items()
        if name not in free and (before := old.get(name, defaults.get(name))) != value
    ]


def describe_appended(
    old: Sequence[FileFingerprint], places: Sequence[int], new: Sequence[FileFingerprint]
) -> list[str]:
    """One line for each file that has become longer, or is new."""
    before = dict(zip(places, old, strict=True))
    lines = []
    for place, mark in enumerate(new):
        if place not in before and mark.rows:
            lines.append(f"{mark.path} is new, with {mark.rows:,} rows")
        elif place in before and mark.rows > before[place].rows:
            lines.append(f"{mark.path} has {mark.rows:,} rows instead of {before[place].rows:,}")
    return lines


def describe_files(old: Sequence[FileFingerprint], files: Sequence[IndexedFile]) -> list[str]:
    """Describes how the files changed; empty if they are the same in the same order."""
    new = mark_files(files)
    if [_content(mark) for mark in old] == [_content(mark) for mark in new]:
        return []
    if Counter(map(_content, old)) == Counter(map(_content, new)):
        before, now = (", ".join(mark.path for mark in marks) for marks in (old, new))
        return [f"the data sets are in another order: {before} -> {now}"]
    partner = _pair(old, new)
    lines = []
    for place, mark in enumerate(old):
        if place not in partner:
            lines.append(f"{mark.path} with {mark.rows:,} rows is gone")
        elif words := _difference(mark, files[partner[place]].hashes.contents):
            lines.append(f"{new[partner[place]].path}: {words}")
    taken = set(partner.values())
    return lines + [f"{mark.path} is new, with {mark.rows:,} rows" for i, mark in enumerate(new) if i not in taken]


def _mark(path: str, contents: Hashes) -> FileFingerprint:
    ordered = hash_bytes(np.ascontiguousarray(contents, dtype="<u8").tobytes())
    return FileFingerprint(path, len(contents), ordered, f"{int(contents.sum(dtype=np.uint64)):016x}")


def _content(mark: FileFingerprint) -> tuple[int, str]:
    return mark.rows, mark.ordered


def _begins_with(contents: Hashes, mark: FileFingerprint) -> bool:
    return len(contents) >= mark.rows and _mark("", contents[: mark.rows]).ordered == mark.ordered


def _pair(old: Sequence[FileFingerprint], new: Sequence[FileFingerprint]) -> dict[int, int]:
    """Which new file an old one has become: the one with its content, or else its path, or else its place."""
    partner: dict[int, int] = {}
    for key in (_content, lambda mark: mark.path):
        for place, mark in enumerate(old):
            free = (i for i in range(len(new)) if i not in partner.values() and key(new[i]) == key(mark))
            if place not in partner and (found := next(free, None)) is not None:
                partner[place] = found
    if len(old) == len(new):
        rest = [i for i in range(len(new)) if i not in partner.values()]
        partner |= dict(zip((i for i in range(len(old)) if i not in partner), rest, strict=True))
    return partner


def _difference(old: FileFingerprint, contents: Hashes) -> str:
    """How a file's rows differ from what they were; empty if they do not."""
    found = len(contents)
    if found < old.rows:
        return f"{old.rows - found:,} of its {old.rows:,} rows are gone, or more of them and others are new"
    first = _mark("", contents[: old.rows])
    more = f"; {found - old.rows:,} more follow" if found > old.rows else ""
    if first.ordered == old.ordered:
        return f"{found - old.rows:,} rows were appended to its {old.rows:,}" if more else ""
    if first.unordered == old.unordered:
        return f"its {old.rows:,} rows are in another order{more}"
    if more:
        return f"it has {found:,} rows instead of {old.rows:,}, and the first {old.rows:,} are not the same any more"
    return f"rows were edited: it still has {found:,}, but with other content"
