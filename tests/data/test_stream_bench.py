"""The figures of the stream are right, and those of the planner beat those of best fit in small windows."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sicog_mcore.data.deal import PackCost
from sicog_mcore.data.plan import PackPlan
from sicog_mcore.data.stream_bench import MIXES, bench_data, draw_sizes, plain_figures, show_figures, uneven

QWEN2_7B = PackCost(token=39_151_730_688, attention=602_112, slice=1_222_045_126_656)


def pack(tokens: int, slices: int = 0) -> PackPlan:
    return PackPlan(0, 0, 0, (0,), tokens, slices, 0)


def test_unevenness_is_the_slowest_beside_the_mean() -> None:
    tokens = PackCost()
    packs = [pack(3), pack(1), pack(2), pack(2), pack(9)]  # the last one makes no whole step
    assert uneven(packs, 2, 1, tokens, tokens, is_dealt=False) == (3 + 2) / (2 + 2)
    assert uneven(packs, 2, 2, tokens, tokens, is_dealt=False) == 5 / 4
    assert uneven(packs, 2, 2, tokens, tokens, is_dealt=True) == 1.0
    assert uneven(packs, 8, 1, tokens, tokens, is_dealt=True) == 0.0
    assert uneven([pack(1, 4), pack(1, 0)], 2, 1, tokens, PackCost(0, 0, 1), is_dealt=True) == 2.0


@pytest.mark.parametrize("mix", MIXES)
def test_sizes_fit_a_pack_and_are_those_of_the_seed(mix: str) -> None:
    sizes, again = draw_sizes(mix, 500, seed=1), draw_sizes(mix, 500, seed=1)
    assert np.array_equal(sizes.num_tokens, again.num_tokens)
    assert not np.array_equal(sizes.num_tokens, draw_sizes(mix, 500, seed=2).num_tokens)
    assert 0 < sizes.num_tokens.min() and sizes.num_tokens.max() <= 8192 and sizes.num_slices.max() <= 7
    assert sizes.shards.tolist() == [0, 500] and len(sizes) == 500


def test_both_planners_are_measured_in_one_run() -> None:
    figures = bench_data(QWEN2_7B, mixes=("cod", "sft"), rows=8192, repeats=1)
    assert [(one.mix, one.planner) for one in figures] == [
        (mix, planner) for mix in ("cod", "sft") for planner in ("windows", "planned")
    ]
    for before, now in (figures[:2], figures[2:]):
        assert now.fill >= 0.99 and now.fill > before.fill and now.packs < before.packs
        assert now.stragglers["32 x 1"] <= 1.02 and now.stragglers["256 x 1"] <= 1.05
        for name in ("32 x 1", "32 x 4", "256 x 1"):  # 256 x 4 packs are more than there are
            assert 1 <= now.stragglers[name] < before.stragglers[name] and 1 <= now.slices[name] < before.slices[name]
        assert before.opened["32"] - now.opened["32"] == pytest.approx(1.0, abs=0.02)
        assert now.opened["32"] <= 1.25 / 32 and now.rows_per_s > 0
    assert json.loads(json.dumps(plain_figures(figures)))[1]["fill"] == figures[1].fill
    assert show_figures(figures).splitlines()[0].startswith("cod    windows ")
