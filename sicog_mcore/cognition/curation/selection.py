"""Selects the items that are kept: first each by itself, then against evaluation images, each other, and the mix.

In: Curation   Out: Selection: for every item None, or the Drop that says why not
Next: curated_round.py (writes what is kept)
Of items that are alike the one with the best agreement stays, and of equals the one with the first id. Images are compared
among items that were asked the same; texts by what scoring compared, together with the item's question if it was asked.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Literal

from sicog_mcore.cognition.curation.conversations import PairBounds, RowForm, chance, make_rows
from sicog_mcore.cognition.curation.datasets import Format
from sicog_mcore.cognition.curation.filters import Drop, LengthLimits, PerPrompt, judge
from sicog_mcore.cognition.curation.image_marks import mark_evaluation, mark_items
from sicog_mcore.cognition.curation.near_duplicates import (
    ImageIndex,
    ImageMark,
    Shingles,
    distance,
    repeated_images,
    repeated_texts,
    shingles,
    words,
)
from sicog_mcore.cognition.prompts import bare_question, find_prompt
from sicog_mcore.cognition.records import Generation, Scores, Task, read_records
from sicog_mcore.errors import RecordError, SampleError

RowKind = Literal["caption", "answer", "text"]


@dataclass(frozen=True)
class ScoreFile:
    """Scores of one scorer, and how good it must find a winner."""

    path: Path
    threshold: PerPrompt


@dataclass(frozen=True)
class CandidateSource:
    """Items of one generation run; ``scores[0]`` names their winners, and each of the scorers may object."""

    generations: Path
    scores: tuple[ScoreFile, ...]


@dataclass(frozen=True, kw_only=True)
class Curation:
    """All that a curated set depends on.

    Attributes:
        images: folder that the image paths of the records are relative to.
        text: LLaVA rows without images, which are mixed in.
        evaluation: images, folders of images, or TSV files, none of which may be learnt.
        image_radius, evaluation_radius: bits of 64 in which images that count as equal may differ; -1 for equal bytes.
        text_similarity: share of shingles from which on texts count as equal; 0 compares none.
        text_min_words: shorter texts are never compared.
        forms: rows that are made of each item.
        mix: (kind, part) of the training rows; empty takes all there are, and a kind that is not named takes no part.
        min_rows, min_share, max_share: a result with fewer rows, or another share of items that agree, is refused.
        workers: threads that decode images; without effect on the result.
    """

    sources: tuple[CandidateSource, ...]
    images: Path
    text: Path | None = None
    evaluation: tuple[Path, ...] = ()
    limits: LengthLimits = field(default_factory=LengthLimits)
    image_radius: int = 4
    evaluation_radius: int = 8
    text_similarity: float = 0.9
    text_min_words: int = 20
    forms: tuple[RowForm, ...] = ("chain",)
    formats: tuple[Format, ...] = ("jsonl",)
    mix: tuple[tuple[RowKind, float], ...] = ()
    pairs: PairBounds = field(default_factory=PairBounds)
    seed: int = 42
    min_rows: int = 1
    min_share: float = 0.05
    max_share: float = 1.0
    workers: int = 4


@dataclass(frozen=True)
class Selection:
    """The decision on each item, in their order, and the rows of text that are taken."""

    tasks: list[Task]
    drops: list[Drop | None]
    text_rows: frozenset[int]
    num_rows: int
    evaluation: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class _Survivor:
    """An item in memory that passed all filters which look at one item alone."""

    number: int
    id: str
    task: Task
    image: str
    image_hash: str
    agreement: float
    asked: Hashable
    text: Shingles
    num_rows: int


def read_source(source: CandidateSource) -> Iterator[tuple[Generation, tuple[Scores, ...]]]:
    """The records of a source, item by item.

    Raises:
        RecordError: files that do not belong together: other ids, other numbers of candidates, other prompts.
    """
    scores = zip_longest(*(read_records(file.path, Scores) for file in source.scores))
    generations = read_records(source.generations, Generation)
    for row, (generation, found) in enumerate(zip_longest(generations, scores), 1):
        for file, of_file in zip(source.scores, found or [None] * len(source.scores), strict=True):
            # Files are joined by position: one row missing would give each later item the scores of its neighbour.
            if generation is None or of_file is None or generation.id != of_file.id:
                ids = [record.id if record else None for record in (generation, of_file)]
                raise RecordError(
                    f"{file.path}:{row}: found item {ids[1]!r}, expected {ids[0]!r} of {source.generations}; score again"
                )
            count = len(generation.candidates)
            fits = len(of_file.scores) == len(of_file.clauses) == count and -1 <= of_file.winner < count
            if not of_file.failure and not fits:
                raise RecordError(f"{file.path}:{row}: scores do not fit the {count} candidates; score again")
        _check_versions(generation, f"{source.generations}:{row}")
        yield generation, found


def _check_versions(generation: Generation, origin: str) -> None:
    """Checks the wording of every prompt: if it has changed since, the answer is one to another question."""
    for use in generation.prompts:
        known = find_prompt(use.id).version
        if use.version != known:
            raise RecordError(
                f"{origin}: found prompt {use.id!r} in version {use.version}, expected {known}; "
                "generate again, or curate with the version of this program that generated"
            )


def select(curation: Curation, text_ids: Mapping[int, str]) -> Selection:
    """Decides about all items.

    Args:
        text_ids: id of each usable row of text, by its number.

    Raises:
        RecordError: files that do not belong together, or an id that occurs twice.
        ConfigError: evaluation images that cannot be read.
    """
    tasks: list[Task] = []
    drops: list[Drop | None] = []
    survivors: list[_Survivor] = []
    ids: set[str] = set()
    for source in curation.sources:
        for generation, scores in read_source(source):
            if generation.id in ids:
                raise RecordError(f"{source.generations}: {generation.id!r} occurs twice; ids of items must be unique")
            ids.add(generation.id)
            found = _judge_alone(len(tasks), generation, scores, source, curation)
            tasks.append(generation.task)
            drops.append(found if isinstance(found, Drop) else None)
            if isinstance(found, _Survivor):
                survivors.append(found)
    # From here on the order of the files no longer matters.
    survivors.sort(key=lambda survivor: (-survivor.agreement, survivor.id))
    survivors, evaluation = _drop_images(survivors, drops, curation)
    survivors = _drop_texts(survivors, drops, curation.text_similarity)
    text_rows, num_rows = _mix(survivors, drops, text_ids, curation)
    return Selection(tasks, drops, text_rows, num_rows, evaluation)


def _judge_alone(
    number: int, generation: Generation, scores: Sequence[Scores], source: CandidateSource, curation: Curation
) -> Drop | _Survivor:
    drop = judge(generation, scores, [file.threshold for file in source.scores], curation.limits)
    if drop:
        return drop
    winner = generation.candidates[scores[0].winner]
    try:
        rows = make_rows(generation, winner, curation.forms)
    except SampleError as error:
        return Drop("row", error.reason, error.detail)
    if not rows:
        return Drop("row", "no_form", f"{winner.prompt!r} gives none of the forms {', '.join(curation.forms)}")
    question = bare_question(generation.question) if find_prompt(winner.prompt).with_question else ""
    clause = scores[0].clauses[scores[0].winner] or ""
    return _Survivor(
        number=number,
        id=generation.id,
        task=generation.task,
        image=generation.image,
        image_hash=generation.image_hash,
        agreement=scores[0].scores[scores[0].winner],
        asked=(generation.task, " ".join(words(question))),
        text=shingles(f"{question} {clause}", curation.text_min_words if curation.text_similarity else 1 << 30),
        num_rows=len(rows),
    )


def _drop_images(
    survivors: list[_Survivor], drops: list[Drop | None], curation: Curation
) -> tuple[list[_Survivor], Mapping[str, int]]:
    """Drops items whose image is unusable, belongs to evaluation, or repeats that of a better item."""
    marks = mark_items((s.image for s in survivors if s.image), curation.images, curation.workers)
    evaluation = mark_evaluation(curation.evaluation, curation.workers)
    names, excluded = [name for name, _ in evaluation], ImageIndex(curation.evaluation_radius)
    for number, (_, foreign) in enumerate(evaluation):
        excluded.add(number, foreign)
    # Per path, not per item: an image with many questions is looked up once.
    matches = {path: excluded.find(own) for path, own in marks.items() if isinstance(own, ImageMark)}
    # Survivors stand best first here, so of equal images the best item's stays.
    left: list[tuple[_Survivor, ImageMark]] = []
    without: list[_Survivor] = []
    for survivor in survivors:
        mark = marks.get(survivor.image)
        if mark is None:  # an item of text only
            without.append(survivor)
        elif isinstance(mark, SampleError):
            drops[survivor.number] = Drop("image", mark.reason, f"{survivor.image} cannot be used")
        # Answers to another picture than the one that is now under this name would be learnt for it.
        elif survivor.image_hash != mark.content:
            found = f"{survivor.image} has the hash {mark.content}, its answers were made from {survivor.image_hash}"
            drops[survivor.number] = Drop("image", "image_changed", found)
        elif (match := matches[survivor.image]) is not None:
            like = _likeness(mark, evaluation[match][1], names[match])
            drops[survivor.number] = Drop("evaluation", "evaluation_image", like)
        else:
            left.append((survivor, mark))
    kept: list[_Survivor] = []
    # Grouped by what was asked: the same picture may be learnt from with another question.
    repeats = repeated_images([mark for _, mark in left], [s.asked for s, _ in left], curation.image_radius)
    for (survivor, own), repeat in zip(left, repeats, strict=True):
        if repeat is None:
            kept.append(survivor)
            continue
        other, other_mark = left[repeat]
        like = _likeness(own, other_mark, f"{other.image} of {other.id!r}")
        drops[survivor.number] = Drop("duplicate", "near_duplicate_image", like)
    counts = {
        "images": len(evaluation),
        "known_by_bytes_alone": sum(foreign.gradient is None for _, foreign in evaluation),
    }
    return sorted([*kept, *without], key=lambda survivor: (-survivor.agreement, survivor.id)), counts


def _likeness(mark: ImageMark, other: ImageMark, name: str) -> str:
    if mark.content == other.content:
        return f"same bytes as {name}"
    return f"differs in {distance(mark, other)} of 64 bits from {name}"


def _drop_texts(survivors: list[_Survivor], drops: list[Drop | None], threshold: float) -> list[_Survivor]:
    if not threshold:
        return survivors
    kept = []
    repeats = repeated_texts([survivor.text for survivor in survivors], threshold)
    for survivor, repeat in zip(survivors, repeats, strict=True):
        if repeat is None:
            kept.append(survivor)
        else:
            like = f"says nearly the same as {survivors[repeat].id!r}"
            drops[survivor.number] = Drop("duplicate", "near_duplicate_text", like)
    return kept


def _mix(
    survivors: Sequence[_Survivor], drops: list[Drop | None], text_ids: Mapping[int, str], curation: Curation
) -> tuple[frozenset[int], int]:
    """Drops what exceeds the wanted ratio of rows; returns the rows of text that are taken, and the number of all rows."""
    if not curation.mix:
        return frozenset(text_ids), sum(survivor.num_rows for survivor in survivors) + len(text_ids)
    parts = dict(curation.mix)
    pools: dict[RowKind, dict[int, tuple[str, int]]] = {
        "caption": {s.number: (s.id, s.num_rows) for s in survivors if s.task == "caption"},
        "answer": {s.number: (s.id, s.num_rows) for s in survivors if s.task == "answer"},
        "text": {number: (name, 1) for number, name in text_ids.items()},
    }
    # The scarcest kind is taken whole and sets the scale for the others.
    totals = {kind: sum(size for _, size in pool.values()) for kind, pool in pools.items()}
    scale = min(totals[kind] / part for kind, part in curation.mix if part)
    taken = {kind: _draw(pool, scale * parts.get(kind, 0.0), curation.seed) for kind, pool in pools.items()}
    for survivor in survivors:
        if survivor.number not in taken[survivor.task]:
            drops[survivor.number] = Drop("mix", "mix", f"{totals[survivor.task]} rows exceed its part of the mix")
    return frozenset(taken["text"]), sum(pools[kind][number][1] for kind in pools for number in taken[kind])


def _draw(pool: Mapping[int, tuple[str, int]], quota: float, seed: int) -> set[int]:
    """Whole items, in an order that depends on seed and id alone, as long as they fit into the quota of rows."""
    taken: set[int] = set()
    rows = 0
    for number in sorted(pool, key=lambda number: (chance(seed, pool[number][0]), pool[number][0])):
        # Items that do not fit are passed over, not cut: smaller ones behind them may still fit.
        if rows + pool[number][1] <= quota + 1e-9:
            taken.add(number)
            rows += pool[number][1]
    return taken
