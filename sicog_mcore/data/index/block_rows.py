"""Indexes one block: every row is parsed once, its images' headers are read, and it is measured as the model will get it.

In: DataFile, BlockSpan   Out: a block's file   Next: block_table.py (the file), build_index.py (runs many of them)
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sicog_mcore.config import Experiment
from sicog_mcore.data.encode import Encoder, Measured
from sicog_mcore.data.image_range import FIRST_BYTES
from sicog_mcore.data.index.block_table import (
    MEMBERS,
    NUMBERS,
    SIZES,
    TEXTS,
    BlockColumns,
    BlockHeader,
    write_block,
)
from sicog_mcore.data.index.index_settings import build_function
from sicog_mcore.data.index.row_blocks import BlockRow, BlockSpan, read_block
from sicog_mcore.data.rows import Hashes, RowIds, check_length, default_id, locate_images, parse_row
from sicog_mcore.data.sample import Sample
from sicog_mcore.data.shards import IMAGE, ShardFile, index_shard
from sicog_mcore.data.sources import DataFile, new_survey
from sicog_mcore.errors import SampleError
from sicog_mcore.files import hash_chunks

SHARD_PATH = "\0shard\0"  # stands for the shard's path in details: the same shard may lie elsewhere
SIZED = ("num_tokens", "num_slices", "attention", "truncated", "reason")


class _Columns:
    """The columns of a block that is being indexed, as far as they depend on what its rows measure."""

    def __init__(self) -> None:
        self.numbers = {name: array("q") for name in NUMBERS if not name.endswith("_hash")}
        self.texts: dict[str, list[str | None]] = {name: [] for name in TEXTS}
        self.sizes: list[tuple[tuple[int, int], ...]] = []
        self.reasons = {"": 0}

    def place(self, offset: int, length: int, line: int) -> None:
        for name, value in (("offset", offset), ("length", length), ("line", line)):
            self.numbers[name].append(value)

    def add(self, outcome: Measured | SampleError, bad_id: str | None) -> None:
        """Adds what a row measures, or why it is bad; ``bad_id`` is None where that is known before its id."""
        is_bad = isinstance(outcome, SampleError)
        measured = Measured("", 0, 0, 0, False) if isinstance(outcome, SampleError) else outcome
        reason = self.reasons.setdefault(outcome.reason, len(self.reasons)) if isinstance(outcome, SampleError) else 0
        values = (measured.num_tokens, measured.num_slices, measured.attention, measured.is_truncated, reason)
        for name, value in zip(SIZED, values, strict=True):
            self.numbers[name].append(value)
        self.texts["detail"].append(outcome.detail if isinstance(outcome, SampleError) else None)
        self.texts["bad_id"].append(bad_id if is_bad else None)
        self.sizes.append(measured.image_sizes)


def _all_numbers(columns: _Columns, ids: RowIds) -> dict[str, NDArray[Any]]:
    hashes = ids.hashes()
    measured = {name: np.asarray(values) for name, values in columns.numbers.items()}
    return {**measured, "id_hash": hashes.ids, "content_hash": hashes.contents}


class BlockIndexer:
    """Indexes the blocks of one experiment's data sets.

    Args:
        experiment: says how rows are measured.
    """

    def __init__(self, experiment: Experiment) -> None:
        self._encoder = Encoder(experiment.model, experiment.data)
        self._build = build_function(experiment)

    def index_rows(self, file: DataFile, span: BlockSpan, target: Path) -> None:
        """Writes the index of a block of a JSONL file or a JSON list.

        Raises:
            OSError: the file cannot be read.
            FileChanged: it was changed since the block was cut.
            MachineError: the index cannot be written.
        """
        survey = new_survey(self._build)
        ids = RowIds(file.name, "", survey, span.first_row)
        columns, images = _Columns(), os.path.realpath(file.images)
        for row in read_block(file, span):
            self._add_row(row, images, ids, columns)
        header = BlockHeader(
            rows=span.rows,
            name=file.name if ids.nameless else "",  # a block whose rows have ids is the same wherever it stands
            first_row=span.first_row if ids.nameless else 0,
            nameless=ids.nameless.tolist(),
            reasons=list(columns.reasons),
            types=(),
            survey=survey.state(),
        )
        numbers = _all_numbers(columns, ids)
        write_block(target, header, BlockColumns(numbers, columns.texts, {SIZES: columns.sizes}))

    def _add_row(self, row: BlockRow, images: str, ids: RowIds, columns: _Columns) -> None:
        columns.place(row.offset, row.length, row.line)
        ids.add_content(row.content)
        try:
            check_length(row.length)
            fields = parse_row(row.raw)
        except SampleError as error:
            ids.add_encoded(row.raw, row.line)
            columns.add(error, None)
            return
        ids.add(fields, row.line)
        # The empty text stands for the default id, which depends on where the block stands.
        columns.add(*self._measure(lambda: self._build(fields, locate_images(fields, images), "", "")))

    def _measure(self, read: Callable[[], Sample]) -> tuple[Measured | SampleError, str | None]:
        """Measures a row, or says why it is bad; gives its id as far as that is known."""
        row_id = None
        try:
            sample = read()
            row_id = sample.id
            return self._encoder.measure(sample), row_id
        except SampleError as error:
            return error, row_id

    def scan_shard(self, file: DataFile) -> ShardScan:
        """Finds the samples of a shard; nothing is measured yet.

        Raises:
            OSError: the shard cannot be read.
            ShardDamaged: it is cut off, compressed, or no tar.
        """
        return ShardScan(file, self._build)

    def index_shard(self, scan: ShardScan, target: Path) -> None:
        """Writes the index of a shard.

        Raises:
            MachineError: the index cannot be written.
        """
        columns = _Columns()
        for outcome, row_id in self._measure_shard(scan):
            columns.place(0, 0, 0)
            columns.add(outcome, row_id)
        shard = scan.shard
        header = BlockHeader(
            rows=len(shard),
            name=scan.file.name if scan.ids.nameless else "",
            first_row=0,
            nameless=scan.ids.nameless.tolist(),
            reasons=list(columns.reasons),
            types=shard.types,
            survey=scan.survey.state(),
        )
        borders = shard.borders.tolist()
        members = shard.members.tolist()
        groups = [members[start:stop] for start, stop in zip(borders, borders[1:], strict=False)]
        numbers = _all_numbers(columns, scan.ids)
        lists = {SIZES: columns.sizes, MEMBERS: groups}
        write_block(target, header, BlockColumns(numbers, columns.texts, lists, shard.keys, shard.states))

    def _measure_shard(self, scan: ShardScan) -> Iterator[tuple[Measured | SampleError, str | None]]:
        for row in range(len(scan.shard)):
            outcome, row_id = self._measure(partial(scan.shard.read, row))
            if isinstance(outcome, SampleError):
                outcome = SampleError(outcome.reason, outcome.detail.replace(scan.shard.path, SHARD_PATH))
            yield outcome, "" if row_id == default_id(scan.file.name, row) else row_id

    def time_rows(self, file: DataFile, span: BlockSpan, most: int) -> tuple[float, int]:
        """Indexes the first rows of a block for nothing: seconds that they take, and their bytes.

        Raises:
            OSError, ShardDamaged, FileChanged: as the other methods.
        """
        started = time.perf_counter()
        if file.kind == "shard":
            scan = self.scan_shard(file)
            measured = sum(1 for _ in islice(self._measure_shard(scan), most))
            share = measured / max(1, len(scan.shard))
            return time.perf_counter() - started, max(1, round(share * file.path.stat().st_size))
        ids, columns, size = RowIds(file.name, "", new_survey(self._build)), _Columns(), 1
        images = os.path.realpath(file.images)
        for row in islice(read_block(file, span), most):
            self._add_row(row, images, ids, columns)
            size = row.offset + row.length
        return time.perf_counter() - started, size


class ShardScan:
    """The samples of a shard, found but not measured.

    Attributes:
        shard: they.
        ids: hashes of their ids and contents.
        survey: what was counted.
    """

    def __init__(self, file: DataFile, build: Callable[..., Sample]) -> None:
        self.file = file
        self.survey = new_survey(build)
        self.shard, self.ids = index_shard(file.path, file.name, self.survey, build, said_as="")

    def span(self) -> BlockSpan:
        """The shard as a block."""
        digest = shard_digest(self.shard, self.ids.hashes().contents)
        return BlockSpan(0, self.file.path.stat().st_size, 1, 0, len(self.shard), digest)


def shard_digest(shard: ShardFile, contents: Hashes) -> str:
    """Hash of what the index of a shard depends on: texts, names, places and sizes of its members, the images' first bytes.

    Raises:
        OSError: the shard cannot be read.
    """
    return hash_chunks(_shard_parts(shard, contents))


def _shard_parts(shard: ShardFile, contents: Hashes) -> Iterator[bytes]:
    for part in (contents, shard.states, shard.borders, shard.members):
        yield np.ascontiguousarray(part).tobytes()
    yield repr((shard.keys.tolist(), shard.types)).encode("utf-8", "surrogatepass")
    with open(shard.path, "rb", buffering=0) as file:
        for kind, offset, length, _ in shard.members.tolist():
            if kind == IMAGE:
                yield os.pread(file.fileno(), min(length, FIRST_BYTES), offset)
