"""Data sets to Samples, by random access: a compact index in memory, every row read from disk when it is asked for.

In: SourceConfig   Out: Sample   Next: rows.py (what a row means), decode.py, chat.py
Formats: LLaVA JSON (a list), JSONL, WebDataset tar shards (shards.py). A row that cannot be used raises SampleError
when it is read, with a reason of rows.py or shards.py, or duplicate_id.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sicog_mcore.config import DataConfig, SourceConfig
from sicog_mcore.data.pairs import build_pair
from sicog_mcore.data.preflight import SHARD, check_source, is_lines
from sicog_mcore.data.quarantine import Rejection
from sicog_mcore.data.row_keys import PAIR_KEYS, ROW_KEYS
from sicog_mcore.data.row_spans import ListMalformed, find_elements, find_lines, read_latin
from sicog_mcore.data.row_survey import RowSurvey, escaped
from sicog_mcore.data.rows import (
    BuildSample,
    Hashes,
    RowHashes,
    RowIds,
    build_sample,
    default_id,
    locate_images,
    parse_row,
    read_range,
)
from sicog_mcore.data.sample import Sample
from sicog_mcore.data.shards import ShardDamaged, index_shard
from sicog_mcore.errors import ConfigError, ConfigProblem, SampleError

MAX_SUFFIX_CHARS = 20  # as shown in notes


class Source(Protocol):
    """One data set. Picklable, and safe to read from several threads: files are opened for each read."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> Sample:
        """Raises SampleError if the row cannot be used."""
        ...

    def origin(self, row: int) -> str:
        """``file:line`` or ``shard.tar:key`` of a row."""
        ...


class RowFault(NamedTuple):
    """Why a row cannot be used: its id as far as it is known, and what a SampleError says."""

    id: str | None
    reason: str
    detail: str


@runtime_checkable
class MeasuredSource(Source, Protocol):
    """A Source from an index, which knows what its rows measure, and its bad rows."""

    def measures(self, row: int) -> tuple[int, int]:
        """Tells the tokens and slices that a row had when it was indexed."""
        ...

    def fault(self, row: int) -> RowFault | None:
        """Says why a row was found bad; None if it was not."""
        ...


