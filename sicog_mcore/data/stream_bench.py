"""How full packs are, how even the replicas' work is, and how fast both are planned, beside best fit in small windows.

In: the name of a mix, PackCost   Out: StreamFigures of two planners   Next: plan.py, deal.py
Rows are drawn from a seed: their sizes are of the kind that the recipes have, no file is read. The planner to compare with
packs windows of 512 rows, taken from a new permutation of all rows each, by best fit, and replica r takes the packs
r, r + R, r + 2R ... of a step: what this package did before plan.py.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sicog_mcore.config import DataConfig
from sicog_mcore.data.deal import PackCost, deal
from sicog_mcore.data.packing import PackBudgets, best_fit
from sicog_mcore.data.plan import PackPlan, WindowPlanner
from sicog_mcore.data.resume import EpochRows
from sicog_mcore.data.row_order import random_numbers
from sicog_mcore.data.row_sizes import RowSizes
from sicog_mcore.data.sources import SampleIndex
from sicog_mcore.errors import DataError

SHARD_ROWS = 4096
BUDGETS = PackBudgets(tokens=8192, slices=64)
COMPARED_WINDOW = 512
REPLICAS = (32, 256)
VISUAL_TOKENS = 144  # of a slice
SLICES = (1, 3, 4, 5, 6, 7)  # the overview, and those that an image is cut into


@dataclass(frozen=True)
class MixedRows:
    """Rows of one kind, a part of a mix.

    Attributes:
        share: of the rows of the mix.
        slices: how likely each number of SLICES is; empty for rows without an image.
        median: tokens of text.
        spread: standard deviation of the logarithm of that number.
        least: tokens of text.
        most: tokens of text.
    """

    share: float
    slices: tuple[float, ...]
    median: int
    spread: float
    least: int
    most: int


ONE_SLICE = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
PHOTOS = (0.1, 0.15, 0.2, 0.25, 0.15, 0.15)
LARGE_PHOTOS = (0.05, 0.05, 0.1, 0.2, 0.2, 0.4)
MIXES: Mapping[str, tuple[MixedRows, ...]] = {
    "align": (MixedRows(1.0, ONE_SLICE, 48, 0.35, 20, 200),),
    "recap": (MixedRows(1.0, PHOTOS, 240, 0.35, 60, 800),),
    "cod": (MixedRows(1.0, LARGE_PHOTOS, 490, 0.35, 150, 1500),),
    "sft": (
        MixedRows(0.25, (), 400, 0.8, 30, 4000),
        MixedRows(0.6, PHOTOS, 180, 0.9, 20, 3000),
        MixedRows(0.15, (), 1500, 0.7, 200, 8000),
    ),
}


@dataclass(frozen=True)
class StreamFigures:
    """Figures that a planner reaches in an epoch; the median of several seeds.

    Attributes:
        mix: name of the rows' mix.
        planner: "planned" for plan.py and deal.py, "windows" for the planner to compare with.
        rows: of the epoch.
        packs: of the epoch.
        fill: share of the packs' positions that samples take.
        rows_per_s: rows planned per second of this process's own time.
        stragglers: by "<replicas> x <packs of each>": the time of the slowest replica, summed over all steps, beside that
            of the mean one; time is what PackCost says.
        slices: the same for image slices alone.
        opened: by number of replicas: images that one of them opens in an epoch, the busiest one, beside those that there
            are. Planned, that is its own share; the planner to compare with opens all of them to measure, then its share.
    """

    mix: str
    planner: str
    rows: int
    packs: int
    fill: float
    rows_per_s: float
    stragglers: Mapping[str, float]
    slices: Mapping[str, float]
    opened: Mapping[str, float]


def draw_sizes(mix: str, rows: int, seed: int, budgets: PackBudgets = BUDGETS) -> RowSizes:
    """Sizes of rows of a mix, in random order, in shards of SHARD_ROWS rows; those over a budget are left out."""
    draw = np.random.default_rng([seed, rows])
    kinds = MIXES[mix]
    kind = draw.choice(len(kinds), rows, p=[kind.share for kind in kinds])
    slices, text = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    for number, one in enumerate(kinds):
        here = np.flatnonzero(kind == number)
        drawn = draw.lognormal(np.log(one.median), one.spread, len(here))
        text[here] = np.clip(drawn, one.least, one.most).astype(np.int64)
        if one.slices:
            slices[here] = draw.choice(SLICES, len(here), p=one.slices)
    tokens = slices * VISUAL_TOKENS + np.maximum(slices - 1, 0) + text  # one separator between two slices
    fits = (tokens <= budgets.tokens) & (slices <= budgets.slices)
    tokens, slices, rows = tokens[fits], slices[fits], int(fits.sum())
    return RowSizes(
        num_tokens=tokens.astype(np.int32),
        num_slices=slices.astype(np.int32),
        attention=tokens**2,
        reason=np.zeros(rows, np.uint8),
        is_truncated=np.zeros(rows, np.bool_),
        shards=np.append(np.arange(0, rows, SHARD_ROWS), rows),
    )


class SizedRows(SampleIndex):
    """Rows that are planned but never read."""

    def __init__(self, rows: int) -> None:
        super().__init__([], [], "keep")
        self._rows = rows

    def __len__(self) -> int:
        return self._rows


def plan_epoch(sizes: RowSizes, data: DataConfig, seed: int) -> Iterator[Sequence[PackPlan]]:
    """The packs of an epoch, window by window, as training plans them."""
    planner = WindowPlanner(EpochRows(SizedRows(len(sizes)), all_sizes=sizes), data, seed)
    for window in range(planner.num_windows(0)):
        yield planner.plan(0, window).packs


def plan_windows(sizes: RowSizes, data: DataConfig, seed: int) -> Iterator[Sequence[PackPlan]]:
    """The packs of an epoch as the planner to compare with makes them."""
    for window, start in enumerate(range(0, len(sizes), COMPARED_WINDOW)):
        rows = random_numbers(seed, 0).permutation(len(sizes))[start : start + COMPARED_WINDOW]
        tokens, slices = sizes.num_tokens[rows].astype(np.int64), sizes.num_slices[rows].astype(np.int64)
        packs = best_fit(tokens, slices, PackBudgets(data.token_budget, data.slice_budget))
        plans = []
        for number, pack in enumerate(random_numbers(seed, 0, window).permutation(int(packs.max()) + 1).tolist()):
            members = rows[packs == pack]
            sums = (int(column[members].sum()) for column in (sizes.num_tokens, sizes.num_slices, sizes.attention))
            plans.append(PackPlan(0, window, number, tuple(members.tolist()), *sums))
        yield plans


PLANNERS: Mapping[str, Callable[[RowSizes, DataConfig, int], Iterator[Sequence[PackPlan]]]] = {
    "windows": plan_windows,
    "planned": plan_epoch,
}


def bench_data(
    cost: PackCost,
    mixes: Sequence[str] = tuple(MIXES),
    rows: int = 65_536,
    repeats: int = 3,
    data: DataConfig | None = None,
) -> list[StreamFigures]:
    """Plans an epoch of every mix with both planners, each ``repeats`` times with other rows; medians of these.

    Args:
        cost: of a pack.
        mixes: names in MIXES.
        rows: of an epoch.
        repeats: seeds.
        data: budgets and shuffle buffer; None for 8192 tokens and 64 slices.

    Raises:
        DataError: no row fits.
    """
    data = data or DataConfig(token_budget=8192, slice_budget=64)
    budgets = PackBudgets(data.token_budget, data.slice_budget)
    figures = []
    for mix in mixes:
        for name in PLANNERS:
            drawn = [draw_sizes(mix, rows, seed, budgets) for seed in range(repeats)]
            if not all(map(len, drawn)):
                raise DataError(f"no row of the mix {mix!r} fits into {budgets.tokens} tokens; raise the token budget")
            runs = [_measure(mix, name, sizes, data, cost, seed) for seed, sizes in enumerate(drawn)]
            figures.append(_median(runs))
    return figures


def show_figures(figures: Sequence[StreamFigures]) -> str:
    """A table for people."""
    lines = []
    for one in figures:
        head = f"{one.mix:6} {one.planner:8} {one.packs:7,} packs  fill {one.fill:.4f}  {one.rows_per_s:10,.0f} rows/s"
        slowest = "  ".join(f"{name} {_ratio(value)}" for name, value in one.stragglers.items())
        slices = "  ".join(f"{name} {_ratio(value)}" for name, value in one.slices.items())
        opened = "  ".join(f"{name} replicas {value:.4f}" for name, value in one.opened.items())
        lines += [
            head,
            f"       slowest replica / mean: {slowest}",
            f"       most slices / mean:     {slices}",
            f"       images opened by one:   {opened}",
        ]
    return "\n".join(lines)


def _ratio(value: float) -> str:
    return f"{value:.4f}" if value else "(too few packs)"


def plain_figures(figures: Sequence[StreamFigures]) -> list[dict[str, Any]]:
    """Gives the figures as JSON has them."""
    return [asdict(one) for one in figures]


def _measure(mix: str, planner: str, sizes: RowSizes, data: DataConfig, cost: PackCost, seed: int) -> StreamFigures:
    started = time.thread_time()
    packs = [pack for window in PLANNERS[planner](sizes, data, seed) for pack in window]
    elapsed = time.thread_time() - started
    stragglers, slices = {}, {}
    for replicas in REPLICAS:
        for each in (1, 4):
            name = f"{replicas} x {each}"
            stragglers[name] = uneven(packs, replicas, each, cost, cost, is_dealt=planner == "planned")
            slices[name] = uneven(packs, replicas, each, cost, PackCost(0, 0, 1), is_dealt=planner == "planned")
    tokens = sum(pack.num_tokens for pack in packs)
    return StreamFigures(
        mix=mix,
        planner=planner,
        rows=len(sizes),
        packs=len(packs),
        fill=tokens / (len(packs) * data.token_budget),
        rows_per_s=len(sizes) / elapsed,
        stragglers=stragglers,
        slices=slices,
        opened={str(replicas): _share_opened(packs, sizes, replicas) + (planner == "windows") for replicas in REPLICAS},
    )


def uneven(
    packs: Sequence[PackPlan], replicas: int, each: int, cost: PackCost, seen: PackCost, is_dealt: bool
) -> float:
    """The slowest replica's work beside the mean, over all whole steps; 1 is even, 0 says that no step is whole.

    Args:
        packs: in the order of the stream.
        replicas: number of replicas.
        each: packs of a replica and step.
        cost: what is dealt by.
        seen: what is counted.
        is_dealt: whether packs are dealt by cost, or in turn.
    """
    slowest = mean = 0.0
    for start in range(0, len(packs) - replicas * each + 1, replicas * each):
        step = packs[start : start + replicas * each]
        shares: Sequence[Sequence[int]] = [range(rank, len(step), replicas) for rank in range(replicas)]
        if is_dealt:
            shares = deal([cost.of(pack) for pack in step], replicas)
        loads: NDArray[np.float64] = np.array([sum(seen.of(step[place]) for place in share) for share in shares], float)
        slowest += loads.max()
        mean += loads.mean()
    return slowest / mean if mean else 0.0


def _share_opened(packs: Sequence[PackPlan], sizes: RowSizes, replicas: int) -> float:
    """Images in the packs of the replica that has most of them, beside all images; a row has one or none."""
    opened = np.zeros(replicas)
    for number, pack in enumerate(packs):
        opened[number % replicas] += np.count_nonzero(sizes.num_slices[list(pack.members)])
    return float(opened.max() / max(1, np.count_nonzero(sizes.num_slices)))


def _median(runs: Sequence[StreamFigures]) -> StreamFigures:
    def of(values: Sequence[float]) -> float:
        return float(statistics.median(values))

    return StreamFigures(
        mix=runs[0].mix,
        planner=runs[0].planner,
        rows=runs[0].rows,
        packs=int(of([run.packs for run in runs])),
        fill=of([run.fill for run in runs]),
        rows_per_s=of([run.rows_per_s for run in runs]),
        stragglers={name: of([run.stragglers[name] for run in runs]) for name in runs[0].stragglers},
        slices={name: of([run.slices[name] for run in runs]) for name in runs[0].slices},
        opened={name: of([run.opened[name] for run in runs]) for name in runs[0].opened},
    )
