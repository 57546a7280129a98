"""Where a run goes on in its data, and whether that place still means what it meant when it was saved.

In: Experiment, what a checkpoint holds of the data   Out: OpenRows   Next: loader.py
Equal rows and settings: the exact next batch. Rows appended: the epoch under way is finished on the rows that it began
with, the new ones join from the next epoch on. Anything else is refused, or starts an epoch anew if that is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sicog_mcore.config import Experiment
from sicog_mcore.data.fingerprint import (
    DataMark,
    FileMark,
    describe_appended,
    describe_files,
    describe_settings,
    find_prefixes,
)
from sicog_mcore.data.pairs import build_pair
from sicog_mcore.data.rows import build_sample
from sicog_mcore.data.sample import Sample
from sicog_mcore.data.sources import IndexedFile, SampleIndex, Source, index_sources, new_survey
from sicog_mcore.errors import CheckpointError

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

    source: Source
    rows: int

    def __len__(self) -> int:
        return self.rows

    def read(self, row: int) -> Sample:
        return self.source.read(row)

    def origin(self, row: int) -> str:
        return self.source.origin(row)


@dataclass(frozen=True)
class EpochRows:
    """The rows of every epoch: all of them, save in an epoch that began before some were appended.

    Attributes:
        all: every row that there is.
        earlier: rows of ``epoch``; None if that has all rows too.
        epoch: the one that ``earlier`` is meant for.
    """

    all: SampleIndex
    earlier: SampleIndex | None = None
    epoch: int = 0

    def of(self, epoch: int) -> SampleIndex:
        return self.earlier if self.earlier is not None and epoch == self.epoch else self.all


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
    mark: DataMark
    begun_with: tuple[FileMark, ...] = ()
    start: LoaderState = START
    bad: Sequence[Mapping[str, Any]] = ()
    notes: tuple[str, ...] = field(default=())

    def from_the_start(self) -> OpenRows:
        """Gives all rows, none of them consumed."""
        return OpenRows(EpochRows(self.rows.all), self.mark)

    def state(self, position: LoaderState, rows_left: int, bad: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What a checkpoint at ``position`` holds beside it: plain dictionaries, lists, texts and numbers.

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
        }


def open_rows(experiment: Experiment) -> OpenRows:
    """Opens the data sets of a run that begins.

    Raises:
        ConfigError: they cannot be opened.
    """
    files, said = _index(experiment)
    return OpenRows(EpochRows(_join(files, experiment, said)), DataMark.of(experiment, files))


def reopen_rows(experiment: Experiment, position: LoaderState, saved: Mapping[str, Any]) -> OpenRows:
    """Opens the data sets of a run that goes on, and compares them with those of its checkpoint.

    Args:
        position: where it goes on.
        saved: ``OpenRows.state`` of the checkpoint; empty if that was written before there was one.

    Raises:
        ConfigError: they cannot be opened.
        CheckpointError: they are not what they were, and data.on_change does not say what to do about it.
    """
    files, said = _index(experiment)
    now = DataMark.of(experiment, files)
    opened = OpenRows(EpochRows(_join(files, experiment, said)), now, start=position)
    if not saved:
        return replace(opened, notes=(NOT_COMPARED,))
    before = _marks(saved["files"])
    changes = describe_settings(saved["settings"], now.settings)
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
        rows = EpochRows(opened.rows.all, _join_first(files, experiment, begun_with), position.epoch)
        opened = replace(opened, rows=rows, begun_with=begun_with)
    return replace(opened, notes=notes)


def _joining(position: LoaderState, begun_with: Sequence[FileMark]) -> str:
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


def _index(experiment: Experiment) -> tuple[list[IndexedFile], list[str]]:
    """The files, and what is to be said of their rows."""
    build = build_pair if experiment.objective == "dpo" else build_sample
    survey = new_survey(build)
    return index_sources(experiment.data.sources, survey, build), survey.notes()


def _join(files: Sequence[IndexedFile], experiment: Experiment, said: Sequence[str]) -> SampleIndex:
    """All rows of the files."""
    ids = [file.hashes.ids for file in files]
    return SampleIndex([file.source for file in files], ids, experiment.data.duplicate_ids, said)


def _join_first(files: Sequence[IndexedFile], experiment: Experiment, marks: Sequence[FileMark]) -> SampleIndex:
    """The rows that the marks stand for."""
    places = find_prefixes(marks, files)
    assert places is not None, "rows that a checkpoint began with are among those that it knew"
    kept = [(files[place], mark.rows) for place, mark in zip(places, marks, strict=True)]
    sources = [FirstRows(file.source, rows) for file, rows in kept]
    return SampleIndex(sources, [file.hashes.ids[:rows] for file, rows in kept], experiment.data.duplicate_ids)


def _marks(saved: Sequence[Sequence[Any]]) -> tuple[FileMark, ...]:
    return tuple(FileMark(*mark) for mark in saved)


def _num_rows(marks: Sequence[FileMark]) -> int:
    return sum(mark.rows for mark in marks)
