"""Votes and attributes: what counts as the same, and what is not looked at."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sicog_mcore.cognition.scoring.similarity import AttributeF1, Cosine, Vote, read_vocabulary
from sicog_mcore.errors import ConfigError
from tests.cognition.agreeing import Written

VOCABULARY = {"colour": ["red", "light blue", "blue"], "digit": ["three", "five"]}


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("Yes.", "yes", True),
        ("3", "three", True),
        ("1,000", "1000.0", True),
        ("50%", "0.5", True),
        ("3 apples", "three", True),
        ("3 apples", "3 pears", False),
        ("a red 3", "a blue 3", False),
        ("3", "4", False),
        ("yes", "no", False),
        ("The cat", "cat", True),
        (r"\boxed{12}", "The answer is 12.", True),
        ("<answer>red</answer>", "Red", True),
        ("答案是红色", "红色", True),
        ("The answer is B because A is red.", "B", True),
        ("12.0", "１２", True),
        ("12cm", "12", True),
        ("three quarters", "3/4", False),
    ],
)
def test_a_vote_is_for_the_same_answer(first: str, second: str, same: bool) -> None:
    matrix = Vote().matrix([first, second])
    assert matrix.tolist() == [[1.0, float(same)], [float(same), 1.0]]


def test_attributes_agree_by_f1_and_the_rest_is_not_looked_at() -> None:
    texts = ["A red three.", "three, all in red!", "a light blue three", "a red five", "nothing known"]
    matrix = AttributeF1(VOCABULARY).matrix(texts)
    assert matrix[0].tolist() == [1.0, 1.0, 0.5, 0.5, 0.0]
    assert matrix[2, 3] == 0.0
    assert matrix[4].tolist() == [0.0] * 5  # not even like itself: it never wins
    assert (matrix == matrix.T).all()


def test_a_wrong_digit_costs_attributes_what_it_does_not_cost_words() -> None:
    steps = "The background is gray and the ink is red and the digit is {}, so this is a red {} on gray."
    matrix = AttributeF1({"digit": ["three", "five"]}).matrix([steps.format(d, d) for d in ("three", "five")])
    assert matrix[0, 1] == 0.0


def test_cosines_are_of_fp64() -> None:
    matrix = Cosine(Written()).matrix(["1,1,1", "1,2,3", "-3,0,0.1"])
    assert matrix.dtype == np.float64
    assert np.abs(np.diag(matrix) - 1).max() < 1e-15 and (matrix == matrix.T).all()


def test_the_name_of_a_vocabulary_is_its_content(tmp_path: Path) -> None:
    (tmp_path / "v.json").write_text(json.dumps(VOCABULARY))
    assert AttributeF1(read_vocabulary(tmp_path / "v.json")).name == AttributeF1(VOCABULARY).name
    assert AttributeF1(VOCABULARY).name != AttributeF1(VOCABULARY | {"digit": ["three"]}).name


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"colour": []}', '{"colour": ["red", 3]}', '{"colour": "red"}', None]
)
def test_a_wrong_vocabulary_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "v.json").write_text(content)
    with pytest.raises(ConfigError, match=r"v\.json"):
        read_vocabulary(tmp_path / "v.json")
