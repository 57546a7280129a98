"""Samples shared out over a given number of packs so that all of them are alike in several sizes at once.

In: sizes of samples, number of packs   Out: the pack of each   Next: packing.py
First every sample goes to one of the emptiest packs, the longest first. Then packs meet in pairs, all pairs at once, and
each swaps the two samples (or hands over the one) that make the pair most alike. Nothing here keeps a budget: packing.py
does.

Every number is an integer below 2**53, held as float64 where that is faster: sums and products are exact, so that all
machines find the same trades, whatever their processors do to the order of additions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sicog_mcore.data.row_sizes import Integers

# What a pack's mean in tokens, slices and attention counts as. The larger, the finer this size is made equal: a trade is
# worth the change of the sum of squared deviations. Tokens first, because what is not equal there is padding.
UNITS = (65536, 8192, 256)
ROUNDS = 30
OFFERED = 6  # places of each pack that a meeting looks at
LEAST_SHARE = 8  # in one round of dealing at least this part of the packs gets a sample

Floats = NDArray[np.float64]


def deal_and_trade(sizes: Sequence[Integers], num_packs: int, token_budget: int) -> Integers:
    """Shares samples out over packs.

    Args:
        sizes: int64 [n] each: tokens, slices, attention.
        num_packs: at least 2.
        token_budget: what dealing avoids to exceed.

    Returns:
        int64 [n]: the pack of each sample.
    """
    packs = _deal(sizes[0], num_packs, token_budget)
    count = len(packs)
    scaled = [_scale(size, unit, num_packs) for size, unit in zip(sizes, UNITS, strict=True)]
    # Deviations from one and the same whole number: a trade looks at differences of two packs only.
    loads = [np.bincount(packs, size[:count], num_packs).astype(np.float64) for size in scaled]
    table = _table(packs, num_packs)
    random = np.random.Generator(np.random.PCG64(num_packs))
    for number in range(ROUNDS):
        # The fullest packs meet the emptiest ones; between these rounds chance mixes who meets whom.
        meeting = np.argsort(loads[0], kind="stable") if number % 2 == 0 else random.permutation(num_packs)
        half = num_packs // 2
        _trade(table, scaled, loads, (meeting[:half], meeting[::-1][:half]), random)
    rows, columns = np.nonzero(table < count)
    packs[table[rows, columns]] = rows
    return packs


def _deal(num_tokens: Integers, num_packs: int, token_budget: int) -> Integers:
    """The longest samples first, each to one of the emptiest packs, many at once."""
    order = np.argsort(-num_tokens, kind="stable")
    packs = np.empty(len(num_tokens), np.int64)
    load = np.zeros(num_packs, np.int64)
    dealt = 0
    while dealt < len(order):
        emptiest = np.argsort(load, kind="stable")
        roomy = int(np.searchsorted(load[emptiest], token_budget - num_tokens[order[dealt]], side="right"))
        takers = emptiest[: min(max(roomy, -(-num_packs // LEAST_SHARE)), len(order) - dealt)]
        samples = order[dealt : dealt + len(takers)]
        packs[samples] = takers
        load[takers] += num_tokens[samples]
        dealt += len(takers)
    return packs


def _scale(size: Integers, unit: int, num_packs: int) -> Floats:
    """float64 [n + 1], whole numbers: sizes such that a pack's mean is about ``unit``; the last one, of no sample, is 0."""
    return np.append(size * (unit * num_packs) // max(1, int(size.sum())), 0).astype(np.float64)


def _table(packs: Integers, num_packs: int) -> Integers:
    """int64 [packs, places]: the samples of each pack; n stands for an empty place, of which every pack has one or more."""
    count = len(packs)
    members = np.bincount(packs, minlength=num_packs)
    order = np.argsort(packs, kind="stable")
    places = np.arange(count) - np.repeat(np.cumsum(members) - members, members)
    table = np.full((num_packs, int(members.max()) + 1), count)
    table[packs[order], places] = order
    return table


def _trade(
    table: Integers,
    scaled: Sequence[Floats],
    loads: Sequence[Floats],
    pairs: tuple[Integers, Integers],
    random: np.random.Generator,
) -> None:
    """One round of meetings: changes table and loads in place.

    Packs with loads L and M that give x and take y become L - x + y and M + x - y. Their sum of squared loads changes by
    twice (x - y)**2 - (x - y)(L - M), which falls apart into terms of x, terms of y and -2xy: a table of all offers
    of all pairs is a few products.
    """
    left, right = pairs
    width = table.shape[1]
    places = [random.permutation(width)[:OFFERED] for _ in pairs]
    gives, takes = table[left[:, None], places[0]], table[right[:, None], places[1]]  # [pairs, places]
    given = [size[gives] for size in scaled]
    taken = [size[takes] for size in scaled]
    worth = np.zeros((len(left), gives.shape[1], takes.shape[1]))
    of_given, of_taken = np.zeros(gives.shape), np.zeros(takes.shape)
    for x, y, load in zip(given, taken, loads, strict=True):
        ahead = (load[left] - load[right])[:, None]
        of_given += x * (x - ahead)
        of_taken += y * (y + ahead)
        worth -= (x + x)[:, :, None] * y[:, None, :]
    worth += of_given[:, :, None]
    worth += of_taken[:, None, :]
    flat = worth.reshape(len(left), -1)
    best = flat.argmin(axis=1)
    pair = np.flatnonzero(flat[np.arange(len(left)), best] < 0)
    i, j = np.divmod(best[pair], takes.shape[1])
    for x, y, load in zip(given, taken, loads, strict=True):
        moved = y[pair, j] - x[pair, i]
        load[left[pair]] += moved
        load[right[pair]] -= moved
    table[left[pair], places[0][i]] = takes[pair, j]
    table[right[pair], places[1][j]] = gives[pair, i]
