"""Finds the candidate that the others agree with most (minimum Bayes risk), and how far they agree.

In: Generation per item, maybe of further views of its image   Out: Scores per item, in the same order
Next: curated_round.py
Only final clauses are compared: whole answers in two styles that say the same are little alike (MiniLM: 0.66), and chains of
steps are much alike even if a digit is wrong in one of them (0.9). So a threshold belongs to an embedder and a style. And
agreement is not truth: candidates that share a mistake agree perfectly, and a negation is 0.66 like what it denies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from sicog_mcore.cognition.codec import final_clause
from sicog_mcore.cognition.prompts import Style, find_prompt
from sicog_mcore.cognition.records import Generation, Scores, read_records
from sicog_mcore.cognition.scoring.similarity import Similarity
from sicog_mcore.errors import RecordError

Across = Literal["styles", "within"]

UNITS = 10**6  # similarities are whole millionths, so sums are exact and ties are ties
NO_CLAUSE = "no_clause"
THRESHOLDS = (0.80, 0.85, 0.90)
BARS = 10  # of the histogram, from 0 to 1


class Voter(NamedTuple):
    """The final clause of one candidate, and the style in which it was asked.

    Attributes:
        clause: None if its steps cannot be read, or it was cut before its end.
    """

    clause: str | None
    style: Style


@dataclass(frozen=True)
class ScoringItem:
    """An item and all candidates that vote on it.

    Attributes:
        voters: its own candidates, then those of the other views in the order in which the views were given.
    """

    generation: Generation
    voters: tuple[Voter, ...]

    @property
    def texts(self) -> Iterator[str]:
        """The clauses that can be compared; a blank one says nothing."""
        return (voter.clause for voter in self.voters if voter.clause and voter.clause.strip())


class ScoredItem(NamedTuple):
    """Scores, and the number of candidates that the winner's score is the mean over (0 without a winner)."""

    scores: Scores
    voters: int


def read_items(generations: Path, views: Mapping[str, Path]) -> Iterator[ScoringItem]:
    """All items, each with its candidates from every view.

    Raises:
        RecordError: a view has other items, or asks something else.
    """
    files = [read_records(path, Generation) for path in (generations, *views.values())]
    for rows in zip_longest(*files):
        own = rows[0]
        for name, row in zip(views, rows[1:], strict=True):
            found, expected = [row and (row.id, row.task, row.question) for row in (row, own)]
            if found != expected:
                raise RecordError(
                    f"{views[name]} (view {name}): found {found or 'no more rows'}, expected {expected or 'no more rows'} "
                    f"as in {generations}; generate the view from the same items"
                )
        yield ScoringItem(own, tuple(voter for row in rows for voter in _voters(row)))


def _voters(row: Generation) -> Iterator[Voter]:
    """Yields a row's candidates; a failed row counts as so many silent ones, so that n stays as it was."""
    if row.failure:
        yield from (Voter(None, find_prompt(use.id).style) for use in row.prompts for _ in range(use.count))
        return
    for candidate in row.candidates:
        style = find_prompt(candidate.prompt).style
        yield Voter(final_clause(candidate.text, style, row.task) if candidate.finish == "stop" else None, style)


def score(
    items: Iterable[ScoringItem], similarity: Similarity, across: Across, views: Sequence[str] = ()
) -> Iterator[ScoredItem]:
    """Scores every item.

    Args:
        across: "styles" compares all candidates; "within" only those of the same style.
        views: names of the further views, for the record.
    """
    scorer = f"{similarity.name}; across {across}" + (f"; views {', '.join(views)}" if views else "")
    return (judge(item, similarity, across, scorer) for item in items)


