"""The deterministic stream of packed batches, shared out over data-parallel replicas.

In: Experiment, OpenRows   Out: PackedBatch, one replica's share   Next: parallel/distribute.py, train/trainer.py
plan.py says which rows share a pack, deal.py which packs are this replica's, workers.py decodes these alone. A sample that
fails while it is decoded leaves a hole in its pack; nothing else moves, so a position is three integers, which hold for the
rows and settings that they were counted with: see resume.py.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from sicog_mcore.config import Experiment
from sicog_mcore.data.batch import PackedBatch
from sicog_mcore.data.deal import PackCost, PackTask, group_steps, share_step
from sicog_mcore.data.encode import Encoder
from sicog_mcore.data.plan import PackPlan, WindowPlan, WindowPlanner
from sicog_mcore.data.quarantine import BadRows, Quarantine, Rejection
from sicog_mcore.data.resume import START, LoaderState, OpenRows, open_rows
from sicog_mcore.data.workers import PackBuilder, PackDecoder
from sicog_mcore.errors import DataError

TOKENS_ONLY = PackCost()


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
        cost: of a pack, which is made equal for the replicas; the same on all of them.
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
        cost: PackCost = TOKENS_ONLY,
    ) -> None:
        data, model = experiment.data, experiment.model
        self._packs_per_step = experiment.packs_per_step
        assert self._packs_per_step % size == 0, f"{self._packs_per_step} packs cannot be shared by {size} replicas"
        parallel = experiment.parallel
        # The interleaved schedule takes micro-batches in groups of as many as there are stages.
        self._packs_multiple = size * (parallel.pipeline if parallel.virtual_pipeline > 1 else 1)
        rows = (opened or open_rows(experiment)).rows
        self.num_rows = len(rows.all)
        self.notes = rows.all.notes
        self._planner = WindowPlanner(rows, data, experiment.train.seed, experiment.train.samples_per_step)
        self._rank, self._size, self._cost = rank, size, cost
        self._quarantine = quarantine
        self._planned_bad = quarantine.count_rows()  # as far as windows are planned; equal on all replicas
        self._unreported: deque[WindowPlan] = deque()  # planned, but not yet consumed
        self._state = state
        self._rows_left = self._planner.num_rows(state.epoch)
        self.bad_rows = quarantine.count_rows()
        self.found: list[tuple[PackPlan, Rejection]] = []
        self._planning = ThreadPoolExecutor(1, thread_name_prefix="window-planner")
        self._pending: deque[PackTask] = deque()  # announced to the workers, not yet consumed
        builder = PackBuilder(rows, Encoder(model, data), model, data)
        self._decoder = PackDecoder(builder, self._announce(state), data, pin_memory)
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
        batch, rejected = next(self._decoder)
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
        self._decoder.close()
        self._planning.shutdown(wait=False, cancel_futures=True)

    def _announce(self, state: LoaderState) -> Iterator[PackPlan]:
        """This replica's packs, step by step."""
        for step in group_steps(self._stream(state), self._packs_per_step, self._packs_multiple):
            for task in share_step(step, self._rank, self._size, self._cost):
                self._pending.append(task)
                yield task.plan

    def _stream(self, state: LoaderState) -> Iterator[PackTask]:
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
                yield PackTask(plan, entered, after, rows_left or self._planner.num_rows(after.epoch))
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
