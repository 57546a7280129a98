"""Answers are read: equal forms, numbers with tolerance, chosen letters, attributes; all by hand."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sicog_mcore.cognition.answers import (
    attribute_f1,
    attributes,
    extract_choice,
    match_choice,
    normalise,
    read_number,
    same_number,
)

CHARTQA = 0.05
LINEAR_LIMIT_S = 30.0  # a square would take hours
VOCABULARY = {"colour": ["blue", "light blue", "red"], "shape": ["circle", "square"], "digit": ["three", "four"]}
PLAIN_NUMBERS = st.floats(-1e9, 1e9).map(lambda value: f"{value:.4f}")


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The Red circle.", "red circle"),
        ("  a\tRED\n circle!! ", "red circle"),
        ("Three dogs", "3 dogs"),
        ("1,234.50 km", "1234.50 km"),
        ("1,23", "1 23"),
        ("$1,000", "1000"),
        ("-$5", "-5"),
        ("\u22125", "-5"),
        ("3-5", "3 5"),
        ("50 %", "50%"),
        ("don't", "dont"),
        ("A", "a"),
        ("The", "the"),
        ("?!", "?!"),
        ("", ""),
        ("Straße", "strasse"),
        ("x²", "x²"),
    ],
)
def test_plain_form(text: str, plain: str) -> None:
    assert normalise(text) == plain


@settings(deadline=None)
@given(st.text())
def test_plain_form_is_its_own_plain_form(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@settings(deadline=None)
@given(st.text(st.characters(max_codepoint=127)))
def test_plain_form_ignores_case_and_white_space_around(text: str) -> None:
    assert normalise(f" \n{text.upper()}\t ") == normalise(text)


@settings(deadline=None)
@given(
    st.from_regex(r"[a-z]{2,8}( [a-z]{2,8}){0,4}", fullmatch=True), st.sampled_from([".", "!", "?", ",", ";", "..."])
)
def test_plain_form_ignores_a_mark_at_the_end(text: str, mark: str) -> None:
    assert normalise(text + mark) == normalise(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", 42.0),
        ("The answer is 42.", 42.0),
        ("**7**", 7.0),
        ("$1,234.50", 1234.5),
        ("-$5", -5.0),
        ("-.5", -0.5),
        ("1.5e3", 1500.0),
        ("50%", 0.5),
        ("20 percent", 0.2),
        ("3 million", 3e6),
        ("two thousand", 2000.0),
        ("Twelve people", 12.0),
        ("3 + 4 = 7", 7.0),
        ("There are 3 and 4, the total is 7", 7.0),
        ("The answer is 3. No, the answer is 4 of 9.", 4.0),
        ("3 here and three there", 3.0),
        ("3 here and 4 there", None),
        ("3-5", None),
        ("1/2", 0.5),
        ("10:30", None),
        ("version 1.2.3", None),
        ("x5", None),
        ("nan", None),
        ("1e999", None),
        ("none", None),
        ("", None),
    ],
)
def test_the_number_of_an_answer(text: str, number: float | None) -> None:
    assert read_number(text) == number


@settings(deadline=None)
@given(st.text())
def test_any_text_is_read_without_an_error(text: str) -> None:
    number = read_number(text)
    assert number is None or abs(number) < float("inf")
    assert extract_choice(text, "ABCD") in ("A", "B", "C", "D", None)
    assert attributes(text, VOCABULARY) <= {(kind, value) for kind, values in VOCABULARY.items() for value in values}


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("95", "100", True),
        ("105.0", "100", True),
        ("94.9", "100", False),
        ("-95", "-100", True),
        ("95", "-100", False),
        ("0.001", "0", False),
        ("0.0", "0", True),
        ("0.52", "50%", True),
        ("50", "50%", False),
        ("about the same", "100", False),
        ("100", "many", False),
    ],
)
def test_relaxed_equality_is_that_of_chartqa(answer: str, reference: str, same: bool) -> None:
    assert same_number(answer, reference, CHARTQA) is same


@settings(deadline=None)
@given(PLAIN_NUMBERS)
def test_a_number_equals_itself_however_it_is_grouped(text: str) -> None:
    assert same_number(text, text)
    assert same_number(f"{float(text):,.4f}", text)


@settings(deadline=None)
@given(PLAIN_NUMBERS, PLAIN_NUMBERS)
def test_without_tolerance_equality_is_symmetric(first: str, second: str) -> None:
    assert same_number(first, second) == same_number(second, first) == (float(first) == float(second))


@settings(deadline=None)
@given(PLAIN_NUMBERS, PLAIN_NUMBERS, st.floats(0, 1), st.floats(0, 1))
def test_more_tolerance_never_makes_numbers_differ(first: str, second: str, some: float, more: float) -> None:
    low, high = sorted((some, more))
    assert same_number(first, second, low) <= same_number(first, second, high)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(c)", "C"),
        ("**D**.", "D"),
        ("Option B", "B"),
        ("A", "A"),
        ("The answer is (B) because A is wrong.", "B"),
        ("The answer is B because option A is wrong", "B"),
        ("The correct answer is: **(A)** 5 cm", "A"),
        ("The answer is A because it is red", "A"),
        ("The answer is A. Wait, the answer is B.", "B"),
        ("the answer is b since", "B"),
        ("The best option is 'C'", "C"),
        ("Answer:\nB", "B"),
        ("A is red and B is green.\nC", "C"),
        ("B. a cat", "B"),
        ("B) a cat", "B"),
        ("C - because", "C"),
        ("I think it is (C), not (A).", "C"),
        ("I would take D.", "D"),
        (r"$\boxed{B}$", "B"),
        ("The answer is A or B", None),
        ("The answer is A, B", None),
        ("The answer is a cat", None),
        ("The answer is: A dog", None),
        ("A cat sits on a mat", None),
        ("Not B", None),
        ("The answer isn't B", None),
        ("A is wrong, B is wrong, C is right", "C"),
        ("None of the above", None),
        ("E", None),
        ("Because", None),
        ("", None),
    ],
)
def test_the_letter_of_an_answer(text: str, letter: str | None) -> None:
    assert extract_choice(text, "ABCD") == letter


@settings(deadline=None)
@given(
    st.sampled_from("ABCDEFGH"),
    st.sampled_from(["{}", "({})", "{}.", "The answer is {}.", "answer: ({})", "So, **{}**"]),
)
def test_every_letter_is_found_in_every_form(letter: str, form: str) -> None:
    assert extract_choice(form.format(letter), "ABCDEFGH") == letter


def test_long_runs_are_read_in_linear_time() -> None:
    start = time.process_time()
    for run in (
        "A " * 50_000,
        "answer " + " " * 100_000 + "x",
        "9" * 100_000 + "x",
        "((((" * 25_000,
        "1,000," * 20_000,
        r"\boxed{" * 10_000,
        "<think>" * 10_000,
        "A: wrong. " * 5_000,
        "one hundred thousand, " * 2_000,
        "No, \n" * 10_000,
    ):
        extract_choice(run, "ABCD")
        read_number(run)
        normalise(run)
    match_choice("a red ball " * 5_000, {"A": "a red ball", "B": "ball"})
    assert time.process_time() - start < LINEAR_LIMIT_S


def test_an_answer_in_the_words_of_an_option_chooses_it() -> None:
    options = {"A": "a dog", "B": "A cat", "C": "a cat and a dog"}
    assert match_choice("A cat", options) == "B"
    assert match_choice("I can see a dog.", options) == "A"
    assert match_choice("The answer is A, a cat", options) == "A"
    assert match_choice("a cat and a dog", options) == "C"
    assert match_choice("There is a cat and a dog.", options) == "C"  # its words hold those of the others
    assert match_choice("a horse", options) is None


def test_attributes_take_the_longest_value_and_numbers_as_words() -> None:
    found = attributes("A light blue CIRCLE, and the number 3.", VOCABULARY)
    assert found == {("colour", "light blue"), ("shape", "circle"), ("digit", "three")}
    assert attributes("light blue and blue", VOCABULARY) == {("colour", "light blue"), ("colour", "blue")}
    assert attributes("bluish circles", VOCABULARY) == frozenset()


def test_attribute_f1_by_hand() -> None:
    expected = {("colour", "red"), ("shape", "circle"), ("digit", "three")}
    assert attribute_f1(expected, expected) == 1.0
    assert attribute_f1({("colour", "red"), ("shape", "square")}, expected) == 2 / 5  # precision 1/2, recall 1/3
    assert attribute_f1(set(), expected) == 0.0
    assert attribute_f1(set(), set()) == 1.0
