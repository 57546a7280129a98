"""Joins the files of one round row by row.

In: folder with generations, scores and decisions   Out: RoundItems in the order of the files   Next: drift.py, page.py
Every step writes one row per item in the order of the items, so joining needs no memory and a gap is found at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from sicog_mcore.cognition.records import Decision, Generation, Scores, read_records
from sicog_mcore.errors import RecordError

SUFFIXES = (".jsonl", ".parquet")


@dataclass(frozen=True)
class RoundItem:
    """The three records that a round wrote about one item."""

    generation: Generation
    scores: Scores
    decision: Decision


def record_file(folder: Path, name: str) -> Path:
    """The file of this name in either form; the JSONL one where there is none."""
    files = [folder / (name + suffix) for suffix in SUFFIXES]
    return next((file for file in files if file.is_file()), files[0])


@dataclass(frozen=True)
class RoundSource:
    """Generations and their scores; of several scorers the one that named the winners."""

    generations: Path
    scores: Path


def read_round(folder: Path, sources: Sequence[RoundSource] = ()) -> Iterator[RoundItem]:
    """All items of a round.

    Args:
        folder: holds the decisions.
        sources: in the order in which they were curated; none stands for the folder's own generations and scores.

    Raises:
        RecordError: a file is missing or damaged, or the files do not speak of the same items.
    """
    sources = sources or [RoundSource(record_file(folder, "generations"), record_file(folder, "scores"))]
    generations = chain.from_iterable(read_records(source.generations, Generation) for source in sources)
    scores = chain.from_iterable(read_records(source.scores, Scores) for source in sources)
    decisions = read_records(record_file(folder, "decisions"), Decision)
    for row, (generation, score, decision) in enumerate(zip_longest(generations, scores, decisions), 1):
        if generation is None or score is None or decision is None:
            raise RecordError(f"{folder}: the three files have different lengths (row {row}); score and curate again")
        _require_fit(RoundItem(generation, score, decision), f"{folder}: row {row}")
        yield RoundItem(generation, score, decision)


def _require_fit(item: RoundItem, where: str) -> None:
    """Checks that the three rows are of one item, and that indices of candidates point at one."""
    ids = (item.generation.id, item.scores.id, item.decision.id)
    if len(set(ids)) > 1:
        raise RecordError(f"{where} is of {', '.join(map(repr, ids))}; score and curate again")
    count = len(item.generation.candidates)
    scores = item.scores
    # Clauses, scores, and both sides of the matrix have one entry for each candidate.
    sizes = {len(scores.clauses), len(scores.scores), len(scores.matrix), *map(len, scores.matrix)}
    if not scores.failure and sizes != {count}:
        raise RecordError(f"{where} ({ids[0]!r}) has {count} candidates but scores for {sorted(sizes)}; score again")
    for index in (scores.winner, item.decision.chosen, item.decision.rejected):
        if not -1 <= index < count:
            raise RecordError(f"{where} ({ids[0]!r}) points at candidate {index} of {count}; score and curate again")
