"""The deterministic stream of packed batches, shared out over data-parallel replicas.

In: Experiment, OpenRows   Out: PackedBatch, one replica's share   Next: parallel/distribute.py, train/trainer.py
Every replica plans the same packs from texts and image headers, whatever their number, and decodes only its own.
A sample that fails while it is decoded leaves a hole in its pack; nothing else moves, so a position is three integers,
which hold for the rows and settings that they were counted with: see resume.py.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from sicog_mcore.config import DataConfig, Experiment, ModelConfig
from sicog_mcore.data.batch import EncodedSample, PackedBatch
from sicog_mcore.data.collate import collate
from sicog_mcore.data.encode import Encoder, Measured
from sicog_mcore.data.fingerprint import window_samples
from sicog_mcore.data.packing import PackPlan, pack_window
from sicog_mcore.data.quarantine import BadRows, Quarantine, Rejection
from sicog_mcore.data.resume import START, EpochRows, LoaderState, OpenRows, open_rows
from sicog_mcore.data.sample import Sample
from sicog_mcore.data.sources import SampleIndex
from sicog_mcore.errors import DataError, SampleError

T = TypeVar("T")
WORKER_REMEDY = "look for out-of-memory kills, or lower data.workers"


@dataclass(frozen=True)
class WindowPlan:
    """Samples that were packed together.

    Attributes:
        epoch: pass over the data.
        window: number of the window in it.
        num_rows: rows of the window, the bad ones too.
        epoch_rows: rows of the epoch.
        rows_after: rows of the epoch behind the window.
        packs: in the order of the stream; empty if no sample of the window can be used.
        rejected: by row of the data set.
        truncated: rows that lose the end of their answer.
    """

    epoch: int
    window: int
    num_rows: int
    epoch_rows: int
    rows_after: int
    packs: tuple[PackPlan, ...]
    rejected: Mapping[int, Rejection]
    truncated: tuple[int, ...]


class WindowPlanner:
    """Plans any window of any epoch: a function of rows, seed, epoch and window alone."""

    def __init__(self, rows: EpochRows, encoder: Encoder, data: DataConfig, seed: int) -> None:
        self._rows = rows
        self._encoder = encoder
        self._data = data
        self._seed = seed

    def num_rows(self, epoch: int) -> int:
        return len(self._rows.of(epoch))

    def num_windows(self, epoch: int) -> int:
        return -(-self.num_rows(epoch) // self._data.window_samples)

    def plan(self, epoch: int, window: int) -> WindowPlan:
        """Measures the samples of a window and packs them."""
        samples = self._rows.of(epoch)
        order = self._random(epoch).permutation(len(samples))
        start = window * self._data.window_samples
        members = order[start : start + self._data.window_samples].tolist()
        measured: dict[int, Measured] = {}
        rejected: dict[int, Rejection] = {}
        for row in members:
            outcome = _attempt(self._encoder.measure, samples, row, epoch)
            if isinstance(outcome, Rejection):
                rejected[row] = outcome
            else:
                measured[row] = outcome
        rows = list(measured)
        sizes = [(sample.num_tokens, sample.num_slices) for sample in measured.values()]
        packs = pack_window(sizes, self._data.token_budget, self._data.slice_budget)
        shuffled = self._random(epoch, window).permutation(len(packs)).tolist()
        plans = (
            PackPlan(epoch, window, place, tuple(rows[member] for member in packs[pack]))
            for place, pack in enumerate(shuffled)
        )
        return WindowPlan(
            epoch=epoch,
            window=window,
            num_rows=len(members),
            epoch_rows=len(samples),
            rows_after=len(samples) - start - len(members),
            packs=tuple(plans),
            rejected=rejected,
            truncated=tuple(row for row in rows if measured[row].is_truncated),
        )

    def after(self, plan: PackPlan, num_packs: int) -> LoaderState:
        """Position behind a pack of a window of ``num_packs``."""
        if plan.pack + 1 < num_packs:
            return LoaderState(plan.epoch, plan.window, plan.pack + 1)
        return LoaderState(*self.next_window(plan.epoch, plan.window))

    def next_window(self, epoch: int, window: int) -> tuple[int, int]:
        return (epoch, window + 1) if window + 1 < self.num_windows(epoch) else (epoch + 1, 0)

    def _random(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self._seed, *key]))


class PackBuilder(Dataset[tuple[PackedBatch, list[Rejection]]]):
    """Decodes the samples of a pack; what runs in the workers."""

    def __init__(self, rows: EpochRows, encoder: Encoder, model: ModelConfig, data: DataConfig) -> None:
        self._rows = rows
        self._encoder = encoder
        self._model = model
        self._data = data

    def __getitem__(self, plan: PackPlan) -> tuple[PackedBatch, list[Rejection]]:
        samples = self._rows.of(plan.epoch)
        outcomes = [_attempt(self._encoder.encode, samples, row, plan.epoch) for row in plan.members]
        batch = collate(
            [outcome for outcome in outcomes if isinstance(outcome, EncodedSample)],
            token_budget=self._data.token_budget,
            pad_id=self._encoder.chat.pad_id,
            queries=self._model.resampler.queries,
            patch_dim=self._model.tower.patch_dim,
        )
        return batch, [outcome for outcome in outcomes if isinstance(outcome, Rejection)]


def _attempt(use: Callable[[Sample], T], samples: SampleIndex, row: int, epoch: int) -> T | Rejection:
    """Uses one sample, or says why it cannot be used."""
    sample_id = f"row {row}"
    try:
        sample = samples.read(row)
        sample_id = sample.id
        return use(sample)
    except SampleError as error:
        return Rejection(sample_id, samples.origin(row), error.reason, error.detail, epoch)


@dataclass(frozen=True)
class _Task:
    """One pack of this replica.

    Attributes:
        plan: the pack.
        entered: windows whose bad samples are to be reported with this pack.
        after: position behind the step, on the step's last task.
        rows_left: of the epoch, behind that position.
    """

    plan: PackPlan
    entered: tuple[WindowPlan, ...]
    after: LoaderState | None
    rows_left: int


class Loader(Iterator[PackedBatch]):
    """Endless iterator over one replica's batches; ``ends_step`` says which is the last one of an optimiser step.

    Args:
        experiment: data, model sizes, seed and packs per step.
        rank: this replica among the data-parallel ones.
        size: number of replicas; divides the packs of a step.
        quarantine: takes the bad samples of this replica.
        state: where to start.
        pin_memory: put batches into page-locked memory (needs CUDA).
        opened: the data sets, if they are open already; otherwise ``experiment`` says which to open.
    """

    def __init__(
        self,
        experiment: Experiment,
        rank: int,
        size: int,
        quarantine: Quarantine,
        state: LoaderState = START,
        pin_memory: bool = False,
        opened: OpenRows | None = None,
    ) -> None:
        data, model = experiment.data, experiment.model
        self._packs_per_step = experiment.packs_per_step
        assert self._packs_per_step % size == 0, f"{self._packs_per_step} packs cannot be shared by {size} replicas"
        data = replace(data, window_samples=window_samples(experiment))
        parallel = experiment.parallel
        # The interleaved schedule takes micro-batches in groups of as many as there are stages.
        self._packs_multiple = size * (parallel.pipeline if parallel.virtual_pipeline > 1 else 1)
        rows, encoder = (opened or open_rows(experiment)).rows, Encoder(model, data)
        self.num_rows = len(rows.all)
        self.notes = rows.all.notes
        self._planner = WindowPlanner(rows, encoder, data, experiment.train.seed)
        self._builder = PackBuilder(rows, encoder, model, data)
        self._data = data
        self._rank, self._size = rank, size
        self._quarantine = quarantine
        self._planned_bad = quarantine.count_rows()  # as far as windows are planned; equal on all replicas
        self._unreported: deque[WindowPlan] = deque()  # planned, but not yet consumed
        self._state = state
        self._rows_left = self._planner.num_rows(state.epoch)
        self.bad_rows = quarantine.count_rows()
        self.found: list[tuple[PackPlan, Rejection]] = []
        self._pin_memory = pin_memory
        self._planning = ThreadPoolExecutor(1, thread_name_prefix="window-planner")
        # A new thread starts on device 0; pages must be locked for this rank's own.
        select_device = partial(torch.cuda.set_device, torch.cuda.current_device()) if pin_memory else None
        self._fetching = ThreadPoolExecutor(1, thread_name_prefix="batch-fetcher", initializer=select_device)
        self._workers: list[BaseProcess] = []
        self._pending: deque[_Task] = deque()  # announced to the workers, not yet consumed
        self._batches = self._decode(state)
        self._ends_step = True
        self.wait_s = 0.0

    def __next__(self) -> PackedBatch:
        """The next batch; blocks until it is decoded.

        What decoding finds bad is left in ``found``: whoever reads this replica counts it in ``bad_rows`` with that of
        the others, and asks for the verdict.

        Raises:
            DataError: planning found too many bad rows, or nothing usable in a whole epoch; a worker died or hangs.
        """
        started = time.perf_counter()
        batch, rejected = self._fetch()
        self.wait_s += time.perf_counter() - started
        task = self._pending.popleft()
        self._report(task.entered)
        for rejection in rejected:
            self._quarantine.record(rejection)
            self.found.append((task.plan, rejection))
        self._ends_step = task.after is not None
        if task.after is not None:
            self._state, self._rows_left = task.after, task.rows_left
        return batch

    @property
    def ends_step(self) -> bool:
        """Whether the last batch was the last one of an optimiser step."""
        return self._ends_step

    def state(self) -> LoaderState:
        """Where the first step begins that is not wholly consumed."""
        return self._state

    @property
    def rows_left(self) -> int:
        """Rows of that epoch that are still to come."""
        return self._rows_left

    def close(self) -> None:
        """Ends the workers and the threads."""
        self._kill_workers()
        self._fetching.shutdown()
        self._batches.close()
        self._planning.shutdown(wait=False, cancel_futures=True)

    def _fetch(self) -> tuple[PackedBatch, list[Rejection]]:
        # In a thread: whatever stops (a worker, its pipe, the storage under the planner), this one goes on.
        fetched = self._fetching.submit(next, self._batches)
        try:
            return fetched.result(timeout=self._data.worker_timeout_s)
        except TimeoutError as error:
            self._kill_workers()  # so that the thread ends, and the process can
            found = f"no batch within data.worker_timeout_s ({self._data.worker_timeout_s} s)"
            raise DataError(f"{found}; is the storage slow, or a worker stuck?") from error
        except (EOFError, ConnectionError) as error:  # a worker died with a batch half handed over
            raise DataError(f"decoding stopped: a worker died; {WORKER_REMEDY}") from error
        except RuntimeError as error:
            # torch tells a dead worker from a worker's own error by these words only
            if not str(error).startswith("DataLoader worker"):
                raise
            raise DataError(f"decoding stopped: {error}; {WORKER_REMEDY}") from error

    def _kill_workers(self) -> None:
        for worker in self._workers:
            worker.kill()

    def _decode(self, state: LoaderState) -> Generator[tuple[PackedBatch, list[Rejection]], None, None]:
        """Decoded packs from ``state`` on, in order; workers start with the first one."""
        others = set(active_children())
        batches = iter(
            DataLoader(
                self._builder,
                batch_size=None,
                sampler=self._announce(state),
                num_workers=self._data.workers,
                multiprocessing_context="spawn" if self._data.workers else None,
                pin_memory=self._pin_memory,
                generator=torch.Generator(),  # otherwise the workers' seeds are drawn from the model's random stream
            )
        )
        self._workers = [process for process in active_children() if process not in others]
        yield from batches

    def _announce(self, state: LoaderState) -> Iterator[PackPlan]:
        for task in self._tasks(state):
            self._pending.append(task)
            yield task.plan

    def _tasks(self, state: LoaderState) -> Iterator[_Task]:
        """This replica's packs, step by step."""
        for step in self._steps(state):
            # All windows of a step are reported with it, so that a restart at any step reports each of them once.
            entered = tuple(window for task in step for window in task.entered)
            mine = [task.plan for task in step[self._rank :: self._size]]
            for plan in mine[:-1]:
                yield _Task(plan, (), None, 0)
            yield _Task(mine[-1], entered, step[-1].after, step[-1].rows_left)

    def _steps(self, state: LoaderState) -> Iterator[list[_Task]]:
        """Packs of all replicas for one optimiser step after the other."""
        stream = self._stream(state)
        if self._packs_per_step:
            while True:
                yield list(islice(stream, self._packs_per_step))
        for _, window in groupby(stream, key=lambda task: (task.plan.epoch, task.plan.window)):
            step = list(window)  # the samples of one step; every replica gets the same number of packs
            last = step[-1]
            blank = replace(last, plan=replace(last.plan, members=()), entered=())
            yield step + [blank] * (-len(step) % self._packs_multiple)

    def _stream(self, state: LoaderState) -> Iterator[_Task]:
        """All packs of all replicas, over windows and epochs, with the position behind each."""
        entered: tuple[WindowPlan, ...] = ()
        num_empty = 0
        first = state.pack
        for window in self._windows(state.epoch, state.window):
            if first == 0:
                entered += (window,)
                self._unreported.append(window)
            num_empty = 0 if window.packs else num_empty + 1
            if num_empty == self._planner.num_windows(window.epoch):
                self._report(list(self._unreported))
                raise DataError(f"no sample of a whole epoch can be used; {self._quarantine.summary()}")
            if first == 0:
                self._judge(window)
            rows_left = window.rows_after + sum(len(plan.members) for plan in window.packs[first:])
            for plan in window.packs[first:]:
                rows_left -= len(plan.members)
                after = self._planner.after(plan, len(window.packs))
                yield _Task(plan, entered, after, rows_left or self._planner.num_rows(after.epoch))
                entered = ()
            first = 0

    def _windows(self, epoch: int, window: int) -> Iterator[WindowPlan]:
        """Windows from one on, each planned while the one before is consumed."""
        if self._planner.num_windows(epoch) == 0:
            raise DataError("the data sets have no rows; look at data.sources")
        coming: Future[WindowPlan] = self._planning.submit(self._planner.plan, epoch, window)
        while True:
            plan = coming.result()
            epoch, window = self._planner.next_window(epoch, window)
            coming = self._planning.submit(self._planner.plan, epoch, window)
            yield plan

    def _judge(self, window: WindowPlan) -> None:
        """Stops the run as soon as planning has found too many bad rows, before any of the window is trained on."""
        self._planned_bad.forget_before(window.epoch)
        _count(self._planned_bad, window)
        if verdict := self._planned_bad.verdict():
            self._report(list(self._unreported))
            raise DataError(f"too many bad rows: {verdict}\n{self._quarantine.advice()}")

    def _report(self, windows: Iterable[WindowPlan]) -> None:
        """Records what planning found, this replica's share of the rows: every row is some replica's."""
        for window in windows:
            self._unreported.popleft()  # in the order of the stream
            _count(self.bad_rows, window)
            self._quarantine.count_truncated(sum(row % self._size == self._rank for row in window.truncated))
            for row, rejection in window.rejected.items():
                if row % self._size == self._rank:
                    self._quarantine.record(rejection)


def _count(bad_rows: BadRows, window: WindowPlan) -> None:
    bad_rows.enter(window.epoch, window.window, window.num_rows, window.epoch_rows, window.rejected.values())
