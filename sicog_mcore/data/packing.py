"""Which samples share a packed sequence: full packs that all cost about the same.

In: tokens, slices and attention of samples   Out: the pack of each   Next: plan.py
Pure functions of integers: the same sizes give the same packs on every machine. A sample is never split.

Many samples are dealt and traded (trading.py) into as few packs as their sum needs, all of them nearly equal in tokens,
slices and attention; what is still over a budget then moves to a gap by best fit. Where samples are few, or so large that
the sum says little about the number of packs, best fit decreasing alone packs them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sicog_mcore.data.row_sizes import Integers
from sicog_mcore.data.trading import deal_and_trade

FEWEST_TRADED = 16  # packs; among fewer ones there is not enough choice for trades to fill them
SPARE = 0.003  # of the token budget that a traded pack leaves free, so that small deviations stay inside the budget
GOOD_ENOUGH = 1.01  # times the least possible number of packs, above which best fit is tried too
PACK_BITS = 32


class PackBudgets(NamedTuple):
    """Most tokens and most slices of a pack."""

    tokens: int
    slices: int


def pack_samples(num_tokens: Integers, num_slices: Integers, attention: Integers, budgets: PackBudgets) -> Integers:
    """Groups samples into packs that keep both budgets.

    Args:
        num_tokens: int64 [n]
        num_slices: int64 [n]
        attention: int64 [n]; sum of squared segment lengths.
        budgets: of one pack.

    Returns:
        int64 [n]: number of each sample's pack, from 0 on, without gaps.

    Raises:
        ValueError: a sample alone exceeds a budget.
    """
    too_large = np.flatnonzero((num_tokens > budgets.tokens) | (num_slices > budgets.slices))
    if len(too_large):
        first = int(too_large[0])
        found = f"sample {first} has {num_tokens[first]} tokens and {num_slices[first]} slices"
        raise ValueError(f"{found}, a pack takes {budgets.tokens} tokens and {budgets.slices} slices")
    least = max(int(num_tokens.sum()) / budgets.tokens, int(num_slices.sum()) / budgets.slices)
    if least < FEWEST_TRADED:
        return best_fit(num_tokens, num_slices, budgets)
    packs = _trade(num_tokens, num_slices, attention, budgets, least)
    if _count(packs) <= least * GOOD_ENOUGH:
        return packs
    fitted = best_fit(num_tokens, num_slices, budgets)
    return fitted if _count(fitted) < _count(packs) else packs


def best_fit(num_tokens: Integers, num_slices: Integers, budgets: PackBudgets) -> Integers:
    """Best-fit decreasing: the largest samples first, each into the fullest pack that still takes it.

    Returns:
        int64 [n]: as ``pack_samples``.
    """
    share = np.maximum(num_tokens * budgets.slices, num_slices * budgets.tokens)
    packs = np.empty(len(num_tokens), np.int64)
    _place(np.argsort(-share, kind="stable"), num_tokens, num_slices, budgets, (), packs)
    return packs


def _trade(
    num_tokens: Integers, num_slices: Integers, attention: Integers, budgets: PackBudgets, least: float
) -> Integers:
    """Packs of nearly equal size; samples that some of them cannot hold after all go to gaps, or to further packs."""
    num_packs = int(np.ceil(least * (1 + SPARE)))
    packs = deal_and_trade((num_tokens, num_slices, attention), num_packs, budgets.tokens)
    tokens = np.bincount(packs, num_tokens, num_packs).astype(np.int64)
    slices = np.bincount(packs, num_slices, num_packs).astype(np.int64)
    lost: list[int] = []
    for pack in np.flatnonzero((tokens > budgets.tokens) | (slices > budgets.slices)).tolist():
        members = np.flatnonzero(packs == pack)
        # The smallest first: they find a gap most easily, and the pack stays as full as it can be.
        for sample in members[np.argsort(num_tokens[members], kind="stable")].tolist():
            excess_tokens, excess_slices = tokens[pack] - budgets.tokens, slices[pack] - budgets.slices
            if excess_tokens <= 0 and excess_slices <= 0:
                break
            if excess_tokens <= 0 and num_slices[sample] == 0:
                continue  # it is the slices that are too many
            tokens[pack] -= num_tokens[sample]
            slices[pack] -= num_slices[sample]
            lost.append(sample)
    if lost:
        order = np.array(lost)
        left = zip((budgets.tokens - tokens).tolist(), (budgets.slices - slices).tolist(), strict=True)
        order = order[np.argsort(-num_tokens[order], kind="stable")]
        _place(order, num_tokens, num_slices, budgets, list(left), packs)
    # A pack that was dealt no sample, or lost them all, is none.
    return np.unique(packs, return_inverse=True)[1].astype(np.int64)


class _Gaps:
    """The room that open packs have left, ordered by the size that fills them first.

    A gap and its pack are one integer, the gap in the high bits: a sorted list of plain integers is searched and
    changed faster than any structure of objects.
    """

    def __init__(self, budget: int, other_budget: int) -> None:
        self._budget, self._other_budget = budget, other_budget
        self._others: list[int] = []
        self._gaps: list[int] = []

    def add(self, left: int, other_left: int) -> None:
        """Adds a pack with so much left of both budgets."""
        insort(self._gaps, left << PACK_BITS | len(self._others))
        self._others.append(other_left)

    def take(self, size: int, other: int) -> int:
        """Puts a sample into the pack with the smallest gap that takes it, or into a new one; returns the pack."""
        at = bisect_left(self._gaps, size << PACK_BITS)
        while at < len(self._gaps):
            gap = self._gaps[at]
            pack = gap & ((1 << PACK_BITS) - 1)
            if self._others[pack] >= other:
                del self._gaps[at]
                insort(self._gaps, gap - (size << PACK_BITS))
                self._others[pack] -= other
                return pack
            at += 1
        self.add(self._budget - size, self._other_budget - other)
        return len(self._others) - 1


def _place(
    order: Integers,
    num_tokens: Integers,
    num_slices: Integers,
    budgets: PackBudgets,
    left: Sequence[tuple[int, int]],
    packs: Integers,
) -> None:
    """Puts samples into the packs that have (tokens, slices) left, and into new ones; notes in ``packs`` which."""
    tokens, slices = num_tokens[order].tolist(), num_slices[order].tolist()
    # Ordered by the size that hardly matters, every search would walk over all the packs that the other one has filled.
    by_slices = int(num_slices.sum()) * budgets.tokens > int(num_tokens.sum()) * budgets.slices
    gaps = _Gaps(budgets.slices, budgets.tokens) if by_slices else _Gaps(budgets.tokens, budgets.slices)
    for tokens_left, slices_left in left:
        gaps.add(*((slices_left, tokens_left) if by_slices else (tokens_left, slices_left)))
    sizes = zip(slices, tokens, strict=True) if by_slices else zip(tokens, slices, strict=True)
    packs[order] = [gaps.take(*size) for size in sizes]


def _count(packs: Integers) -> int:
    return int(packs.max()) + 1
