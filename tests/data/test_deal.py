"""Steps are the same for any number of replicas, which share them in equal numbers of packs and about equal work."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sicog_mcore.config import DataConfig
from sicog_mcore.data.deal import PackCost, PackTask, deal, group_steps, share_step
from sicog_mcore.data.plan import PackPlan
from sicog_mcore.data.resume import LoaderState
from sicog_mcore.data.stream_bench import MIXES, draw_sizes, plan_epoch, uneven

COST = PackCost(token=7, attention=2, slice=1000)
QWEN2_7B = PackCost(token=39_151_730_688, attention=602_112, slice=1_222_045_126_656)


def task(number: int, window: int = 0) -> PackTask:
    plan = PackPlan(
        0, window, number, (number,), num_tokens=10 + number * 37 % 11, num_slices=number % 5, attention=number
    )
    return PackTask(plan, (), LoaderState(0, window, number + 1), 0)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40), st.integers(1, 8))
def test_every_pack_is_dealt_once_and_everyone_gets_as_many(costs: list[int], size: int) -> None:
    costs = costs[: len(costs) // size * size]
    shares = deal(costs, size)
    assert sorted(place for share in shares for place in share) == list(range(len(costs)))
    assert {len(share) for share in shares} == {len(costs) // size} if costs else shares == [[]] * size
    assert all(share == sorted(share) for share in shares)
    loads = [sum(costs[place] for place in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)


def test_one_pack_each_is_dealt_in_the_order_of_the_stream() -> None:
    assert deal([5, 9, 1], 3) == [[0], [1], [2]]


def test_dealing_makes_the_work_equal() -> None:
    costs = [100, 1, 1, 100, 50, 51]
    loads = [sum(costs[place] for place in share) for share in deal(costs, 2)]
    assert sorted(loads) == [151, 152]


@settings(deadline=None)
@given(st.sampled_from((1, 2, 3, 4, 6, 12)))
def test_the_step_is_the_same_for_any_number_of_replicas(size: int) -> None:
    step = [task(number) for number in range(12)]
    shares = [share_step(step, rank, size, COST) for rank in range(size)]
    assert sorted(one.plan.pack for share in shares for one in share) == list(range(12))
    for share in shares:
        assert [one.plan.pack for one in share] == sorted(one.plan.pack for one in share)
        assert [one.after for one in share] == [None] * (len(share) - 1) + [LoaderState(0, 0, 12)]


def test_a_step_that_counts_packs_runs_over_windows() -> None:
    stream = iter([task(0), task(1), task(0, window=1), task(1, window=1), task(0, window=2), task(1, window=2)])
    steps = [[(one.plan.window, one.plan.pack) for one in step] for step in islice(group_steps(stream, 3, 1), 2)]
    assert steps == [[(0, 0), (0, 1), (1, 0)], [(1, 1), (2, 0), (2, 1)]]


def test_a_step_that_counts_samples_is_a_window_with_blanks() -> None:
    stream = iter([task(0), task(1), task(2), task(0, window=1)])
    steps = list(group_steps(stream, 0, 2))
    assert [len(step) for step in steps] == [4, 2]
    assert steps[0][3].plan == PackPlan(0, 0, 2, ()) and steps[1][1].plan.members == ()
    assert COST.of(steps[0][3].plan) == 0 and COST.of(steps[0][1].plan) == 7 * 14 + 2 + 1000  # 14 tokens, 1 slice


@pytest.mark.parametrize("mix", MIXES)
def test_the_slowest_of_many_replicas_is_hardly_slower_than_the_mean(mix: str) -> None:
    data = DataConfig(token_budget=8192, slice_budget=64)
    packs = [pack for window in plan_epoch(draw_sizes(mix, 16_384, seed=0), data, 42) for pack in window]
    limits = {(32, 1): 1.02, (32, 4): 1.005, (256, 1): 1.05, (256, 4): 1.005}
    for (replicas, each), limit in limits.items():
        assert uneven(packs, replicas, each, QWEN2_7B, QWEN2_7B, is_dealt=True) <= limit, (replicas, each)
    slices = PackCost(0, 0, 1)
    assert uneven(packs, 32, 4, QWEN2_7B, slices, is_dealt=True) <= uneven(packs, 32, 4, slices, slices, is_dealt=False)
