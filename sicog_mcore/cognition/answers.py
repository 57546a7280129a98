"""Reads answers apart from how they are written: plain form, number, choice, attributes. Pure functions of text.

In: text of a model or a data set, never evaluated   Out: text, number, letter, attributes; each Reading names its rule
Used by: agreement.py (votes), judging.py (metrics). Which rules there are, and in which order: answer_grammar.py.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence

from sicog_mcore.cognition import spelling
from sicog_mcore.cognition.answer_cues import NEARBY, QUANTITY, REJECTED
from sicog_mcore.cognition.answer_grammar import (
    Reading,
    lone_letter,
    named_letter,
    read_quantity,
    read_text,
    read_yes_no,
    spoken,
    stated_letter,
    unwrap,
)
from sicog_mcore.cognition.spelling import CJK, DASHES, NUMBER_WORDS, narrow

ARTICLES = frozenset(("a", "an", "the"))
# A sign counts only where it cannot be a hyphen; commas only where they group three digits.
NUMBER = re.compile(
    r"(?:(?<!\w)[-+][$€£¥]?)?(?:(?<![\d.])\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?(?:\s?%)?"
    r"|(?<!\w)[-+]?\.\d+(?:\s?%)?",
    re.A,
)
NOT_PLAIN = re.compile(r"[+,\s$€£¥]")  # what a number loses


def normalise(text: str) -> str:
    """The plain form in which two answers are equal if they say the same in the same words.

    Lower case, numbers up to twenty as digits, no grouping commas, no articles, no punctuation; signs, decimal points and
    percent signs of numbers stay. Text that holds nothing else keeps its articles, and its punctuation: "A" stays an answer.
    """
    # Numbers are cut out first: their points, signs and percents stay, while the words between lose all punctuation.
    plain = _fold(text)
    words: list[str] = []
    start = 0
    for match in NUMBER.finditer(plain):
        words += _words(plain[start : match.start()])
        words.append(NOT_PLAIN.sub("", match[0]))
        start = match.end()
    words += _words(plain[start:])
    words = [str(NUMBER_WORDS.get(word, word)) for word in words]
    return " ".join([word for word in words if word not in ARTICLES] or words or plain.split())


def read_number(text: str) -> float | None:
    """The number that an answer gives; None if there is none, or none that stands out.

    It is, in this order: the one in a wrapper such as a box; the one behind the last "answer is", "total", "result" or "=";
    the only one in the text. Several equal ones count as one. "50%" is 0.5, as in ChartQA's metric; "3 million" is 3e6.
    """
    return read_quantity(text).value


def same_number(answer: str, reference: str, relative: float = 0.0) -> bool:
    """Whether both give a number, and that of the answer lies within a share of that of the reference.

    With 0.05 this is the numeric half of ChartQA's relaxed accuracy. Only zero equals zero, whatever the tolerance.

    Args:
        relative: largest |answer - reference| / |reference|.
    """
    found, wanted = read_number(answer), read_number(reference)
    if found is None or wanted is None:
        return False
    # The last digits of a tolerance are not to decide: 0.95 / 1 is within 0.05.
    return found == wanted or abs(found - wanted) <= relative * abs(wanted) * (1 + 1e-12)


def is_bare_number(text: str) -> bool:
    """Whether a text is nothing but a number: "12.0", "twenty-one", "$12"; not "007", a name, nor "12 cm" or "3/4"."""
    whole = QUANTITY.fullmatch(spelling.plain(text).strip("$ .!"))
    if whole is None or any(whole[part] for part in ("unit", "suffix", "under", "mixed", "counted")):
        return False
    return re.match(r"0\d", whole["digits"] or "") is None and read_number(text) is not None


def extract_choice(text: str, letters: Collection[str]) -> str | None:
    """The letter of the option that an answer chooses, in upper case; None if it chooses none, or more than one.

    Args:
        letters: of the options, one character each, e.g. "ABCD".
    """
    return read_choice(text, dict.fromkeys(letters, "")).value


def match_choice(text: str, options: Mapping[str, str]) -> str | None:
    """``extract_choice``, or else the only option whose words stand in the answer.

    Args:
        options: text of each option by its letter.
    """
    return read_choice(text, options).value


def read_choice(text: str, options: Mapping[str, str]) -> Reading[str]:
    """The option that an answer chooses by its letter, or in the option's own words, and the rule that read it.

    "A" and "I" before a word in lower case are an article and a pronoun, and a letter that is denied is not chosen. A
    letter alone is that letter, even where another option's words are "B".

    Args:
        options: text of each option by its letter.

    Returns:
        a letter in upper case; failures are no_choice, several_answers and think_not_closed.
    """
    options = {letter.upper(): words for letter, words in options.items()}
    part = unwrap(text)
    if part.value is None or not options:
        return Reading(None, "", part.failure or "no_choice")
    reading = _chosen(part.value, options)
    # A wrapper is the stronger rule: it, and not how the letter stands in it, is what the record names.
    if reading.value and part.rule:
        return Reading(reading.value, part.rule)
    if part.rule == "boxed" and reading.failure == "no_choice":  # a step of the calculation may be boxed
        return stated_letter(spoken(text) or "", options)
    return reading


def _chosen(text: str, options: Mapping[str, str]) -> Reading[str]:
    if (alone := lone_letter(text, options)).value:
        return alone
    # An answer in an option's own words is no letter, even if it begins with one: "A cat".
    lettered = re.match(r"[\W_]*[Aa][).:*]", text)  # what plain form drops as an article
    if not lettered and (own := _equal_words(text, options)).value:
        return own
    if (stated := stated_letter(text, options)).value or stated.failure == "several_answers":
        return stated
    # Behind an announcement the option's own words count as much as its letter.
    told = read_text(text)
    if told.rule == "cue" and (own := _own_words(told.value or "", options)).value:
        return own
    named = named_letter(text, options)
    if named.value:
        return named
    # Options that read yes and no may be chosen by an answer that only implies one of them.
    if {normalise(words) for words in options.values()} >= {"yes", "no"}:
        answer = read_yes_no(text)
        chosen = [letter for letter, words in options.items() if normalise(words) == answer.value]
        return Reading(chosen[0], answer.rule) if len(chosen) == 1 else Reading(None, "", named.failure)
    own = _own_words(text, options)
    return own if own.value or own.failure == "several_answers" else named


def _equal_words(text: str, options: Mapping[str, str]) -> Reading[str]:
    plain = normalise(text)
    found = [letter for letter, words in options.items() if words.strip() and normalise(words) == plain]
    return Reading(found[0], "own_words") if len(found) == 1 else Reading(None, "", "no_choice")


def _own_words(text: str, options: Mapping[str, str]) -> Reading[str]:
    """The only option whose words stand in a text undenied; longer ones come first: "blue circle" before "circle"."""
    said = _spaced(text)
    found: set[str] = set()
    for letter, words in sorted(options.items(), key=lambda option: -len(normalise(option[1]))):
        wanted = _spaced(words) if words.strip() else ""
        wanted = wanted.strip() if re.search(f"[{CJK}]", wanted) else wanted
        start = said.find(wanted) if wanted.strip() else -1
        while start >= 0 and letter not in found:
            if not _denied(" ".join(said[max(0, start - NEARBY) : start].split())):
                found.add(letter)
            start = said.find(wanted, start + len(wanted))
        # Taken out once found, so that the words of a shorter option are not found inside a longer one.
        said = said.replace(wanted, " | ") if wanted.strip() else said  # a mark that no plain form holds
    if not found and (number := read_quantity(text).value) is not None:
        values = {letter: read_number(words) for letter, words in options.items()}
        # Options that are all different numbers are compared by value: "12.0" then chooses "12".
        if None not in values.values() and len(set(values.values())) == len(values):
            found = {letter for letter, value in values.items() if value == number}
            return Reading(found.pop(), "own_number") if found else Reading(None, "", "no_choice")
    if len(found) == 1:
        return Reading(found.pop(), "own_words")
    return Reading(None, "", "several_answers" if found else "no_choice")


def _spaced(text: str) -> str:
    """Plain form with two spaces between words, so that each word has its own on either side."""
    return f" {normalise(text).replace(' ', '  ')} "


def _denied(before: str) -> bool:
    """Whether the words before an option's say that it is not the one."""
    denials = (
        r"\b(?:not|no|isnt|arent|wasnt|neither|nor|than|except|without|never|wrong|incorrect)|(?:不是|没有|并非|不|非)"
    )
    return bool(REJECTED.search(f"{before} ") or re.search(rf"(?:{denials})\s?$", before))


def attributes(text: str, vocabulary: Mapping[str, Sequence[str]]) -> frozenset[tuple[str, str]]:
    """Finds the attributes that a text names, as (kind, value) pairs.

    Args:
        vocabulary: values of each kind, e.g. {"colour": ["red", "light blue"]}; the longest one that fits is taken, so
            "light blue" is not also "blue".
    """
    values = {normalise(value): (kind, value) for kind, known in vocabulary.items() for value in known}
    found, words = set(), f" {normalise(text)} "
    # Longest first, each taken out once found: "light blue" must not count as "blue" too.
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
    folded = unicodedata.normalize("NFC", narrow(text)).translate(DASHES).casefold()
    return " ".join(unicodedata.normalize("NFC", folded).split())


def _words(text: str) -> Iterator[str]:
    """Runs without punctuation, symbols and control characters; apostrophes vanish inside a word."""
    joined = re.sub(r"(?<=\w)['’](?=\w)", "", text)
    kept = (" " if unicodedata.category(character)[0] in "PSCZ" else character for character in joined)
    return iter("".join(kept).split())
