"""Which packs make an optimiser step, and which replica computes which of them.

In: PackPlans in the order of the stream   Out: the steps, one replica's share of each   Next: loader.py
The packs of a step are the same for any number of replicas. Only who computes which depends on it: every replica gets
equally many, and about equally much work. All replicas deal alike from the same plans, so nothing is communicated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice

from sicog_mcore.data.plan import PackPlan, WindowPlan
from sicog_mcore.data.resume import LoaderState


@dataclass(frozen=True)
class PackCost:
    """The cost that computing a pack has, in FLOPs or any other unit; the default counts tokens.

    Attributes:
        token: of each token.
        attention: of each unit of the sum of squared segment lengths.
        slice: of each image slice.
    """

    token: int = 1
    attention: int = 0
    slice: int = 0

    def of(self, plan: PackPlan) -> int:
        """The cost of a pack, exact."""
        return self.token * plan.num_tokens + self.attention * plan.attention + self.slice * plan.num_slices


@dataclass(frozen=True)
class PackTask:
    """One pack of the stream, or of a replica's share of it.

    Attributes:
        plan: the pack.
        entered: windows whose bad samples are to be reported with this pack.
        after: position behind it; in a share, behind the step, on the step's last task alone.
        rows_left: of the epoch, behind that position.
    """

    plan: PackPlan
    entered: tuple[WindowPlan, ...]
    after: LoaderState | None
    rows_left: int


def group_steps(stream: Iterator[PackTask], packs_per_step: int, multiple: int) -> Iterator[list[PackTask]]:
    """Packs of all replicas for one optimiser step after the other.

    Args:
        stream: all packs.
        packs_per_step: 0 if a step is what was packed together, in as many packs as that took.
        multiple: what the number of packs is then a multiple of; blank packs fill up.
    """
    if packs_per_step:
        while True:
            yield list(islice(stream, packs_per_step))
    for _, window in groupby(stream, key=lambda task: (task.plan.epoch, task.plan.window)):
        step = list(window)
        plan = step[-1].plan
        blank = replace(step[-1], plan=PackPlan(plan.epoch, plan.window, plan.pack, members=()), entered=())
        yield step + [blank] * (-len(step) % multiple)


def share_step(step: Sequence[PackTask], rank: int, size: int, cost: PackCost) -> list[PackTask]:
    """The packs of a step that a replica computes, in the order of the stream.

    Args:
        step: of a multiple of ``size`` packs.
        rank: number of the replica.
        size: number of replicas.
        cost: what is made equal.
    """
    # All windows of a step are reported with it, so that a restart at any step reports each of them once.
    entered = tuple(window for task in step for window in task.entered)
    places = deal([cost.of(task.plan) for task in step], size)[rank]
    mine = [replace(step[place], entered=(), after=None, rows_left=0) for place in places]
    mine[-1] = replace(step[-1], plan=mine[-1].plan, entered=entered)
    return mine


def deal(costs: Sequence[int], size: int) -> list[list[int]]:
    """Shares packs out: in every round the most expensive ones left go to the replicas with the least so far.

    Args:
        costs: of each pack; a multiple of ``size``.
        size: number of replicas.

    Returns:
        The places in ``costs`` of every replica's packs, ascending; equally many for each.
    """
    if len(costs) == size:
        return [[place] for place in range(size)]
    by_cost = sorted(range(len(costs)), key=lambda place: -costs[place])
    shares: list[list[int]] = [[] for _ in range(size)]
    loads = [0] * size
    for first in range(0, len(costs), size):
        by_load = sorted(range(size), key=loads.__getitem__)
        for replica, place in zip(by_load, by_cost[first : first + size], strict=True):
            shares[replica].append(place)
            loads[replica] += costs[place]
    return [sorted(share) for share in shares]
