"""Many spellings of one thing become one, and number words become numbers."""

from __future__ import annotations

import pytest

from sicog_mcore.cognition.spelling import cjk_number, narrow, plain, spelled_number


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("（Ａ）：１２％", "(A):12%"),
        ("【B】", "[B]"),
        ("\\(\\frac{3}{4}\\)", "3/4"),
        ("2\\frac{1}{2}", "2 1/2"),
        ("3½", "3 1/2"),
        ("x²⁻¹", "x^2-1"),
        ("90^\\circ", "90°"),
        ("3 * 4", "3×4"),
        ("**bold** and _em_, snake_case", "bold and em, snake_case"),
        ("\\text{two  words}\n\n\n $\\$5$", "two words\n$$5$"),
        ("a\u200bb\u2212c", "ab-c"),
    ],
)
def test_one_spelling(text: str, expected: str) -> None:
    assert plain(text) == expected


def test_full_width_marks_become_ascii() -> None:
    assert narrow("Ａｂ１！～\u3000") == "Ab1!~ "


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("seventeen", 17),
        ("forty-two", 42),
        ("two thousand one hundred and five", 2105),
        ("a hundred", 100),
        ("three million and six", 3_000_006),
    ],
)
def test_number_words(words: str, value: float) -> None:
    assert spelled_number(words) == value


@pytest.mark.parametrize(
    ("numeral", "value"),
    [
        ("十", 10),
        ("一百零五", 105),
        ("二零二四", 2024),
        ("三万二千", 32_000),
        ("两亿", 2e8),
        ("二点五", 2.5),
        ("百分之十", 0.1),
        ("百分之", None),
    ],
)
def test_chinese_numerals(numeral: str, value: float | None) -> None:
    assert cjk_number(numeral) == value
