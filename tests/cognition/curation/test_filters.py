"""Each filter drops what it names, in the documented order, by numbers that may differ between prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sicog_mcore.cognition.curation.filters import LengthLimits, PerPrompt, judge, parse_per_prompt, repetition
from sicog_mcore.cognition.prompts import find_prompt
from sicog_mcore.errors import ConfigError
from tests.curation import Said, chain, failed, item

GOOD = Said("cod", "A red cup on a table.", 0.9)
LOW = Said("cod", "A blue cup.", 0.2)
NO_STEPS = "Step 1: only one of five."


def reason(folder: Path, said: list[Said], limits: LengthLimits | None = None, tau: PerPrompt = PerPrompt(0.8)) -> str:  # noqa: B008
    made = item(folder, "a", said)
    drop = judge(made.generation, [made.scores], [tau], limits or LengthLimits())
    return drop.reason if drop else "kept"


@pytest.mark.parametrize(
    ("winner", "expected"),
    [
        (GOOD, "kept"),
        (GOOD._replace(score=0.8), "kept"),
        (GOOD._replace(score=0.799999), "below_threshold"),
        (GOOD._replace(finish="length"), "cut"),
        (GOOD._replace(text=NO_STEPS), "no_clause"),
        (GOOD._replace(tokens=1), "too_short"),
        (GOOD._replace(tokens=31), "too_long"),
        (GOOD._replace(text="red cup " * 9), "repetition"),
        # The order: what makes an item unreadable comes before what it scores, and that before its form.
        (GOOD._replace(text=NO_STEPS, finish="length", score=0.3), "no_clause"),
        (GOOD._replace(finish="length", score=0.3), "cut"),
        (GOOD._replace(score=0.3, tokens=1), "below_threshold"),
        (GOOD._replace(text="red cup " * 9, tokens=31), "too_long"),
    ],
)
def test_a_winner_is_dropped_for_the_first_reason_that_applies(winner: Said, expected: str, tmp_path: Path) -> None:
    assert reason(tmp_path, [LOW, winner], LengthLimits(max_tokens=PerPrompt(30))) == expected


def test_only_the_winner_counts(tmp_path: Path) -> None:
    bad = LOW._replace(text=NO_STEPS, finish="length", tokens=1)
    assert reason(tmp_path, [bad, GOOD]) == "kept"


def test_a_failed_item_is_dropped_under_its_own_code() -> None:
    made = failed("a", "image_corrupt")
    assert judge(made.generation, [made.scores], [PerPrompt(0)], LengthLimits()) == (
        "item",
        "image_corrupt",
        "no file",
    )
    empty = replace(made.generation, failure=""), replace(made.scores, failure="")
    drop = judge(empty[0], [empty[1]], [PerPrompt(0)], LengthLimits())
    assert drop and drop.reason == "no_candidates"


def test_every_scorer_may_object(tmp_path: Path) -> None:
    made = item(tmp_path, "a", [LOW, GOOD])
    votes = replace(made.scores, scorer="vote", scores=(0.9, 0.5), winner=0)
    objection = judge(made.generation, [made.scores, votes], [PerPrompt(0.8), PerPrompt(0.6)], LengthLimits())
    assert objection == ("score", "below_threshold", "0.5000 by vote, at least 0.6 expected")
    assert judge(made.generation, [made.scores, votes], [PerPrompt(0.8), PerPrompt(0.5)], LengthLimits()) is None


def test_a_number_of_the_prompt_goes_before_that_of_its_style_and_the_general_one(tmp_path: Path) -> None:
    tau = parse_per_prompt("--tau", ["0.5", "steps=0.7", "cod=0.95"])
    found = [tau.of(find_prompt(name)) for name in ("cod", "cod_question", "cot", "caption")]
    assert found == [0.95, 0.7, 0.7, 0.5]
    assert reason(tmp_path, [GOOD], tau=tau) == "below_threshold"
    assert reason(tmp_path, [GOOD._replace(prompt="caption")], tau=tau) == "kept"


@pytest.mark.parametrize("values", [[], ["cod=0.9"], ["0.8", "poem=0.9"], ["0.8", "cod"], ["0.8", "cod=high"], ["nan"]])
def test_numbers_that_cannot_be_read_are_one_message(values: list[str]) -> None:
    with pytest.raises(ConfigError, match="--tau"):
        parse_per_prompt("--tau", values)


def test_repetition_is_the_share_of_runs_of_four_words_that_came_before() -> None:
    assert repetition("a b c") == 0.0
    assert repetition("a b c d e f") == 0.0
    assert repetition("a b c d, A B C D!") == pytest.approx(1 - 4 / 5)  # abcd bcda cdab dabc abcd
    assert repetition("red " * 11) == pytest.approx(1 - 1 / 8)
    assert repetition("红" * 8) == pytest.approx(1 - 1 / 5)  # signs are words where no spaces are written


def test_a_synthesis_may_say_again_what_the_steps_said(tmp_path: Path) -> None:
    last = "A red cup. It has one handle. It stands on a table. A window is behind it."
    assert repetition(chain("cod", last)) > 0.1
    assert reason(tmp_path, [GOOD._replace(text=last)], LengthLimits(max_repetition=0.0)) == "kept"


def test_a_description_without_a_picture_is_never_kept(tmp_path: Path) -> None:
    made = item(tmp_path, "a", [LOW, GOOD], image=None)
    drop = judge(made.generation, [made.scores], [PerPrompt(0.1)], LengthLimits())
    assert drop is not None and (drop.stage, drop.reason) == ("item", "no_image")
