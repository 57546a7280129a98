"""The grammar of answers against its table of examples: what is read, by which rule, and what must not be read.

The patterns of answer_cues.py are tested here too, through the rules that use them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from sicog_mcore.cognition.answer_grammar import Reading, read_quantity, read_text, read_yes_no, spoken
from sicog_mcore.cognition.answers import read_choice

# Columns: the options, or the kind of answer; what is read ("-" for nothing); the rule or failure; the text as in JSON.
TABLE = Path(__file__).with_name("answer_examples.tsv")
FOUR = {"A": "a red ball", "B": "a blue circle", "C": "a green tree", "D": "a yellow house"}
SIX = FOUR | {"E": "a dog", "F": "a dog and a cat"}
OPTIONS: Mapping[str, Mapping[str, str]] = {
    "four": FOUR,
    "six": SIX,
    "nine": SIX | {"G": "a bus", "H": "a hat", "I": "an inn"},
    "none of the above": FOUR | {"D": "None of the above"},
    "none": FOUR | {"D": "None"},
    "numbers": {"A": "1", "B": "12 cm", "C": "0.5", "D": "1,234"},
    "true or false": {"A": "True", "B": "False"},
    "sides": {"A": "left", "B": "right"},
    "yes and no": {"A": "Yes", "B": "No"},
    "chinese": {"A": "红色的球", "B": "蓝色圆形", "C": "圆形"},
    "letters": {"A": "B", "B": "A"},
}


def examples() -> list[tuple[str, str, str, str]]:
    """(kind, what is read, rule or failure, text)."""
    rows = [line.split("\t") for line in TABLE.read_text(encoding="utf-8").splitlines()[1:]]
    return [(kind, read, why, json.loads(text)) for kind, read, why, text in rows]


def read(kind: str, text: str) -> Reading[str] | Reading[float]:
    if kind in OPTIONS:
        return read_choice(text, OPTIONS[kind])
    return {"yes or no": read_yes_no, "number": read_quantity, "text": read_text}[kind](text)


@pytest.mark.parametrize(("kind", "expected", "why", "text"), examples())
def test_an_answer_is_read_by_its_rule_or_not_at_all(kind: str, expected: str, why: str, text: str) -> None:
    reading = read(kind, text)
    assert (reading.rule or reading.failure) == why
    assert bool(reading.rule) is (reading.value is not None) is not bool(reading.failure)
    if kind == "number" and reading.value is not None:
        assert reading.value == pytest.approx(float(expected), rel=1e-12)
    else:
        assert (reading.value or "-") == expected


def test_the_table_shows_every_rule_and_every_failure() -> None:
    """So none can be added, or become unreachable, unseen."""
    shown = {(kind if kind not in OPTIONS else "choice", why) for kind, _, why, _ in examples()}
    wrapped = ("answer_tag", "json", "boxed", "cue", "think_not_closed")
    letters = ("whole", "last_line", "verdict", "leading_letter", "conclusion", "bracketed", "only_letter", "own_words")
    expected = {("choice", why) for why in (*wrapped, *letters, "own_number", "no_choice", "several_answers")}
    yes_no = ("first_word", "only_word", "negation")
    expected |= {("choice", f"yes_no_{why}") for why in ("first_word", "negation")}
    expected |= {
        ("yes or no", why) for why in (*wrapped, *(f"yes_no_{why}" for why in yes_no), "no_yes_no", "several_answers")
    }
    expected |= {("number", why) for why in (*wrapped, "only_number", "no_number")}
    expected |= {
        ("text", why) for why in ("answer_tag", "boxed", "cue", "whole", "several_answers", "think_not_closed")
    }
    assert shown == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a", "a"),
        ("<think>a</think>b", "b"),
        ("a</think>b", "b"),
        ("x<think>a</think>b<think>c</think>d", "xbd"),
        ("<think>a<think>b</think>c", "c"),
        ("<think>a", None),
        ("b<think>", None),
        ("<b>a</b>", "<b>a</b>"),
    ],
)
def test_thoughts_are_not_spoken(text: str, said: str | None) -> None:
    assert spoken(text) == said
