"""What an answer says, apart from how it is written: plain form, number, choice, attributes. Pure functions of text.

In: text of a model or a data set, never evaluated   Out: text, number, letter, attributes, or None where there is none
Used by: score.py (votes), evaluate.py (metrics). Equality is wanted, not understanding: a negation is not seen.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence

ARTICLES = frozenset(("a", "an", "the"))
TO_TEN = "zero one two three four five six seven eight nine ten"
TO_TWENTY = "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"
NUMBER_WORDS: Mapping[str, str] = {word: str(value) for value, word in enumerate(f"{TO_TEN} {TO_TWENTY}".split())}
SCALES: Mapping[str, float] = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
DASHES = str.maketrans({"\u2212": "-", "\u2010": "-", "\u2011": "-"})  # minus and hyphens that look like "-"

# A sign counts only where it cannot be a hyphen; commas only where they group three digits.
NUMBER = re.compile(
    r"(?:(?<!\w)[-+][$€£¥]?)?(?:(?<![\d.])\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?(?:\s?%)?"
    r"|(?<!\w)[-+]?\.\d+(?:\s?%)?",
    re.A,
)
NOT_PLAIN = re.compile(r"[+,\s$€£¥]")  # what a number loses
# What read_number takes as one number: with currency, exponent, percent or scale around it.
WHOLE = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d{1,3})?|[-+]?\.\d+(?:e[-+]?\d{1,3})?"
QUANTITY = re.compile(
    rf"(?<![\w.,])(?<!\d[:/])(?P<minus>-?)(?:[$€£¥]\s?)?(?P<digits>{WHOLE})(?!\w|[.,:/]\d)"
    rf"(?:\s?(?P<after>%|(?:percent|{'|'.join(SCALES)})\b))?"
    rf"|\b(?P<word>{'|'.join(sorted(NUMBER_WORDS, key=len, reverse=True))})\b(?:\s(?P<scale>{'|'.join(SCALES)})\b)?",
    re.A,
)
CUE = re.compile(r"\b(?:answer|result|total)(?:\s+(?:is|are|equals|would be|should be))?\s*[:=]?\s*|=\s*")
CHOICE_CUE = (
    r"\b(?:answer|(?:correct|right|best|final)\s+(?:choice|option|letter))"
    r"(?:\s+(?:is|would be|must be|should be)\s*:?|\s*[:=])\s*(?:option\s+)?\(?[\"'“]?"
)
STATEMENT = re.compile(r"\banswer(?:\s+is\b\s*:?|\s*:)", re.I)
NEARBY = 40  # characters around a letter that decide whether it is meant
EMPHASIS = re.compile(r"[*_`]+")


def normalise(text: str) -> str:
    """The plain form in which two answers are equal if they say the same in the same words.

    Lower case, numbers up to twenty as digits, no grouping commas, no articles, no punctuation; signs, decimal points and
    percent signs of numbers stay. Text that holds nothing else keeps its articles, and its punctuation: "A" stays an answer.
    """
    plain = _fold(text)
    words: list[str] = []
    start = 0
    for match in NUMBER.finditer(plain):
        words += _words(plain[start : match.start()])
        words.append(NOT_PLAIN.sub("", match[0]))
        start = match.end()
    words += _words(plain[start:])
    words = [NUMBER_WORDS.get(word, word) for word in words]
    return " ".join([word for word in words if word not in ARTICLES] or words or plain.split())


def read_number(text: str) -> float | None:
    """The number that an answer gives; None if there is none, or none that stands out.

    It is, in this order: the one behind the last "answer is", "total", "result" or "="; the only one in the text. Several
    equal ones count as one. "50%" is 0.5, as in ChartQA's metric; "3 million" is 3e6; "three" is 3.
    """
    plain = EMPHASIS.sub("", _fold(text))
    numbers = [(match.start(), value) for match in QUANTITY.finditer(plain) if (value := _value(match)) is not None]
    ends = {match.end() for match in CUE.finditer(plain)}
    cued = [value for start, value in numbers if start in ends]
    if cued:
        return cued[-1]
    values = {value for _, value in numbers}
    return values.pop() if len(values) == 1 else None


def same_number(answer: str, reference: str, relative: float = 0.0) -> bool:
    """Whether both give a number and the answer's lies within a share of the reference's.

    With 0.05 this is the numeric half of ChartQA's relaxed accuracy. Only zero equals zero, whatever the tolerance.

    Args:
        relative: largest |answer - reference| / |reference|.
    """
    found, wanted = read_number(answer), read_number(reference)
    if found is None or wanted is None:
        return False
    # The last digits of a tolerance are not to decide: 0.95 / 1 is within 0.05.
    return found == wanted or abs(found - wanted) <= relative * abs(wanted) * (1 + 1e-12)


def stated_answer(text: str) -> str:
    """What stands behind the last "answer is" or "answer:"; all of the text where that is nowhere."""
    plain = EMPHASIS.sub("", text)
    cues = list(STATEMENT.finditer(plain))
    return (plain[cues[-1].end() :] if cues else plain).strip() or text.strip()


def extract_choice(text: str, letters: Collection[str]) -> str | None:
    """The letter of the option that an answer chooses, in upper case; None if it chooses none, or more than one.

    Looked for in this order: the whole answer or its last line is a letter; behind the last "answer is", "answer:", "right
    option is"; at the start before a delimiter; the only letter in brackets; the only letter standing alone. "A" and "I"
    before a word in lower case are an article and a pronoun, and a letter behind "not" or "than" is none that is chosen.

    Args:
        letters: of the options, one character each, e.g. "ABCD".
    """
    among = "".join(re.escape(letter) for letter in sorted({letter.upper() for letter in letters}))
    lines = [" ".join(line.split()) for line in EMPHASIS.sub("", text).splitlines() if line.strip()]
    if not lines or not among:
        return None
    for line in (" ".join(lines), lines[-1]):
        if alone := re.fullmatch(rf"(?:option\s+)?[\W_]*([{among}])[\W_]*", line, re.I):
            return alone[1].upper()
    plain = "\n".join(lines)
    letter = rf"(?P<letter>[{among}])"
    standing = rf"{letter}(?!\w|['’]\w)"
    second = rf"(?P<second>\)?\s*(?:or|and|/|&|,)\s*\(?[{among}]\b)?"
    cued = _meant(rf"(?i:{CHOICE_CUE}{letter})(?!\w|['’]\w){second}", plain)
    if cued:
        return None if cued[-1]["second"] else cued[-1]["letter"].upper()
    if first := re.match(rf"\(?{letter}(?:\)|[.:](?=\s|$)|\s*[,;-]\s)", plain):
        return first["letter"]
    for pattern in (rf"\({letter}\)", rf"(?<![\w'’]){standing}"):
        found = {match["letter"] for match in _meant(pattern, plain)}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def match_choice(text: str, options: Mapping[str, str]) -> str | None:
    """``extract_choice``, or else the only option whose words stand in the answer.

    Args:
        options: text of each option by its letter.
    """
    # An answer in an option's own words is no letter, even if it begins with one: "A cat".
    own_words = [letter for letter, option in options.items() if normalise(option) == normalise(text)]
    if len(own_words) == 1:
        return own_words[0].upper()
    if (letter := extract_choice(text, options.keys())) is not None:
        return letter
    words = f" {normalise(text)} "
    held = [letter for letter, option in options.items() if option.strip() and f" {normalise(option)} " in words]
    return held[0].upper() if len(held) == 1 else None


def attributes(text: str, vocabulary: Mapping[str, Sequence[str]]) -> frozenset[tuple[str, str]]:
    """The attributes that a text names, as (kind, value) pairs.

    Args:
        vocabulary: values of each kind, e.g. {"colour": ["red", "light blue"]}; the longest one that fits is taken, so
            "light blue" is not also "blue".
    """
    values = {normalise(value): (kind, value) for kind, known in vocabulary.items() for value in known}
    found, words = set(), f" {normalise(text)} "
    for plain in sorted(values, key=lambda value: (-len(value), value)):
        if f" {plain} " in words:
            found.add(values[plain])
            words = words.replace(f" {plain} ", " | ")  # a mark that no plain form holds
    return frozenset(found)


def attribute_f1(found: Collection[tuple[str, str]], expected: Collection[tuple[str, str]]) -> float:
    """Harmonic mean of precision and recall; 1 if both are empty."""
    if not found and not expected:
        return 1.0
    return 2 * len(set(found) & set(expected)) / (len(set(found)) + len(set(expected)))


def _fold(text: str) -> str:
    folded = unicodedata.normalize("NFC", text).translate(DASHES).casefold()
    return " ".join(unicodedata.normalize("NFC", folded).split())


def _words(text: str) -> Iterator[str]:
    """Runs without punctuation, symbols and control characters; apostrophes vanish inside a word."""
    joined = re.sub(r"(?<=\w)['’](?=\w)", "", text)
    kept = (" " if unicodedata.category(character)[0] in "PSCZ" else character for character in joined)
    return iter("".join(kept).split())


def _value(match: re.Match[str]) -> float | None:
    scale = SCALES.get(match["scale"] or match["after"] or "", 1.0)
    if match["word"]:
        return float(NUMBER_WORDS[match["word"]]) * scale
    value = float(match["digits"].replace(",", "")) * scale
    value = value / 100 if match["after"] in ("%", "percent") else value
    value = -value if match["minus"] else value
    return value if math.isfinite(value) else None


def _meant(pattern: str, text: str) -> list[re.Match[str]]:
    """Matches whose letter is meant as an option: not rejected by the words before it, no article, no pronoun."""
    return [
        match for match in re.finditer(pattern, text) if not _is_rejected(text, match) and not _is_word(text, match)
    ]


def _is_rejected(text: str, match: re.Match[str]) -> bool:
    before = text[max(0, match.start() - NEARBY) : match.start()]
    return re.search(r"(?i)(?:\bnot|n't|n’t|\bnor|\bneither|\bthan|\bexcept)(?:\s+\w+)?\s+$", before) is not None


def _is_word(text: str, match: re.Match[str]) -> bool:
    after = text[match.end() : match.end() + NEARBY]
    goes_on = re.match(r"\s+(?!(?:because|since|as|for|and|or|is|but)\b)[^\W\d_A-Z]", after)
    return match["letter"].upper() in "AI" and match[0][-1] == match["letter"] and goes_on is not None
