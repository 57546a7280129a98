"""Opens an index: the data sets of a run as Sources whose rows are found, and as numbers, without reading a row.

In: Experiment, a complete index   Out: OpenIndex: files, notes, RowSizes   Next: data/resume.py
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sicog_mcore.config import Experiment
from sicog_mcore.data.index.block_rows import SHARD_PATH, ShardScan
from sicog_mcore.data.index.block_table import MEMBERS, BlockTable
from sicog_mcore.data.index.index_settings import build_function
from sicog_mcore.data.index.index_store import FileBlocks, IndexStore, look_at
from sicog_mcore.data.index.row_blocks import BlockSpan, cut_blocks
from sicog_mcore.data.row_sizes import USABLE, RowSizes
from sicog_mcore.data.rows import (
    BuildSample,
    Hashes,
    RowHashes,
    default_id,
    hash_id,
    locate_images,
    parse_row,
    read_range,
)
from sicog_mcore.data.sample import Sample
from sicog_mcore.data.shards import ShardFile
from sicog_mcore.data.sources import (
    FILE_ERRORS,
    DataFile,
    IndexedFile,
    MeasuredSource,
    RowFault,
    file_problem,
    list_files,
    new_survey,
)
from sicog_mcore.errors import ConfigError, ConfigProblem

REPEATED = "duplicate_id"


@dataclass(frozen=True)
class BlockedFile:
    """A file of rows whose places are in an index: a Source. Pickles as names of files, not as arrays.

    Attributes:
        path: the file; the real path of a shard.
        images: real path of the folder that image paths are relative to.
        name: what default ids start with.
        build: gives a row its meaning.
        spans: its blocks.
        tables: their part of the index.
    """

    path: str
    images: str
    name: str
    build: BuildSample
    spans: tuple[BlockSpan, ...]
    tables: tuple[BlockTable, ...]

    def __len__(self) -> int:
        return sum(span.rows for span in self.spans)

    def read(self, row: int) -> Sample:
        """Raises SampleError if the row cannot be used."""
        span, table, local = self._locate(row)
        offset, length = (int(table.numbers(name)[local]) for name in ("offset", "length"))
        fields = parse_row(read_range(self.path, span.start + offset, length))
        return self.build(fields, locate_images(fields, self.images), default_id(self.name, row), self.origin(row))

    def origin(self, row: int) -> str:
        """Names the file and the line of a row."""
        span, table, local = self._locate(row)
        return f"{self.path}:{span.line + int(table.numbers('line')[local]) - 1}"

    def measures(self, row: int) -> tuple[int, int]:
        """Tells the tokens and slices that a row had when it was indexed."""
        _, table, local = self._locate(row)
        return _measures(table, local)

    def fault(self, row: int) -> RowFault | None:
        """Says why a row was found bad when it was indexed; None if it was not."""
        _, table, local = self._locate(row)
        return _fault(table, local, default_id(self.name, row), self.path)

    def _locate(self, row: int) -> tuple[BlockSpan, BlockTable, int]:
        at = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return self.spans[at], self.tables[at], row - self.spans[at].first_row

    @cached_property
    def _first_rows(self) -> NDArray[np.int64]:
        return np.array([span.first_row for span in self.spans], np.int64)


@dataclass(frozen=True)
class BlockedShard:
    """A shard whose members are in an index: a Source. Pickles as names of files.

    Attributes:
        path: real path of the shard.
        name: what default ids start with.
        build: gives a row its meaning.
        table: its part of the index.
    """

    path: str
    name: str
    build: BuildSample
    table: BlockTable

    def __reduce__(self) -> tuple[type[BlockedShard], tuple[str, str, BuildSample, BlockTable]]:
        return BlockedShard, (self.path, self.name, self.build, self.table)

    def __len__(self) -> int:
        return len(self.table)

    def read(self, row: int) -> Sample:
        """Raises SampleError if the row cannot be used."""
        return self._shard.read(row)

    def origin(self, row: int) -> str:
        """Names the shard and the key of a row."""
        return self._shard.origin(row)

    def measures(self, row: int) -> tuple[int, int]:
        """Tells the tokens and slices that a row had when it was indexed."""
        return _measures(self.table, row)

    def fault(self, row: int) -> RowFault | None:
        """Says why a row was found bad when it was indexed; None if it was not."""
        return _fault(self.table, row, default_id(self.name, row), self.path)

    @cached_property
    def _shard(self) -> ShardFile:
        borders, members = self.table.entries(MEMBERS)
        return ShardFile(
            path=self.path,
            name=self.name,
            keys=self.table.keys(),
            states=self.table.numbers("state"),
            borders=borders,
            members=members,
            types=tuple(self.table.header.types),
            build=self.build,
        )


def _measures(table: BlockTable, row: int) -> tuple[int, int]:
    return int(table.numbers("num_tokens")[row]), int(table.numbers("num_slices")[row])


def _fault(table: BlockTable, row: int, fallback_id: str, path: str) -> RowFault | None:
    reason = int(table.numbers("reason")[row])
    if reason == USABLE:
        return None
    row_id, detail = table.text("bad_id", row), table.text("detail", row) or ""
    known_id = fallback_id if row_id == "" else row_id
    return RowFault(known_id, table.header.reasons[reason], detail.replace(SHARD_PATH, path))


class MeasuredFile(NamedTuple):
    """A file of rows from the index.

    Attributes:
        indexed: the file as a Source, and what its rows are recognised by.
        source: the same Source, as one that knows what its rows measure.
        sizes: what its rows measure; its shards begin at 0.
    """

    indexed: IndexedFile
    source: MeasuredSource
    sizes: RowSizes


@dataclass(frozen=True)
class OpenIndex:
    """The data sets of a run.

    Attributes:
        files: in the order of the data sets.
        notes: what is to be said of their rows.
    """

    files: tuple[MeasuredFile, ...]
    notes: tuple[str, ...]


def open_index(experiment: Experiment) -> OpenIndex:
    """Opens an index that is complete. Of files that are as they were noted, nothing is read but their status.

    Files with another status, because they were copied or touched, are read once and compared block by block.

    Raises:
        ConfigError: files that cannot be opened, or whose rows have no index; all of them at once.
    """
    store, build = IndexStore(experiment), build_function(experiment)
    survey = new_survey(build)
    files, problems = list_files(experiment.data.sources, survey)
    opened: list[MeasuredFile] = []
    for file in files:
        try:
            blocks = store.known(file) or _compare(store, file, build)
        except FILE_ERRORS as error:
            problems.append(file_problem(file, error))
            continue
        if blocks is None:
            found = f"its rows have no index in {store.folder}; build it with: sicog index --config <this run's>"
            fix = "and name a folder in data.index that all machines of the run see"
            problems.append(ConfigProblem(f"data.sources[{file.number}].path", str(file.path), found, fix))
            continue
        for span, table in zip(blocks.spans, blocks.tables, strict=True):
            survey.merge(table.header.survey, str(file.path), span.line)
        opened.append(_measured(file, build, blocks))
    if problems:
        raise ConfigError(problems)
    return OpenIndex(tuple(opened), tuple(survey.notes()))


def _compare(store: IndexStore, file: DataFile, build: BuildSample) -> FileBlocks | None:
    """The blocks of a file that may have changed, by its bytes; None unless all of them have an index."""
    stamp, looked_at_ns = look_at(file.path)
    spans = (ShardScan(file, build).span(),) if file.kind == "shard" else tuple(cut_blocks(file))
    blocks = store.opened(file, spans)
    if blocks is not None and stamp.has_rested(looked_at_ns):
        store.note(file, stamp, looked_at_ns, spans)  # so that it need not be read again
    return blocks


def _measured(file: DataFile, build: BuildSample, blocks: FileBlocks) -> MeasuredFile:
    source: MeasuredSource
    if file.kind == "shard":
        source = BlockedShard(os.path.realpath(file.path), file.name, build, blocks.tables[0])
    else:
        images = os.path.realpath(file.images)
        source = BlockedFile(str(file.path), images, file.name, build, blocks.spans, blocks.tables)
    ids = [_ids(file, span, table) for span, table in zip(blocks.spans, blocks.tables, strict=True)]
    hashes = RowHashes(_joined(ids, np.uint64), _column(blocks.tables, "content_hash", np.uint64))
    return MeasuredFile(IndexedFile(str(file.path), source, hashes), source, _sizes(blocks))


def _ids(file: DataFile, span: BlockSpan, table: BlockTable) -> Hashes:
    """Hashes of a block's ids: as stored, unless ids are made of another name or other numbers than then."""
    header, hashes = table.header, table.numbers("id_hash")
    if not header.nameless or (header.name, header.first_row) == (file.name, span.first_row):
        return hashes
    hashes = hashes.copy()
    for row in header.nameless:
        hashes[row] = hash_id(default_id(file.name, span.first_row + row))
    return hashes


