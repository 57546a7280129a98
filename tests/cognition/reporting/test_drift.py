"""Numbers of rounds, worked out by hand; and the alarm goes off for a collapse, not for anything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from sicog_mcore.cognition.reporting.drift import (
    MIN_WORDS,
    TEXT_ITEMS,
    Drift,
    Gatherer,
    RoundNumbers,
    distinct,
    find_drift,
    first_words,
    judge,
    words,
)
from sicog_mcore.cognition.reporting.rounds import RoundItem
from tests.rounds import make_item

FIRST = RoundNumbers(
    items=100,
    failed=0,
    agreement=0.80,
    kept=0.5,
    words=50.0,
    tokens=60.0,
    alike=0.10,
    distinct_1=0.30,
    distinct_2=0.60,
    vocabulary=1000,
)


def drift_of(*rounds: Sequence[RoundItem]) -> tuple[Drift, ...]:
    gathered = []
    for number, items in enumerate(rounds):
        gatherer = Gatherer()
        for item in items:
            gatherer.add(item)
        gathered.append((f"round {number}", gatherer.result()))
    return find_drift(gathered)


def test_words_have_no_case_and_no_punctuation() -> None:
    assert words("A Cat, a «cat»: 2 CATS!\n") == ("a", "cat", "a", "cat", "2", "cats")


def test_distinct_counts_ngrams_inside_texts_only() -> None:
    texts = [("a", "b", "a", "b"), ("a", "b"), ("c",)]
    assert distinct(texts, 1) == 3 / 7
    assert distinct(texts, 2) == 2 / 4  # ab ba ab | ab: no b-a or b-c between texts
    assert distinct([("a",)], 2) == 0.0


def test_a_budget_of_words_cuts_the_last_text() -> None:
    texts = [("a", "b", "c"), ("d", "e"), ("f",)]
    assert list(first_words(texts, 4)) == [("a", "b", "c"), ("d",)]
    assert list(first_words(texts, 3)) == [("a", "b", "c")]
    assert list(first_words(texts, 99)) == texts


def test_numbers_of_a_round_by_hand() -> None:
    text = " ".join(["one two"] * (MIN_WORDS // 2))
    items = [
        make_item("a", [text, text], agreement=1.0),
        make_item("b", ["one", "two"], agreement=0.5, reason="agreement"),
        make_item("c", []),
        make_item("d", ["Red.", "red"], agreement=0.9, reason="too_short"),
    ]
    (drift,) = drift_of(items)
    numbers = drift.rounds[0]
    assert drift.task == "caption" and drift.budget == MIN_WORDS + 2 and drift.verdicts == ()
    assert (numbers.items, numbers.failed, numbers.kept) == (4, 1, 0.25)
    assert numbers.agreement == pytest.approx((1.0 + 0.5 + 0.9) / 3)
    assert numbers.alike == pytest.approx(2 / 3)  # a, and d but for its punctuation
    assert numbers.words == pytest.approx((MIN_WORDS + 2) / 3)
    assert numbers.tokens == pytest.approx((MIN_WORDS + 2) / 3)
    assert numbers.vocabulary == 3
    assert numbers.distinct_1 == pytest.approx(3 / (MIN_WORDS + 2))
    assert numbers.distinct_2 == pytest.approx(2 / (MIN_WORDS - 1))


def test_rounds_are_measured_on_equally_many_words() -> None:
    small = [make_item(f"s{i}", [f"w{i} x{i} y{i} z{i}"] * 2) for i in range(60)]
    large = [make_item(f"s{i}", [f"w{i} x{i} y{i} z{i}"] * 2) for i in range(600)]
    (drift,) = drift_of(small, large)
    assert drift.budget == 240
    assert [numbers.vocabulary for numbers in drift.rounds] == [240, 240]
    assert [numbers.distinct_1 for numbers in drift.rounds] == [1.0, 1.0]


def test_too_little_text_is_not_judged() -> None:
    (drift,) = drift_of([make_item("a", ["one two", "one"])], [make_item("a", ["one one", "one"])])
    assert drift.rounds[1].distinct_2 is None and drift.rounds[1].vocabulary is None
    assert drift.verdicts[0].level == "steady"


def test_the_same_items_are_measured_whatever_their_order() -> None:
    items = [make_item(f"i{i}", [f"word{i} and more"]) for i in range(TEXT_ITEMS + 50)]
    (drift,) = drift_of(items, list(reversed(items)))
    assert drift.rounds[0] == replace(drift.rounds[1], agreement=drift.rounds[0].agreement)


def test_tasks_are_judged_apart() -> None:
    drifts = drift_of([make_item("a", ["x"]), make_item("b", ["y"], task="answer")])
    assert [drift.task for drift in drifts] == ["answer", "caption"]


def test_a_round_without_any_text_does_not_hide_the_others() -> None:
    (drift,) = drift_of([make_item("a", [])], [make_item("a", [" ".join(f"w{i}" for i in range(300))])])
    assert drift.rounds[0].vocabulary is None and drift.rounds[1].vocabulary == 300


@pytest.mark.parametrize(
    ("change", "level", "said"),
    [
        ({}, "steady", ""),
        ({"agreement": 0.95, "distinct_2": 0.50}, "steady", ""),  # agrees more, and still has much to say
        ({"agreement": 0.90, "distinct_2": 0.45}, "alarm", "distinct-2 fell from 0.600 to 0.450 (−25%)"),
        ({"agreement": 0.79, "distinct_2": 0.45}, "alarm", "distinct-2"),  # held, within the slack
        ({"agreement": 0.70, "distinct_2": 0.45}, "watch", "distinct-2"),
        ({"agreement": 0.85, "vocabulary": 700}, "alarm", "the vocabulary fell from 1,000 to 700 (−30%)"),
        ({"agreement": 0.85, "alike": 0.40}, "alarm", "all candidates say the same in 40% of the items, before in 10%"),
        ({"agreement": 0.85, "words": 100.0}, "watch", "the best answer has 100 words on average, it had 50"),
        ({"agreement": 0.85, "words": 30.0}, "watch", "30 words"),
        ({"agreement": 0.85, "distinct_2": None, "vocabulary": None}, "steady", ""),
        (
            {"agreement": 0.90, "distinct_2": 0.48, "vocabulary": 800, "alike": 0.30, "words": 75.0},
            "steady",
            "",
        ),  # at the limits
    ],
)
def test_the_alarm_follows_its_rule(change: dict[str, float], level: str, said: str) -> None:
    verdict = judge(FIRST, replace(FIRST, **change))
    assert verdict.level == level
    assert said in "; ".join(verdict.signs) and bool(verdict.signs) == bool(said)


def test_a_model_that_falls_back_on_one_sentence_sets_off_the_alarm() -> None:
    rich = [make_item(f"i{i}", [f"thing {i} stands left of object {i * 7}", "x"], agreement=0.8) for i in range(100)]
    poor = [make_item(f"i{i}", ["a picture of a thing on a table"] * 2, agreement=1.0) for i in range(100)]
    (drift,) = drift_of(rich, poor)
    assert drift.judged[0][0] == "round 1"
    assert drift.verdicts[0].level == "alarm" and len(drift.verdicts[0].signs) == 3
