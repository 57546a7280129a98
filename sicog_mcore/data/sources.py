"""Data sets to Samples, by random access: a compact index in memory, every row read from disk when it is asked for.

In: SourceConfig   Out: Sample   Next: rows.py (what a row means), decode.py, chat.py
Formats: LLaVA JSON (a list), JSONL, WebDataset tar shards (shards.py). A row that cannot be used raises SampleError
when it is read, with a reason of rows.py or shards.py, or duplicate_id.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from sicog_mcore.config import DataConfig, SourceConfig
from sicog_mcore.data.pairs import build_pair
from sicog_mcore.data.preflight import SHARD, check_source, is_lines
from sicog_mcore.data.quarantine import Rejection
from sicog_mcore.data.row_keys import PAIR_KEYS, ROW_KEYS
from sicog_mcore.data.row_survey import RowSurvey, escaped
from sicog_mcore.data.rows import (
    MAX_ROW_BYTES,
    BuildSample,
    Hashes,
    RowHashes,
    RowIds,
    build_sample,
    default_id,
    image_paths,
    locate_image,
    parse_row,
    read_range,
)
from sicog_mcore.data.sample import Sample
from sicog_mcore.data.shards import ShardDamaged, index_shard
from sicog_mcore.errors import ConfigError, ConfigProblem, SampleError

MAX_SUFFIX_CHARS = 20  # as shown in notes
BOM = "\xef\xbb\xbf"  # UTF-8's byte order mark, read as Latin-1
JSON_SPACE = re.compile(r"[ \t\r\n]*")


class Source(Protocol):
    """One data set. Picklable, and safe to read from several threads: files are opened for each read."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> Sample:
        """Raises SampleError if the row cannot be used."""
        ...

    def origin(self, row: int) -> str:
        """``file:line`` or ``shard.tar:key`` of a row."""
        ...

    @property
    def is_shard(self) -> bool:
        """Whether its rows are read in one go, as those of a tar file are; otherwise in blocks."""
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
        self.faults: dict[int, tuple[str, str, str]] = {}  # by row: id, reason and detail, as far as they are known

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
            remedy = "ids must be unique; rename it or set data.duplicate_ids=keep"
            raise SampleError("duplicate_id", f"{self.origin(earlier)} has this id already, {remedy}")
        sample = source.read(local)
        return replace(sample, id=f"{sample.id}#{row}")

    def origin(self, row: int) -> str:
        """``file:line`` or ``shard.tar:key`` of a row."""
        source, local = self._locate(row)
        return source.origin(local)

    def rejection(self, row: int, epoch: int) -> Rejection:
        """Why a row that is known to be bad cannot be used; no file is opened.

        Args:
            epoch: pass over the data in which it was met.
        """
        sample_id, reason, detail = self.faults[row]
        return Rejection(sample_id, self.origin(row), reason, detail, epoch)

    def shards(self, block_rows: int) -> NDArray[np.int64]:
        """Borders of what is read in one go: whole tar files, blocks of ``block_rows`` rows of other files."""
        parts = [np.zeros(1, np.int64)]
        for source, start, stop in zip(self._sources, self._borders[:-1], self._borders[1:], strict=True):
            inner = () if source.is_shard else range(int(start) + block_rows, int(stop), block_rows)
            parts.append(np.array([*inner, stop], np.int64))
        return np.unique(np.concatenate(parts))

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
    problems: list[ConfigProblem] = []
    files: list[IndexedFile] = []
    names: set[str] = set()
    for number, config in enumerate(configs):
        found = check_source(number, config)
        problems += found
        for path in [] if found else _files(config, survey):
            # Default ids start with the file's name, which must therefore be unique.
            name = path.stem if path.stem not in names else f"{path.stem}.{len(files)}"
            names.add(name)
            try:
                source, hashes = _index_file(path, config.images, name, build, survey)
            except (OSError, _Malformed, ShardDamaged) as error:
                fix = FIXES.get(type(error), "make it readable for this user")
                problems.append(ConfigProblem(f"data.sources[{number}].path", str(path), str(error), fix))
                continue
            files.append(IndexedFile(str(path), source, hashes))
    if problems:
        raise ConfigError(problems)
    return files


class _Malformed(Exception):
    """A .json file that is not one list."""


FIXES: Mapping[type[Exception], str] = {
    _Malformed: "repair the file, or write one row per line into a .jsonl file, where a broken row costs only itself",
    ShardDamaged: "write the shard again, or move it out of the way: what is lost with it cannot be counted",
}


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


def _index_file(path: Path, images: str, name: str, build: BuildSample, survey: RowSurvey) -> tuple[Source, RowHashes]:
    if path.suffix == SHARD:
        return index_shard(path, name, survey, build)
    ids = RowIds(name, str(path), survey)
    holds_lines = path.suffix == ".jsonl"
    if not holds_lines and is_lines(path):
        survey.remark("read as one row per line (.jsonl), which it is", str(path), 1, "file")
        holds_lines = True
    spans = _index_lines(path, ids) if holds_lines else _index_list(path, ids)
    table = np.frombuffer(spans, np.int64).reshape(-1, 3)
    return RowFile(str(path), os.path.realpath(images), name, table, build), ids.hashes()


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

    @property
    def is_shard(self) -> bool:
        return False

    def read(self, row: int) -> Sample:
        offset, length, _ = self.spans[row].tolist()
        fields = parse_row(read_range(self.path, offset, length))
        images = [locate_image(path, self.images) for path in image_paths(fields)]
        return self.build(fields, images, default_id(self.name, row), self.origin(row))


def _index_lines(path: Path, ids: RowIds) -> array[int]:
    """Finds the rows of a JSONL file; blank lines are none. An over-long line is never held in memory whole."""
    spans = array("q")
    offset = line = 0
    with open(path, "rb") as file:
        while start := file.readline(MAX_ROW_BYTES + 1):
            line += 1
            length = len(start)
            if length > MAX_ROW_BYTES:
                length += _skip_rest(file, start)
            if start.strip() or length > MAX_ROW_BYTES:
                spans.extend((offset, length, line))
                ids.add_encoded(start if length <= MAX_ROW_BYTES else b"", line)
                ids.add_content(start.strip())
            offset += length
    return spans


def _skip_rest(file: BinaryIO, chunk: bytes) -> int:
    """Reads on to the end of the line that ``chunk`` belongs to; returns the bytes read."""
    skipped = 0
    while not chunk.endswith(b"\n") and (chunk := file.readline(MAX_ROW_BYTES)):
        skipped += len(chunk)
    return skipped


def _index_list(path: Path, ids: RowIds) -> array[int]:
    """Finds the rows of a JSON list."""
    # As Latin-1 a character is a byte, so positions are offsets; JSON's own characters are the same in UTF-8.
    with open(path, encoding="latin-1", newline="") as file:
        text = file.read()
    spans = array("q")
    line, counted = 1, 0
    try:
        for row, start, end in _elements(text):
            line += text.count("\n", counted, start)
            counted = start
            spans.extend((start, end - start, line))
            raw = text[start:end]
            if raw.isascii():
                ids.add(row, line)
            else:
                ids.add_encoded(raw.encode("latin-1"), line)
            ids.add_content(raw.encode("latin-1"))
    except (ValueError, RecursionError) as error:
        raise _Malformed(f"is no JSON list of rows: {error}") from error
    return spans


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