def judge(item: ScoringItem, similarity: Similarity, across: Across, scorer: str) -> ScoredItem:
    """Scores one item.

    A score is the mean similarity to all voters, itself among them. A voter with nothing to compare is like nobody, not even
    itself: it lowers the others' scores, and never wins. The winner is the first of those with the highest mean over the
    others; where all are compared this is the highest score.

    Raises:
        RecordError: "within", and a style has one candidate, which would agree with all of its kind.
    """
    own = item.generation.candidates
    if item.generation.failure:
        return ScoredItem(Scores(item.generation.id, scorer, failure=item.generation.failure), 0)
    clauses = tuple(voter.clause for voter in item.voters)
    # [n, v]: own candidates in rows, all voters in columns. The further views vote, but cannot win.
    units = _units(clauses, similarity)[: len(own)]  # [n, v]: own candidates against all voters
    styles = np.array([voter.style for voter in item.voters])
    asked = (
        np.ones_like(units) if across == "styles" else (styles[: len(own), None] == styles).astype(np.int64)
    )  # [n, v]
    counts = [int(count) for count in asked.sum(1)]
    if 1 in counts and len(item.voters) > 1:
        raise RecordError(
            f"{item.generation.id!r}: the only candidate of style {item.voters[counts.index(1)].style!r} cannot be compared "
            "within its style; draw more of them, or compare across styles"
        )
    totals = [int(total) for total in (units * asked).sum(1)]
    scores = tuple(total / (count * UNITS) for total, count in zip(totals, counts, strict=True))
    # The diagonal is 0 for a clause that says nothing; such a one cannot win.
    able = [i for i in range(len(own)) if units[i, i] > 0]
    # By the mean over the others: within styles of different sizes, the share of oneself in a mean differs. Fractions
    # compare exactly, and of equals max takes the first.
    winner = max(able, key=lambda i: Fraction(totals[i] - int(units[i, i]), max(counts[i] - 1, 1)), default=-1)
    found = Scores(
        id=item.generation.id,
        scorer=scorer,
        clauses=clauses[: len(own)],
        matrix=tuple(tuple(value / UNITS for value in row) for row in units[:, : len(own)].tolist()),
        scores=scores,
        winner=winner,
        agreement=scores[winner] if able else 0.0,
        failure="" if able else NO_CLAUSE,
    )
    return ScoredItem(found, counts[winner] if able else 0)


def _units(clauses: Sequence[str | None], similarity: Similarity) -> np.ndarray:
    """Similarities in whole millionths, int64 [v, v]; equal clauses are compared once."""
    distinct = list(dict.fromkeys(clause for clause in clauses if clause and clause.strip()))
    # Row and column of the last place stay 0: silence is like nothing, not even like itself.
    units = np.zeros((len(distinct) + 1, len(distinct) + 1), np.int64)  # the last row and column is silence
    if distinct:
        values = similarity.matrix(distinct)
        if not np.isfinite(values).all():
            raise RecordError(f"{similarity.name} gave a similarity that is not a number for {distinct[0]!r}; try fp32")
        units[:-1, :-1] = np.rint(values * UNITS).astype(np.int64)
    place = {clause: i for i, clause in enumerate(distinct)}
    places = [place.get(clause, len(distinct)) if clause else len(distinct) for clause in clauses]
    return units[np.ix_(places, places)]


def others(threshold: float, voters: int) -> float:
    """The mean similarity to the others that a threshold asks for, since one of n is the candidate itself."""
    return (voters * threshold - 1) / (voters - 1)


class Tally:
    """Counts while verdicts pass through: agreement by the number of voters, and failures."""

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()
        self.bars: Counter[int] = Counter()
        self.items: Counter[int] = Counter()  # by voters
        self.passed: Counter[tuple[int, float]] = Counter()  # by voters and threshold

    def watch(self, verdicts: Iterable[ScoredItem]) -> Iterator[Scores]:
        """The scores of the verdicts."""
        for scores, voters in verdicts:
            if scores.failure:
                self.failures[scores.failure] += 1
            else:
                self.items[voters] += 1
                self.bars[min(max(int(scores.agreement * BARS), 0), BARS - 1)] += 1
                self.passed.update((voters, tau) for tau in THRESHOLDS if scores.agreement >= tau)
            yield scores

    def lines(self) -> Iterator[str]:
        """Gives the meaning of the thresholds, how many items pass them, and a histogram of agreement."""
        if not self.items:
            return
        yield "voters    items  " + "  ".join(f"agreement >= {tau:.2f}            " for tau in THRESHOLDS).rstrip()
        for voters in sorted(self.items):
            cells = []
            for tau in THRESHOLDS:
                share = self.passed[voters, tau] / self.items[voters]
                meaning = f"others >= {others(tau, voters):.4f}" if voters > 1 else "nobody to agree with"
                cells.append(f"{self.passed[voters, tau]:6d} {share:4.0%} {meaning:20}")
            yield f"{voters:6d} {self.items[voters]:8d}  " + "  ".join(cells).rstrip()
        yield "agreement     items"
        most = max(self.bars.values())
        for bar in range(min(self.bars), BARS):
            length = -(-40 * self.bars[bar] // most)
            yield f"{bar / BARS:.1f} - {(bar + 1) / BARS:.1f} {self.bars[bar]:8d}  {'#' * length}".rstrip()
