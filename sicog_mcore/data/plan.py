"""Plans the stream of packs from numbers: no file is opened, whatever the data.

In: EpochRows with their RowSizes, seed   Out: WindowPlan, PackPlan   Next: deal.py, loader.py
Every replica plans the same packs, whatever their number: a plan is a function of the rows' sizes, the settings, the epoch
and the window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sicog_mcore.config import DataConfig
from sicog_mcore.data.packing import PackBudgets, pack_samples
from sicog_mcore.data.quarantine import Rejection
from sicog_mcore.data.resume import EpochRows, LoaderState
from sicog_mcore.data.row_order import PACKS, RowOrder, random_numbers
from sicog_mcore.data.row_sizes import USABLE, Integers, RowSizes


@dataclass(frozen=True)
class PackPlan:
    """One packed sequence before anything is decoded.

    Attributes:
        epoch: pass over the data.
        window: number of the window in it.
        pack: number of the pack in the window.
        members: rows of the data set.
        num_tokens: tokens of these together.
        num_slices: slices of these together.
        attention: sum of their squared segment lengths.
    """

    epoch: int
    window: int
    pack: int
    members: tuple[int, ...]
    num_tokens: int = 0
    num_slices: int = 0
    attention: int = 0


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
    """Plans any window of any epoch.

    Args:
        rows: with their sizes.
        data: budgets and rows of the shuffle buffer.
        seed: of the run.
        step_rows: rows that are packed together where a step counts samples; 0 packs a whole buffer together.
    """

    def __init__(self, rows: EpochRows, data: DataConfig, seed: int, step_rows: int = 0) -> None:
        self._rows = rows
        self._budgets = PackBudgets(data.token_budget, data.slice_budget)
        self._buffer_rows = data.window_samples
        self._step_rows = step_rows
        self._seed = seed
        self._orders: dict[int, RowOrder] = {}

    def num_rows(self, epoch: int) -> int:
        """Rows of an epoch, the bad ones too."""
        return len(self._rows.of(epoch))

    def num_windows(self, epoch: int) -> int:
        """Windows of an epoch."""
        return self._order(epoch).num_windows

    def plan(self, epoch: int, window: int) -> WindowPlan:
        """Packs the samples of a window."""
        order, sizes, samples = self._order(epoch), self._rows.sizes_of(epoch), self._rows.of(epoch)
        rows = order.rows(window)
        usable = sizes.reason[rows] == USABLE
        good = rows[usable]
        return WindowPlan(
            epoch=epoch,
            window=window,
            num_rows=len(rows),
            epoch_rows=order.num_rows,
            rows_after=order.num_rows - order.span(window).stop,
            packs=make_packs(sizes, good, self._budgets, (self._seed, epoch, window)),
            rejected={row: samples.rejection(row, epoch) for row in rows[~usable].tolist()},
            truncated=tuple(good[sizes.is_truncated[good]].tolist()),
        )

    def after(self, plan: PackPlan, num_packs: int) -> LoaderState:
        """Position behind a pack of a window of ``num_packs``."""
        if plan.pack + 1 < num_packs:
            return LoaderState(plan.epoch, plan.window, plan.pack + 1)
        return LoaderState(*self.next_window(plan.epoch, plan.window))

    def next_window(self, epoch: int, window: int) -> tuple[int, int]:
        """Epoch and window that follow."""
        return (epoch, window + 1) if window + 1 < self.num_windows(epoch) else (epoch + 1, 0)

    def _order(self, epoch: int) -> RowOrder:
        """The order of an epoch's rows; that of the epoch before stays too, since planning runs ahead."""
        if epoch not in self._orders:
            shards = np.asarray(self._rows.sizes_of(epoch).shards, np.int64)
            order = RowOrder(shards, self._buffer_rows, self._step_rows, self._seed, epoch)
            self._orders = {number: old for number, old in self._orders.items() if number == epoch - 1} | {epoch: order}
        return self._orders[epoch]


def make_packs(
    sizes: RowSizes, rows: Integers, budgets: PackBudgets, place: tuple[int, int, int]
) -> tuple[PackPlan, ...]:
    """Packs rows together: they keep their order inside a pack, the packs stand in random order.

    Args:
        sizes: of all rows.
        rows: int64 [n]; usable ones.
        budgets: of a pack.
        place: seed, epoch and window.
    """
    if not len(rows):
        return ()
    seed, epoch, window = place
    columns = [sizes.num_tokens[rows], sizes.num_slices[rows], sizes.attention[rows]]
    tokens, slices, attention = (np.asarray(column, np.int64) for column in columns)
    packs = pack_samples(tokens, slices, attention, budgets)
    num_packs = int(packs.max()) + 1
    shuffled = random_numbers(seed, epoch, PACKS, window).permutation(num_packs)[packs]
    by_pack = np.argsort(shuffled, kind="stable")
    borders = np.append(0, np.cumsum(np.bincount(shuffled, minlength=num_packs)))
    members = rows[by_pack].tolist()
    sums = [np.add.reduceat(column[by_pack], borders[:-1]).tolist() for column in (tokens, slices, attention)]
    spans = zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True)
    return tuple(
        PackPlan(epoch, window, number, tuple(members[start:stop]), *totals)
        for number, ((start, stop), totals) in enumerate(zip(spans, zip(*sums, strict=True), strict=True))
    )
