"""Builds what is missing of an index, block by block, in this process or in several; what is there already is kept.

In: Experiment, IndexOptions   Out: the files of the index, IndexReport   Next: block_jobs.py, indexed_files.py (opens it)
A build that is killed has lost the blocks under way and nothing else: the same call goes on.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sicog_mcore.config import Experiment
from sicog_mcore.data.index.block_jobs import BlockJob, JobDone, run_jobs
from sicog_mcore.data.index.block_rows import BlockIndexer
from sicog_mcore.data.index.image_recheck import healed_blocks
from sicog_mcore.data.index.index_settings import build_function
from sicog_mcore.data.index.index_store import FileStamp, IndexStore, look_at
from sicog_mcore.data.index.row_blocks import BLOCK_ERRORS, BlockSpan, FileChanged, cut_blocks
from sicog_mcore.data.sources import FILE_ERRORS, DataFile, file_problem, list_files, new_survey
from sicog_mcore.errors import ConfigError, ConfigProblem

TIMED_ROWS = 256  # from whose time that of all others is estimated
ALONE_S = 20.0  # of one process: so long takes about what others need to start

TellProgress = Callable[["IndexProgress"], None]


@dataclass(frozen=True)
class IndexOptions:
    """How an index is built.

    Args:
        processes: that index at the same time; 0 takes one for each processor of this machine if that pays.
        limit_s: longest time that the build may be expected to take (s); 0 sets no limit.
    """

    processes: int = 0
    limit_s: float = 0.0


@dataclass(frozen=True)
class IndexProgress:
    """How far a build has come.

    Attributes:
        rows: indexed by this build so far.
        done_bytes, total_bytes: of the files of rows: indexed so far, and in all.
        seconds: since indexing began.
    """

    rows: int
    done_bytes: int
    total_bytes: int
    seconds: float

    def __str__(self) -> str:
        share = self.done_bytes / max(1, self.total_bytes)
        if not share:
            return "indexing: no block is finished yet"
        left_s = self.seconds / share * (1 - share)
        rate = self.rows / max(self.seconds, 1e-9)
        return f"indexing: {share:.0%}, {self.rows:,} rows, {rate:,.0f} rows/s, {left_s:,.0f} s left"


@dataclass(frozen=True)
class IndexReport:
    """The report that a build of the index returns.

    Attributes:
        folder: of the index.
        files, rows, blocks: that the index has now, of these data sets.
        built_rows, built_blocks: among them, those that this build indexed.
        seconds: that it took.
    """

    folder: Path
    files: int
    rows: int
    blocks: int
    built_rows: int
    built_blocks: int
    seconds: float

    def lines(self) -> list[str]:
        """The report for the user."""
        if not self.built_blocks:
            return [f"the index in {self.folder} has all {self.rows:,} rows in {self.blocks:,} blocks"]
        rate = self.built_rows / max(self.seconds, 1e-9)
        return [
            f"indexed {self.built_rows:,} of {self.rows:,} rows ({self.built_blocks:,} of {self.blocks:,} blocks) in"
            f" {self.seconds:,.1f} s ({rate:,.0f} rows/s); written to {self.folder}: data.index={self.folder.parent}"
            " shares it between runs"
        ]


@dataclass
class _File:
    """A file of rows whose index is not known to be complete.

    Attributes:
        file, stamp, looked_at_ns: what was seen of it before it was read.
        spans: its blocks; those of a shard are known when it has been indexed.
        open_jobs: blocks that are still to be indexed.
    """

    file: DataFile
    stamp: FileStamp
    looked_at_ns: int
    spans: tuple[BlockSpan, ...] = ()
    open_jobs: int = 0


@dataclass
class _Work:
    """Jobs that a build has to do, and counts of the rows and blocks that it knows already.

    Attributes:
        known_rows, known_blocks: of files that did not change.
        files: the others.
        jobs: blocks to index, each with the place of its file in ``files``.
        problems: of files that cannot be read.
    """

    known_rows: int = 0
    known_blocks: int = 0
    files: list[_File] = field(default_factory=list)
    jobs: list[BlockJob] = field(default_factory=list)
    problems: list[ConfigProblem] = field(default_factory=list)

    @property
    def total_bytes(self) -> int:
        return sum(job.size for job in self.jobs)


def build_index(experiment: Experiment, options: IndexOptions, report: TellProgress | None = None) -> IndexReport:
    """Indexes whatever of an experiment's data sets is not indexed yet.

    Args:
        experiment: data sets and all that decides what their rows measure.
        options: see there.
        report: called about once a second, and behind each block.

    Raises:
        ConfigError: files that cannot be opened, or change meanwhile; the index cannot be written; the build would take
            longer than the limit, then with the command that builds it.
        MachineError: the disk is full; a process died.
    """
    started = time.monotonic()
    store = IndexStore(experiment)
    files, problems = list_files(experiment.data.sources, new_survey(build_function(experiment)))
    work = _Work(problems=problems)
    report = report or (lambda _: None)
    for file in files:
        _look(experiment, file, store, work, report)
    if work.problems:
        raise ConfigError(work.problems)
    built_rows = built_blocks = 0
    if work.files:
        config = store.prepare()
        for seen in work.files:
            if not seen.open_jobs:  # its time of change is new, its bytes are not
                store.note(seen.file, seen.stamp, seen.looked_at_ns, seen.spans)
        processes = _choose(experiment, options, work, config)
        for done in _run(experiment, store, work, processes, report):
            built_rows, built_blocks = built_rows + done.built_rows, built_blocks + bool(done.built_rows)
    if work.problems:
        raise ConfigError(work.problems)
    spans = [span for seen in work.files for span in seen.spans]
    return IndexReport(
        folder=store.folder,
        files=len(files),
        rows=work.known_rows + sum(span.rows for span in spans),
        blocks=work.known_blocks + len(spans),
        built_rows=built_rows,
        built_blocks=built_blocks,
        seconds=time.monotonic() - started,
    )


def _look(experiment: Experiment, file: DataFile, store: IndexStore, work: _Work, report: TellProgress) -> None:
    """Adds to ``work`` what a file needs; of a file that may have changed, its blocks are cut and looked up."""
    try:
        seen, place = _File(file, *look_at(file.path)), len(work.files)
        blocks = store.known(file)
        is_noted = blocks is not None
        if blocks is None and file.kind != "shard":
            for span in cut_blocks(file):
                seen.spans += (span,)
                report(IndexProgress(0, 0, work.total_bytes, 0.0))
            blocks = store.opened(file, seen.spans)
        seen.spans = blocks.spans if blocks else seen.spans
        if file.kind == "shard":
            jobs = [] if blocks else [BlockJob(place, file, None)]
        elif blocks:
            healed = healed_blocks(file, blocks, build_function(experiment), experiment.data)
            jobs = [BlockJob(place, file, span) for span in healed]
        else:
            jobs = [BlockJob(place, file, span) for span in store.missing(file, seen.spans)]
        seen.open_jobs = len(jobs)
    except FILE_ERRORS as error:
        work.problems.append(file_problem(file, error))
        return
    if blocks and is_noted and not jobs:
        work.known_rows += sum(span.rows for span in blocks.spans)
        work.known_blocks += len(blocks.spans)
        return
    work.files.append(seen)
    work.jobs += jobs


def _choose(experiment: Experiment, options: IndexOptions, work: _Work, config: Path) -> int:
    """How many processes shall index. Refuses what would take too long, going by the first rows."""
    if not work.jobs:
        return 1
    most = min(options.processes or len(os.sched_getaffinity(0)), len(work.jobs))
    if most == 1 and not options.limit_s:
        return 1
    try:
        first = work.jobs[0]
        indexer = BlockIndexer(experiment)
        span = first.span or BlockSpan(0, first.size, 1, 0, 0, "")
        indexer.time_rows(first.file, span, 1)  # libraries load on first use
        seconds, size = indexer.time_rows(first.file, span, TIMED_ROWS)
    except BLOCK_ERRORS:
        return most  # the job will say what is wrong
    alone_s = seconds / size * work.total_bytes
    processes = most if options.processes or alone_s > ALONE_S else 1
    if options.limit_s and alone_s / processes > options.limit_s:
        found = (
            f"the index of {work.total_bytes / 2**30:,.2f} GiB of rows is missing, and building it would take about"
            f" {alone_s / processes:,.0f} s with {processes} processes"
        )
        fix = f"build it beforehand: sicog index --config {shlex.quote(str(config))}; or raise the limit"
        raise ConfigError([ConfigProblem("data.index_limit_s", options.limit_s, found, fix)])
    return processes


def _run(
    experiment: Experiment, store: IndexStore, work: _Work, processes: int, report: TellProgress
) -> Iterator[JobDone]:
    """Runs all jobs; notes each file as soon as all its blocks are there."""
    started, rows, done_bytes = time.monotonic(), 0, 0
    for done in run_jobs(experiment, work.jobs, processes):
        if done is not None:
            job, seen = done.job, work.files[done.job.place]
            seen.open_jobs -= 1
            done_bytes, rows = done_bytes + job.size, rows + done.built_rows
            if done.error is not None:
                work.problems.append(_problem(job.file, done.error))
            else:
                seen.spans = seen.spans if job.span else (done.span,)
                if not seen.open_jobs:
                    store.note(seen.file, seen.stamp, seen.looked_at_ns, seen.spans)
                yield done
        report(IndexProgress(rows, done_bytes, work.total_bytes, time.monotonic() - started))


def _problem(file: DataFile, error: Exception) -> ConfigProblem:
    if isinstance(error, FileChanged):
        return ConfigProblem(f"data.sources[{file.number}].path", str(file.path), str(error), "index it when it rests")
    return file_problem(file, error)