class SampleIndex:
    """All sources as one sequence of rows.

    Args:
        sources: data sets, in order.
        id_hashes: uint64 [rows] of each source: hash of every row's id.
        duplicate_ids: what becomes of the second and later rows with an id: "quarantine" or "keep" as "<id>#<row>".
        notes: what is to be said of the data before the start.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        id_hashes: Sequence[Hashes],
        duplicate_ids: Literal["quarantine", "keep"],
        notes: Sequence[str] = (),
    ) -> None:
        self._sources = tuple(sources)
        self._borders = np.cumsum([0, *(len(source) for source in sources)], dtype=np.int64)
        self._duplicate_ids = duplicate_ids
        hashes = np.concatenate([np.empty(0, np.uint64), *id_hashes])
        _, first, which = np.unique(hashes, return_index=True, return_inverse=True)
        first_of_row = first[which]
        self._repeated = np.flatnonzero(first_of_row != np.arange(len(hashes)))  # ascending rows
        self._repeats = first_of_row[self._repeated]  # the earlier row with the same id, for each of them
        self.notes = (*self._repetition_notes(), *notes)

    def __len__(self) -> int:
        return int(self._borders[-1])

    def read(self, row: int) -> Sample:
        """One row, parsed and checked; its images are not opened.

        Raises:
            SampleError: the row cannot be used.
        """
        source, local = self._locate(row)
        earlier = self._earlier_with_same_id(row)
        if earlier is None:
            return source.read(local)
        if self._duplicate_ids == "quarantine":
            fault = self._repetition(earlier)
            raise SampleError(fault.reason, fault.detail)
        sample = source.read(local)
        return replace(sample, id=f"{sample.id}#{row}")

    def measures(self, row: int) -> tuple[int, int] | None:
        """Tells the tokens and slices that a row had when it was indexed; None without an index. No file of rows is read."""
        source, local = self._locate(row)
        return source.measures(local) if isinstance(source, MeasuredSource) else None

    @property
    def repeated(self) -> NDArray[np.int64]:
        """Rows that have the id of an earlier one, ascending."""
        return self._repeated

    def rejection(self, row: int, epoch: int) -> Rejection:
        """Says why a row cannot be used that was found bad when it was indexed; no file of rows is read.

        Args:
            row: of all data sets.
            epoch: pass over the data in which it was met.
        """
        source, local = self._locate(row)
        earlier = self._earlier_with_same_id(row)
        if earlier is not None and self._duplicate_ids == "quarantine":
            fault: RowFault | None = self._repetition(earlier)
        else:
            fault = source.fault(local) if isinstance(source, MeasuredSource) else None
        assert fault is not None, f"row {row} was found to be usable"
        known = fault.id if fault.id is None or earlier is None else f"{fault.id}#{row}"
        return Rejection(known or f"row {row}", self.origin(row), fault.reason, fault.detail, epoch)

    def _repetition(self, earlier: int) -> RowFault:
        remedy = "ids must be unique; rename it or set data.duplicate_ids=keep"
        return RowFault(None, "duplicate_id", f"{self.origin(earlier)} has this id already, {remedy}")

    def origin(self, row: int) -> str:
        """``file:line`` or ``shard.tar:key`` of a row."""
        source, local = self._locate(row)
        return source.origin(local)

    def _repetition_notes(self) -> list[str]:
        """Whether rows are about to be left out because their ids are not their own."""
        number = len(self._repeated)
        if not number or self._duplicate_ids == "keep":
            return []
        second, first = (escaped(self.origin(int(row))) for row in (self._repeated[0], self._repeats[0]))
        return [
            f"refused: {number:,} of {len(self):,} rows ({number / len(self):.1%}) repeat the id of an earlier row, first"
            f" {second} that of {first}; set data.duplicate_ids=keep to train on them under new ids"
        ]

    def _locate(self, row: int) -> tuple[Source, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        at = int(np.searchsorted(self._borders, row, side="right")) - 1
        return self._sources[at], row - int(self._borders[at])

    def _earlier_with_same_id(self, row: int) -> int | None:
        at = int(np.searchsorted(self._repeated, row))
        found = at < len(self._repeated) and self._repeated[at] == row
        return int(self._repeats[at]) if found else None


class IndexedFile(NamedTuple):
    """A file of rows, indexed in one pass, and what its rows are recognised by."""

    path: str
    source: Source
    hashes: RowHashes


def open_sources(configs: Sequence[SourceConfig], data: DataConfig, build: BuildSample = build_sample) -> SampleIndex:
    """Indexes all data sets and joins them.

    Args:
        configs: data sets, in order.
        data: ``duplicate_ids`` is used.
        build: gives a row its meaning: rows.build_sample, or pairs.build_pair.

    Raises:
        ConfigError: as ``index_sources``.
    """
    survey = new_survey(build)
    files = index_sources(configs, survey, build)
    ids = [file.hashes.ids for file in files]
    return SampleIndex([file.source for file in files], ids, data.duplicate_ids, survey.notes())


def new_survey(build: BuildSample) -> RowSurvey:
    """Nothing counted yet, of rows that mean what ``build`` makes of them."""
    return RowSurvey(PAIR_KEYS if build is build_pair else ROW_KEYS)


def index_sources(
    configs: Sequence[SourceConfig], survey: RowSurvey, build: BuildSample = build_sample
) -> list[IndexedFile]:
    """Finds the rows of all data sets, file by file; every file is read once.

    Args:
        configs: data sets, in order.
        survey: counts what of the rows is not used.
        build: gives a row its meaning.

    Raises:
        ConfigError: paths that do not exist or have no known format, JSON files that are no list, shards that are cut
            off; all of them at once.
    """
    found, problems = list_files(configs, survey)
    files: list[IndexedFile] = []
    for file in found:
        try:
            source, hashes = _index_file(file, build, survey)
        except FILE_ERRORS as error:
            problems.append(file_problem(file, error))
            continue
        files.append(IndexedFile(str(file.path), source, hashes))
    if problems:
        raise ConfigError(problems)
    return files


class DataFile(NamedTuple):
    """A file of rows before it is read.

    Attributes:
        number: of the source that it belongs to.
        path: the file.
        images: folder that image paths are relative to, as configured.
        name: what default ids start with.
        kind: "shard", "lines" or "list".
    """

    number: int
    path: Path
    images: str
    name: str
    kind: Literal["shard", "lines", "list"]


FIXES: Mapping[type[Exception], str] = {
    ListMalformed: "repair the file, or write one row per line into a .jsonl file, where a broken row costs only itself",
    ShardDamaged: "write the shard again, or move it out of the way: what is lost with it cannot be counted",
}
FILE_ERRORS: tuple[type[Exception], ...] = (OSError, *FIXES)


def file_problem(file: DataFile, error: Exception) -> ConfigProblem:
    """Describes the error, one of FILE_ERRORS, that keeps a file from being opened."""
    fix = FIXES.get(type(error), "make it readable for this user")
    return ConfigProblem(f"data.sources[{file.number}].path", str(file.path), str(error), fix)


def list_files(configs: Sequence[SourceConfig], survey: RowSurvey) -> tuple[list[DataFile], list[ConfigProblem]]:
    """The files of all data sets, in order, and what keeps data sets from being opened; no row is read.

    Args:
        configs: data sets, in order.
        survey: counts what of the folders is not used.
    """
    problems: list[ConfigProblem] = []
    files: list[DataFile] = []
    names: set[str] = set()
    for number, config in enumerate(configs):
        found = check_source(number, config)
        problems += found
        for path in [] if found else _files(config, survey):
            # Default ids start with the file's name, which must therefore be unique.
            name = path.stem if path.stem not in names else f"{path.stem}.{len(files)}"
            names.add(name)
            try:
                files.append(DataFile(number, path, config.images, name, _kind(path, survey)))
            except OSError as error:
                problems.append(file_problem(DataFile(number, path, config.images, name, "list"), error))
    return files, problems


def _kind(path: Path, survey: RowSurvey) -> Literal["shard", "lines", "list"]:
    if path.suffix == SHARD:
        return "shard"
    if path.suffix == ".jsonl":
        return "lines"
    if not is_lines(path):
        return "list"
    survey.remark("read as one row per line (.jsonl), which it is", str(path), 1, "file")
    return "lines"


def _files(config: SourceConfig, survey: RowSurvey) -> list[Path]:
    """The files of a source: itself, or the shards in a folder, by name; what else is in the folder is counted."""
    path = Path(config.path)
    if not path.is_dir():
        return [path]
    for other in sorted(path.iterdir()):
        if other.suffix != SHARD and not other.name.startswith("."):
            what = "folders" if other.is_dir() else f"files {''.join(other.suffixes)[-MAX_SUFFIX_CHARS:]!r}"
            survey.remark(f"{what} beside the shards are not read", str(path), other.name, "entry")
    return sorted(path.glob(f"*{SHARD}"))


def _index_file(file: DataFile, build: BuildSample, survey: RowSurvey) -> tuple[Source, RowHashes]:
    if file.kind == "shard":
        shard, ids = index_shard(file.path, file.name, survey, build)
        return shard, ids.hashes()
    ids = RowIds(file.name, str(file.path), survey)
    spans = _index_lines(file.path, ids) if file.kind == "lines" else _index_list(file.path, ids)
    table = np.frombuffer(spans, np.int64).reshape(-1, 3)
    return RowFile(str(file.path), os.path.realpath(file.images), file.name, table, build), ids.hashes()


@dataclass(frozen=True)
class RowFile:
    """A JSON list or a JSONL file of LLaVA rows.

    Attributes:
        path: the file.
        images: real path of the folder that image paths are relative to.
        name: what default ids start with.
        spans: int64 [rows, 3]: offset (bytes), length (bytes) and line number of each row.
        build: gives a row its meaning.
    """

    path: str
    images: str
    name: str
    spans: NDArray[np.int64]
    build: BuildSample

    def __len__(self) -> int:
        return len(self.spans)

    def origin(self, row: int) -> str:
        return f"{self.path}:{self.spans[row, 2]}"

    def read(self, row: int) -> Sample:
        offset, length, _ = self.spans[row].tolist()
        fields = parse_row(read_range(self.path, offset, length))
        return self.build(fields, locate_images(fields, self.images), default_id(self.name, row), self.origin(row))


def _index_lines(path: Path, ids: RowIds) -> array[int]:
    """Finds the rows of a JSONL file."""
    spans = array("q")
    with open(path, "rb") as file:
        for line in find_lines(file):
            spans.extend((line.offset, line.length, line.number))
            ids.add_encoded(line.raw, line.number)
            ids.add_content(line.start.strip())
    return spans


def _index_list(path: Path, ids: RowIds) -> array[int]:
    """Finds the rows of a JSON list."""
    spans = array("q")
    for row in find_elements(read_latin(path)):
        spans.extend((row.offset, row.length, row.number))
        if row.raw.isascii():
            ids.add(row.value, row.number)
        else:
            ids.add_encoded(row.raw, row.number)
        ids.add_content(row.raw)
    return spans
