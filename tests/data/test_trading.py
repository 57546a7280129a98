"""Dealing and trading make packs alike in all sizes at once, and lose no sample."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sicog_mcore.data.row_sizes import Integers
from sicog_mcore.data.trading import deal_and_trade

BUDGET = 8192


def draw(seed: int, count: int) -> tuple[Integers, Integers, Integers]:
    random = np.random.default_rng(seed)
    tokens, slices = random.integers(50, 2000, count), random.integers(0, 8, count)
    return tokens, slices, tokens**2


def spread(size: Integers, packs: Integers) -> float:
    """Standard deviation over the packs, as a share of their mean."""
    loads = np.bincount(packs, size)
    return float(loads.std() / loads.mean())


def test_all_sizes_become_equal() -> None:
    sizes = draw(0, 2000)
    packs = deal_and_trade(sizes, 256, BUDGET)
    assert packs.shape == (2000,) and set(packs.tolist()) == set(range(256))
    assert spread(sizes[0], packs) <= 0.005  # what is not equal in tokens is padding
    assert spread(sizes[1], packs) < 0.05 and spread(sizes[2], packs) < 0.2
    at_random = np.random.default_rng(1).integers(0, 256, 2000)
    assert spread(sizes[0], at_random) > 0.2


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 200), st.integers(2, 40))
def test_every_sample_has_one_pack_and_order_of_machines_does_not_matter(seed: int, count: int, num_packs: int) -> None:
    sizes = draw(seed, count)
    packs = deal_and_trade(sizes, num_packs, BUDGET)
    assert packs.shape == (count,) and 0 <= packs.min() and packs.max() < num_packs
    assert np.array_equal(packs, deal_and_trade(sizes, num_packs, BUDGET))


def test_sizes_that_are_all_zero_do_not_count() -> None:
    tokens, _, attention = draw(3, 500)
    packs = deal_and_trade((tokens, np.zeros(500, np.int64), attention), 64, BUDGET)
    assert spread(tokens, packs) < 0.01
