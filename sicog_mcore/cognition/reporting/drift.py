"""Measures the drift of the loop from round to round, with an alarm for a model that collapses onto few words.

In: items of several rounds   Out: Drift per task   Next: page.py
A model trained on its own answers can come to agree with itself because it has less to say: agreement then rises while the
wording dries up, and no score of a single round shows it. Diversity depends on how much text is looked at, so all rounds
are measured on equally many words, of the same items where they have the same.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import xxhash

from sicog_mcore.cognition.records import Task
from sicog_mcore.cognition.reporting.rounds import RoundItem

WORD = re.compile(r"\w+")
TEXT_ITEMS = 2000  # whose best candidates are measured
MIN_WORDS = 200  # below this, diversity is chance
LOSS = 0.20  # share of diversity that may get lost
ALIKE_RISE = 0.20  # by which the share of items with identical candidates may rise
LENGTH_RATIO = 1.5
AGREEMENT_SLACK = 0.02  # agreement that is down by no more has held

RULE = (
    "Every round is compared with the first one. "
    f"Alarm: agreement held (it is down by no more than {AGREEMENT_SLACK:.2f}) "
    f"while distinct-2 or the vocabulary lost more than {LOSS:.0%}, "
    f"or while the share of items whose candidates all say the same rose by more than {ALIKE_RISE * 100:.0f} points. "
    "Watch: one of these signs while agreement fell, "
    f"or a mean length that changed by more than a factor of {LENGTH_RATIO}. "
    f"Wording is judged from {MIN_WORDS} words on."
)

Level = Literal["alarm", "watch", "steady"]


@dataclass(frozen=True)
class RoundText:
    """The texts and counts of a round's items of one task.

    Attributes:
        texts: words of the best candidates, of at most TEXT_ITEMS items, in the order of the hashes of their ids.
        alike: items whose candidates all say the same.
    """

    items: int
    failed: int
    kept: int
    agreement: float
    tokens: float
    alike: int
    texts: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class RoundNumbers:
    """One column of the table.

    Attributes:
        items, failed: rows, and those without a winner.
        agreement: mean over the items with a winner.
        kept: share of all items.
        words, tokens: mean length of the best candidate; tokens over all candidates.
        alike: share of the items with a winner whose candidates all say the same words.
        distinct_1, distinct_2: distinct n-grams over all n-grams; None where there is too little text.
        vocabulary: distinct words; None where there is too little text.
    """

    items: int
    failed: int
    agreement: float
    kept: float
    words: float
    tokens: float
    alike: float
    distinct_1: float | None
    distinct_2: float | None
    vocabulary: int | None


@dataclass(frozen=True)
class DriftVerdict:
    """The verdict on a round's numbers, compared with those of the first round.

    Attributes:
        signs: a sentence for each number that moved too far.
    """

    level: Level
    signs: tuple[str, ...]


@dataclass(frozen=True)
class Drift:
    """One task over all rounds, oldest first.

    Attributes:
        budget: words per round that diversity was measured on.
        verdicts: of each round but the first.
    """

    task: Task
    names: tuple[str, ...]
    rounds: tuple[RoundNumbers, ...]
    budget: int
    verdicts: tuple[DriftVerdict, ...]

    @property
    def judged(self) -> tuple[tuple[str, DriftVerdict], ...]:
        """Name and verdict of each round but the first."""
        return tuple(zip(self.names[1:], self.verdicts, strict=True))


def words(text: str) -> tuple[str, ...]:
    """The words of a text, without case and punctuation."""
    return tuple(WORD.findall(text.casefold()))


def distinct(texts: Iterable[Sequence[str]], n: int) -> float:
    """Distinct n-grams over all n-grams, none of which crosses from one text to the next; 0 without any."""
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def first_words(texts: Iterable[Sequence[str]], budget: int) -> Iterator[Sequence[str]]:
    """The texts up to a number of words in all; the last one is cut."""
    for text in texts:
        if budget <= 0:
            return
        yield text[:budget]
        budget -= len(text)


class Gatherer:
    """Takes in the items of a round one by one; holds the text of few of them."""

    def __init__(self) -> None:
        self._counts: dict[Task, list[int]] = {}
        self._sums: dict[Task, list[float]] = {}
        self._texts: dict[Task, list[tuple[int, str, tuple[str, ...]]]] = {}

    def add(self, item: RoundItem) -> None:
        generation, task = item.generation, item.generation.task
        counts = self._counts.setdefault(task, [0, 0, 0, 0])
        sums = self._sums.setdefault(task, [0.0, 0.0])
        texts = self._texts.setdefault(task, [])
        counts[0] += 1
        counts[2] += item.decision.kept
        if item.scores.winner < 0:
            counts[1] += 1
            return
        counts[3] += _all_alike(item)
        sums[0] += item.scores.agreement
        sums[1] += fmean(candidate.tokens for candidate in generation.candidates)
        # A heap of the smallest hashes: the same ids in every round, whatever its size and order.
        rank = xxhash.xxh64_intdigest(generation.id.encode("utf-8", "surrogatepass"))
        # heapq keeps the smallest entry on top, so ranks are negated: the largest hash is the one that leaves.
        entry = (-rank, generation.id, words(_best_text(item)))
        if len(texts) < TEXT_ITEMS:
            heapq.heappush(texts, entry)
        else:
            heapq.heappushpop(texts, entry)

    def result(self) -> Mapping[Task, RoundText]:
        return {task: self._of(task) for task in sorted(self._counts)}

    def _of(self, task: Task) -> RoundText:
        items, failed, kept, alike = self._counts[task]
        answered = max(items - failed, 1)
        agreement, tokens = (total / answered for total in self._sums[task])
        texts = tuple(text for _, _, text in sorted(self._texts[task], reverse=True))
        return RoundText(items, failed, kept, agreement, tokens, alike, texts)


def _best_text(item: RoundItem) -> str:
    return item.generation.candidates[item.scores.winner].text


def _all_alike(item: RoundItem) -> bool:
    """Whether there are several candidates and all of them say the same where they were compared."""
    said = [None if clause is None else words(clause) for clause in item.scores.clauses]
    return len(said) > 1 and None not in said and len(set(said)) == 1


def find_drift(rounds: Sequence[tuple[str, Mapping[Task, RoundText]]]) -> tuple[Drift, ...]:
    """Numbers and verdicts for every task of the last round.

    Args:
        rounds: name and content, oldest first.
    """
    return tuple(
        _drift(task, [(name, found[task]) for name, found in rounds if task in found]) for task in rounds[-1][1]
    )


def _drift(task: Task, rounds: Sequence[tuple[str, RoundText]]) -> Drift:
    # A round without any text has no say in how much of the others is measured.
    amounts = [sum(map(len, content.texts)) for _, content in rounds if content.texts]
    # Distinct n-grams over all n-grams falls with the length of a text, so all rounds are cut to the words of the
    # smallest.
    budget = min(amounts, default=0)
    numbers = tuple(_numbers(content, budget) for _, content in rounds)
    verdicts = tuple(judge(numbers[0], later) for later in numbers[1:])
    return Drift(task, tuple(name for name, _ in rounds), numbers, budget, verdicts)


def _numbers(content: RoundText, budget: int) -> RoundNumbers:
    measured = list(first_words(content.texts, budget))
    is_enough = budget >= MIN_WORDS and bool(measured)
    return RoundNumbers(
        items=content.items,
        failed=content.failed,
        agreement=content.agreement,
        kept=content.kept / content.items,
        words=fmean(map(len, content.texts)) if content.texts else 0.0,
        tokens=content.tokens,
        alike=content.alike / max(content.items - content.failed, 1),
        distinct_1=distinct(measured, 1) if is_enough else None,
        distinct_2=distinct(measured, 2) if is_enough else None,
        vocabulary=len({word for text in measured for word in text}) if is_enough else None,
    )


def judge(first: RoundNumbers, later: RoundNumbers) -> DriftVerdict:
    """Judges a later round by RULE."""
    # Signs of poverty can raise an alarm; a change in length alone is only worth a look.
    poorer = list(_signs_of_poverty(first, later))
    length = later.words / first.words if first.words else 1.0
    signs = list(poorer)
    if not 1 / LENGTH_RATIO <= length <= LENGTH_RATIO:
        signs.append(f"the best answer has {later.words:.0f} words on average, it had {first.words:.0f}")
    # Poorer wording at a lower agreement may be a model that got worse; with agreement held it is a collapse.
    has_held = later.agreement >= first.agreement - AGREEMENT_SLACK
    level: Level = "alarm" if poorer and has_held else "watch" if signs else "steady"
    return DriftVerdict(level, tuple(signs))


def _signs_of_poverty(first: RoundNumbers, later: RoundNumbers) -> Iterator[str]:
    pairs = (
        ("distinct-2", first.distinct_2, later.distinct_2, ".3f"),
        ("the vocabulary", first.vocabulary, later.vocabulary, ","),
    )
    for name, before, after, form in pairs:
        if before and after is not None and after < before * (1 - LOSS):
            yield f"{name} fell from {before:{form}} to {after:{form}} (−{1 - after / before:.0%})"
    if later.alike > first.alike + ALIKE_RISE:
        yield f"all candidates say the same in {later.alike:.0%} of the items, before in {first.alike:.0%}"
