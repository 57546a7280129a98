"""Where a run goes on in its data, and whether that place still means what it meant when it was saved.

In: Experiment, what a checkpoint holds of the data   Out: OpenRows   Next: loader.py
Equal rows and settings: the exact next batch. Rows appended: the epoch under way is finished on the rows that it began
with, the new ones join from the next epoch on. Anything else is refused, or starts an epoch anew if that is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sicog_mcore.config import Experiment
from sicog_mcore.data.fingerprint import (
    ORDER_SETTINGS,
    STEP_ROWS,
    DataFingerprint,
    FileFingerprint,
    describe_appended,
    describe_files,
    describe_settings,
    find_prefixes,
)
from sicog_mcore.data.index.build_index import IndexOptions, build_index
from sicog_mcore.data.index.indexed_files import MeasuredFile, OpenIndex, join_sizes, open_index
from sicog_mcore.data.row_order import RowOrder
from sicog_mcore.data.row_sizes import USABLE, RowSizes
from sicog_mcore.data.sample import Sample
from sicog_mcore.data.sources import MeasuredSource, RowFault, SampleIndex
from sicog_mcore.errors import CheckpointError
from sicog_mcore.files import hash_bytes

NOT_COMPARED = "the checkpoint was written before fingerprints: data not compared"


@dataclass(frozen=True)
class LoaderState:
    """Position of the next step's first pack in the global stream."""

    epoch: int = 0
    window: int = 0
    pack: int = 0

    @property
    def is_inside(self) -> bool:
        """Whether a part of the epoch is consumed already."""
        return self.window > 0 or self.pack > 0


START = LoaderState()


@dataclass(frozen=True)
class FirstRows:
    """A source as it was before rows were appended."""

    source: MeasuredSource
    rows: int

    def __len__(self) -> int:
        return self.rows

    def read(self, row: int) -> Sample:
        return self.source.read(row)

    def origin(self, row: int) -> str:
        return self.source.origin(row)

    def measures(self, row: int) -> tuple[int, int]:
        """Tells the tokens and slices that a row had when it was indexed."""
        return self.source.measures(row)

    def fault(self, row: int) -> RowFault | None:
        """Says why a row was found bad when it was indexed; None if it was not."""
        return self.source.fault(row)


@dataclass(frozen=True)
class EpochRows:
    """The rows of every epoch: all of them, save in an epoch that began before some were appended.

    Attributes:
        all: every row that there is.
        earlier: rows of ``epoch``; None if that has all rows too.
        epoch: the one that ``earlier`` is meant for.
        all_sizes: what every row measures; None where nobody plans from it.
        earlier_sizes: the same for the rows of ``earlier``.
    """

    all: SampleIndex
    earlier: SampleIndex | None = None
    epoch: int = 0
    all_sizes: RowSizes | None = None
    earlier_sizes: RowSizes | None = None

    def of(self, epoch: int) -> SampleIndex:
        return self.earlier if self.earlier is not None and epoch == self.epoch else self.all

    def sizes_of(self, epoch: int) -> RowSizes:
        """Gives the sizes that the rows of an epoch have."""
        sizes = self.earlier_sizes if self.earlier is not None and epoch == self.epoch else self.all_sizes
        assert sizes is not None, "these rows were opened without their index"
        return sizes

    def without_sizes(self) -> EpochRows:
        """Gives the rows without their sizes, for a process that reads rows and plans nothing."""
        return EpochRows(self.all, self.earlier, self.epoch)


