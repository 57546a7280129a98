"""A report counts items and draws some of them."""

from __future__ import annotations

import pytest

from sicog_mcore.cognition.reporting.overview import choose_rows, describe_sampling, histogram, survey
from sicog_mcore.rollout.requests import Sampling
from tests.rounds import make_item

ITEMS = [
    *(make_item(f"k{i}", ["a", "b"]) for i in range(40)),
    *(make_item(f"d{i}", ["a", "b"], 0.6, reason="agreement") for i in range(12)),
    *(make_item(f"s{i}", ["a", "b"], 0.9, reason="too_short") for i in range(3)),
    make_item("f", []),
]


def test_counts_are_of_all_items() -> None:
    found = survey(ITEMS, seed=0)
    assert (found.items, found.scored, found.kept, found.rows) == (56, 55, 40, 40)
    assert list(found.reasons.items()) == [("kept", 40), ("agreement", 12), ("too_short", 3), ("image_missing", 1)]
    assert found.facts["Checkpoint"] == ("c0ffee",) and found.candidates == {"caption": 2}


def test_rows_are_drawn_evenly_over_the_reasons() -> None:
    order = survey(ITEMS, seed=0).order
    chosen = choose_rows(order, 20)
    drawn = [ITEMS[row].decision.reason for row in sorted(chosen)]
    # 1 and 3 are all there are; the 16 places left are shared by the other two
    assert [drawn.count(reason) for reason in ("image_missing", "too_short", "agreement", "kept")] == [1, 3, 8, 8]


def test_every_row_is_drawn_where_there_is_room() -> None:
    assert choose_rows(survey(ITEMS, seed=0).order, 56) == frozenset(range(56))


def test_the_draw_depends_on_the_seed_alone() -> None:
    first, again, other = (choose_rows(survey(ITEMS, seed).order, 20) for seed in (1, 1, 2))
    assert first == again != other


def test_bars_hold_their_lower_end() -> None:
    values = [(0.84, True), (0.859999, False), (0.86, False), (1.0, True), (0.999999, True)]
    bars = {round(bar.low, 2): (bar.kept, bar.dropped) for bar in histogram(values) if bar.kept + bar.dropped}
    assert bars == {0.84: (1, 1), 0.86: (0, 1), 0.98: (2, 0)}
    assert len(histogram(values)) == 25 and histogram(values)[0].low == 0.5


def test_bars_reach_down_to_negative_agreement() -> None:
    bars = histogram([(-0.05, False), (0.9, True)])
    assert bars[0].low == pytest.approx(-0.06) and bars[0].dropped == 1 and bars[-1].high == pytest.approx(1.0)


def test_sampling_is_told_in_full() -> None:
    assert describe_sampling(Sampling()) == "temperature 0.7, top-p 0.9, no top-k, at most 1200 tokens"
    assert describe_sampling(Sampling(0.0, 0.9, 5, 16)) == "the most probable token, at most 16 tokens"
