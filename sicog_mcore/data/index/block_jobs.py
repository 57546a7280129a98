"""Blocks are indexed one after the other, or by several processes that end with the one that started them.

In: BlockJob of each missing block   Out: JobDone, in the order in which they end   Next: block_rows.py
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache

from sicog_mcore.config import Experiment
from sicog_mcore.data.index.block_rows import BlockIndexer
from sicog_mcore.data.index.index_store import IndexStore
from sicog_mcore.data.index.row_blocks import BLOCK_ERRORS, BlockSpan
from sicog_mcore.data.sources import DataFile
from sicog_mcore.errors import MachineError
from sicog_mcore.files import hash_json

REPORT_EVERY_S = 1.0
AHEAD = 2  # jobs per process that are handed out
NO_SPAN = BlockSpan(0, 0, 1, 0, 0, "")


@dataclass(frozen=True)
class BlockJob:
    """A block to index.

    Attributes:
        place: of its file among those that are looked after.
        file: that holds it.
        span: the block; None for a shard, whose samples are found when it is indexed.
    """

    place: int
    file: DataFile
    span: BlockSpan | None

    @property
    def size(self) -> int:
        """Bytes of rows; of a shard all its bytes."""
        return self.span.length if self.span else self.file.path.stat().st_size


@dataclass(frozen=True)
class JobDone:
    """The result that a job came to.

    Attributes:
        span: the block.
        built_rows: rows that were indexed; 0 if its index was there already.
        error: why there is no index: one of BLOCK_ERRORS.
    """

    job: BlockJob
    span: BlockSpan
    built_rows: int
    error: Exception | None = None


class BlockWorker:
    """Does jobs of one experiment in this process."""

    def __init__(self, experiment: Experiment) -> None:
        self._store = IndexStore(experiment)
        self._indexer = BlockIndexer(experiment)

    def do(self, job: BlockJob) -> JobDone:
        """Indexes a block.

        Raises:
            MachineError: the disk is full or broken.
        """
        try:
            if job.span is not None:
                self._indexer.index_rows(job.file, job.span, self._store.block(job.file, job.span))
                return JobDone(job, job.span, job.span.rows)
            scan = self._indexer.scan_shard(job.file)
            span = scan.span()
            if self._store.table(job.file, span) is not None:
                return JobDone(job, span, 0)
            self._indexer.index_shard(scan, self._store.block(job.file, span))
            return JobDone(job, span, span.rows)
        except BLOCK_ERRORS as error:
            return JobDone(job, NO_SPAN, 0, error)


def run_jobs(experiment: Experiment, jobs: Sequence[BlockJob], processes: int) -> Iterator[JobDone | None]:
    """Does all jobs; None now and then where none has ended for a second.

    Args:
        processes: that work at the same time; 1 works in this one.

    Raises:
        MachineError: the disk is full or broken; a process died.
    """
    if processes > 1:
        yield from _run_in_processes(experiment, jobs, processes)
    elif jobs:
        worker = BlockWorker(experiment)
        yield from map(worker.do, jobs)


def _run_in_processes(experiment: Experiment, jobs: Sequence[BlockJob], processes: int) -> Iterator[JobDone | None]:
    given = _Given(experiment, hash_json(experiment.to_dict()))
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(os.getpid(),))
    rest = iter(jobs)
    try:
        pending: set[Future[JobDone]] = set()
        while True:
            while len(pending) < AHEAD * processes and (job := next(rest, None)) is not None:
                pending.add(pool.submit(_do, given, job))
            if not pending:
                return
            ended, pending = wait(pending, timeout=REPORT_EVERY_S, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in ended)
            if not ended:
                yield None
    except BrokenProcessPool as error:
        found = "a process that indexed rows died; look for out-of-memory kills, or take fewer processes"
        raise MachineError(f"{found}; the same command goes on, finished blocks are kept") from error
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Given:
    """An experiment that is the same as another where its key is."""

    experiment: Experiment = field(compare=False)
    key: str


def _do(given: _Given, job: BlockJob) -> JobDone:
    return _worker(given).do(job)


@lru_cache(maxsize=1)  # a process keeps its tokenizer from job to job
def _worker(given: _Given) -> BlockWorker:
    return BlockWorker(given.experiment)


def _begin(parent: int) -> None:
    """Makes a process end on an interrupt without a word, and when nobody waits for it any more."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(REPORT_EVERY_S)
    os._exit(1)