@dataclass(frozen=True)
class OpenRows:
    """The data sets of a run, opened, and the place where it goes on.

    Attributes:
        rows: of each epoch.
        mark: what the place depends on.
        begun_with: marks of the files as the epoch under way has them, if it has not all rows.
        start: the place.
        bad: what was found bad before, see quarantine.BadRows.
        notes: lines for the user.
    """

    rows: EpochRows
    mark: DataFingerprint
    begun_with: tuple[FileFingerprint, ...] = ()
    start: LoaderState = START
    bad: Sequence[Mapping[str, Any]] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def sizes(self) -> RowSizes:
        """Gives the sizes that all rows have."""
        return self.rows.sizes_of(self.rows.epoch + 1)

    def from_the_start(self) -> OpenRows:
        """Gives all rows, none of them consumed."""
        return OpenRows(EpochRows(self.rows.all, all_sizes=self.sizes), self.mark)

    def state(self, position: LoaderState, rows_left: int, bad: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Gives the state that a checkpoint at ``position`` holds beside it: plain dictionaries, lists, texts and numbers.

        Args:
            rows_left: of the epoch.
            bad: BadRows.state().
        """
        is_begun = self.rows.earlier is not None and position.epoch == self.rows.epoch and position.is_inside
        return {
            "settings": dict(self.mark.settings),
            "files": [list(mark) for mark in self.mark.files],
            "begun_with": [list(mark) for mark in self.begun_with] if is_begun else [],
            "rows_left": rows_left,
            "bad": list(bad),
            "shards": _hash_shards(self.rows.sizes_of(position.epoch)),
            "window": _hash_window(self.rows.sizes_of(position.epoch), self.mark.settings, position),
        }


def open_rows(experiment: Experiment, index: OpenIndex | None = None) -> OpenRows:
    """Opens the data sets of a run that begins.

    Args:
        index: of them; None builds what is missing of it here, and opens it.

    Raises:
        ConfigError: they cannot be opened.
    """
    index = index or prepare_index(experiment)
    return OpenRows(
        _all_rows(index, experiment), DataFingerprint.of(experiment, [file.indexed for file in index.files])
    )


def reopen_rows(
    experiment: Experiment, position: LoaderState, saved: Mapping[str, Any], index: OpenIndex | None = None
) -> OpenRows:
    """Opens the data sets of a run that goes on, and compares them with those of its checkpoint.

    Args:
        position: where it goes on.
        saved: ``OpenRows.state`` of the checkpoint; empty if that was written before there was one.
        index: see ``open_rows``.

    Raises:
        ConfigError: they cannot be opened.
        CheckpointError: they are not what they were, and data.on_change does not say what to do about it.
    """
    index = index or prepare_index(experiment)
    files = [file.indexed for file in index.files]
    now = DataFingerprint.of(experiment, files)
    opened = OpenRows(_all_rows(index, experiment), now, start=position)
    if not saved:
        return replace(opened, notes=(NOT_COMPARED,))
    before = _marks(saved["files"])
    # An epoch can begin in any order.
    free = () if position.is_inside else ORDER_SETTINGS
    changes = describe_settings(saved["settings"], now.settings, free)
    places = find_prefixes(before, files)
    if changes or places is None:
        return _start_epoch(opened, [*changes, *describe_files(before, files)], saved["rows_left"], experiment)
    begun_with = _marks(saved["begun_with"]) or before
    appended = describe_appended(before, places, now.files)
    opened = replace(opened, bad=saved["bad"])
    notes: tuple[str, ...] = ()
    if appended:
        notes = (f"rows were appended since the checkpoint: {'; '.join(appended)}; {_joining(position, begun_with)}",)
    if position.is_inside and _num_rows(begun_with) != len(opened.rows.all):
        earlier, sizes = _first_rows(index.files, experiment, begun_with)
        rows = replace(opened.rows, earlier=earlier, epoch=position.epoch, earlier_sizes=sizes)
        opened = replace(opened, rows=rows, begun_with=begun_with)
    if change := _other_packs(opened.rows.sizes_of(position.epoch), now.settings, position, saved):
        return _start_epoch(
            OpenRows(EpochRows(opened.rows.all, all_sizes=opened.sizes), now, start=position),
            [change],
            saved["rows_left"],
            experiment,
        )
    return replace(opened, notes=notes)


def _other_packs(sizes: RowSizes, settings: Mapping[str, Any], position: LoaderState, saved: Mapping[str, Any]) -> str:
    """Why the same rows under the same settings make other packs than at the checkpoint; empty if they do not."""
    if position.is_inside and saved.get("shards") != _hash_shards(sizes):
        # The same rows written in another way: their order, which the place counts in, is made of these blocks.
        return "the same rows stand in other blocks of rows that are shuffled as one (other format or line ends)"
    if position.pack and "window" in saved and saved["window"] != _hash_window(sizes, settings, position):
        # An image that was missing has come, or was replaced and indexed again: the packs behind the place are others.
        return "images of the rows that are packed together there have other sizes, are gone, or were missing before"
    return ""


def _joining(position: LoaderState, begun_with: Sequence[FileFingerprint]) -> str:
    if not position.is_inside:
        return f"they belong to epoch {position.epoch}, which begins now"
    rows = _num_rows(begun_with)
    return f"epoch {position.epoch} is finished on the {rows:,} rows it began with, they join in epoch {position.epoch + 1}"


def _start_epoch(opened: OpenRows, changes: Sequence[str], rows_left: int, experiment: Experiment) -> OpenRows:
    """The beginning of an epoch, where any data can be taken."""
    place = opened.start
    begins = LoaderState(place.epoch + place.is_inside)
    skipped = f"{rows_left:,} rows of epoch {place.epoch} are skipped" if place.is_inside else "no row is skipped"
    if experiment.data.on_change == "restart_epoch":
        done = f"the data starts anew at epoch {begins.epoch}; {skipped}"
        note = f"the data changed since the checkpoint ({'; '.join(changes)}); data.on_change=restart_epoch: {done}"
        return replace(opened, start=begins, notes=(note,))
    raise CheckpointError(
        "\n".join(
            [
                "the data is not what it was at the checkpoint, so the place where it stopped has lost its meaning:",
                *(f"  - {change}" for change in changes),
                f"restore it; or set data.on_change=restart_epoch, which goes on at the beginning of epoch {begins.epoch} "
                f"({skipped}); or choose another output folder",
            ]
        )
    )


def prepare_index(experiment: Experiment) -> OpenIndex:
    """Builds what is missing of the index of a run's data sets, and opens it.

    Raises:
        ConfigError: the data sets cannot be opened.
    """
    build_index(experiment, IndexOptions())
    return open_index(experiment)


def _all_rows(index: OpenIndex, experiment: Experiment) -> EpochRows:
    files = [file.indexed for file in index.files]
    ids = [file.hashes.ids for file in files]
    rows = SampleIndex([file.source for file in files], ids, experiment.data.duplicate_ids, index.notes)
    return EpochRows(
        rows, all_sizes=_join_sizes([(file.sizes, len(file.sizes)) for file in index.files], rows, experiment)
    )


def _first_rows(
    files: Sequence[MeasuredFile], experiment: Experiment, marks: Sequence[FileFingerprint]
) -> tuple[SampleIndex, RowSizes]:
    """The rows that the marks stand for, and what they measure."""
    places = find_prefixes(marks, [file.indexed for file in files])
    assert places is not None, "rows that a checkpoint began with are among those that it knew"
    kept = [(files[place], mark.rows) for place, mark in zip(places, marks, strict=True)]
    sources = [FirstRows(file.source, rows) for file, rows in kept]
    ids = [file.indexed.hashes.ids[:rows] for file, rows in kept]
    earlier = SampleIndex(sources, ids, experiment.data.duplicate_ids)
    return earlier, _join_sizes([(file.sizes, rows) for file, rows in kept], earlier, experiment)


def _join_sizes(parts: Sequence[tuple[RowSizes, int]], rows: SampleIndex, experiment: Experiment) -> RowSizes:
    return join_sizes(parts, rows.repeated, counts_repeats=experiment.data.duplicate_ids == "keep")


def _hash_shards(sizes: RowSizes) -> str:
    """Hashes the shards, on which the order of an epoch depends beside the rows themselves."""
    return hash_bytes(np.ascontiguousarray(sizes.shards, dtype="<i8").tobytes())


def _hash_window(sizes: RowSizes, settings: Mapping[str, Any], position: LoaderState) -> str:
    """Hash of the sizes behind the packs of the window at a place; empty at its beginning, where any packs will do."""
    if not position.pack:
        return ""
    shards = np.asarray(sizes.shards, np.int64)
    buffer_rows, step_rows = settings["data.window_samples"], settings[STEP_ROWS]
    rows = RowOrder(shards, buffer_rows, step_rows, settings["train.seed"], position.epoch).rows(position.window)
    usable = sizes.reason[rows] == USABLE
    columns = (usable, *(column[rows] for column in (sizes.num_tokens, sizes.num_slices, sizes.attention)))
    return hash_bytes(np.stack([column.astype("<i8") for column in columns]).tobytes())


def _marks(saved: Sequence[Sequence[Any]]) -> tuple[FileFingerprint, ...]:
    return tuple(FileFingerprint(*mark) for mark in saved)


def _num_rows(marks: Sequence[FileFingerprint]) -> int:
    return sum(mark.rows for mark in marks)