def _sizes(blocks: FileBlocks) -> RowSizes:
    reasons: dict[str, int] = {"": USABLE}
    translated = []
    for table in blocks.tables:  # each block numbers its reasons by itself
        codes = [reasons.setdefault(reason, len(reasons)) for reason in table.header.reasons]
        translated.append(np.array(codes, np.uint8)[table.numbers("reason")])
    return RowSizes(
        num_tokens=_column(blocks.tables, "num_tokens", np.int32),
        num_slices=_column(blocks.tables, "num_slices", np.int32),
        attention=_column(blocks.tables, "attention", np.int64),
        reason=_joined(translated, np.uint8),
        is_truncated=_column(blocks.tables, "truncated", np.uint8).view(np.bool_),
        shards=np.cumsum([0, *(span.rows for span in blocks.spans)], dtype=np.int64),
        reasons=tuple(reasons),
    )


def _column(tables: Sequence[BlockTable], name: str, kind: type) -> NDArray:
    return _joined([table.numbers(name) for table in tables], kind)


def _joined(parts: Sequence[NDArray], kind: type) -> NDArray:
    """The parts one after the other; a single one stays the view of the file that it is."""
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, kind), *parts])


def join_sizes(parts: Sequence[tuple[RowSizes, int]], repeated: NDArray[np.int64], counts_repeats: bool) -> RowSizes:
    """Joins the sizes of the rows of several files, one file after the other.

    Args:
        parts: of each file, what its rows measure, and how many of its first rows are taken.
        repeated: rows of all files that have the id of an earlier one.
        counts_repeats: whether these can be used all the same.
    """
    taken = [sizes if rows == len(sizes) else sizes.first(rows) for sizes, rows in parts]
    reasons: dict[str, int] = {"": USABLE}
    codes = [
        np.array([reasons.setdefault(name, len(reasons)) for name in sizes.reasons], np.uint8)[sizes.reason]
        for sizes in taken
    ]
    starts = np.cumsum([0, *map(len, taken)])
    borders = [start + sizes.shards[1:] for start, sizes in zip(starts, taken, strict=False)]
    columns: Mapping[str, NDArray] = {
        "num_tokens": np.concatenate([np.empty(0, np.int32), *(sizes.num_tokens for sizes in taken)]),
        "num_slices": np.concatenate([np.empty(0, np.int32), *(sizes.num_slices for sizes in taken)]),
        "attention": np.concatenate([np.empty(0, np.int64), *(sizes.attention for sizes in taken)]),
        "reason": np.concatenate([np.empty(0, np.uint8), *codes]),
        "is_truncated": np.concatenate([np.empty(0, np.bool_), *(sizes.is_truncated for sizes in taken)]),
    }
    if len(repeated) and not counts_repeats:
        for column in columns.values():
            column[repeated] = 0
        columns["reason"][repeated] = reasons.setdefault(REPEATED, len(reasons))
    shards = np.concatenate([np.zeros(1, np.int64), *borders]).astype(np.int64)
    return RowSizes(**columns, shards=np.unique(shards), reasons=tuple(reasons))
