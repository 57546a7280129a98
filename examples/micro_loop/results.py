"""Numbers of a seed, and what all seeds say: means, paired 95 % t-intervals, the gate, the goal.

In: folders that lanes.py filled, the truth of digits.py   Out: SeedResult, Difference   Next: document.py
Answers are judged by cognition/evaluation/judging.py. Intervals are over seeds: each seed has its own labels, its own first
weights and its own unlabelled pictures, and the same test digits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import t

from examples.micro_loop.digits import GROUNDS, INKS, NAMES, QUESTIONS, Picture, draw_pools
from examples.micro_loop.plan import ARMS, KEPT, Regime, slug
from sicog_mcore.cognition.answers import attributes
from sicog_mcore.cognition.codec import final_clause
from sicog_mcore.cognition.evaluation.benchmark import BenchmarkItem
from sicog_mcore.cognition.evaluation.judging import Judging, judge
from sicog_mcore.cognition.prompts import find_prompt
from sicog_mcore.cognition.records import Candidate, Decision, Generation, read_by_id, read_records

DIGIT: Mapping[str, Sequence[str]] = {"digit": NAMES}
ALL: Mapping[str, Sequence[str]] = {**DIGIT, "ink": tuple(INKS), "ground": tuple(GROUNDS)}
CONFIDENCE = 0.95
GATE_POINTS, GATE_KEPT = 8.0, (10.0, 90.0)


@dataclass(frozen=True)
class Scores:
    """How well an arm answers, in %.

    Attributes:
        digit: descriptions that name the digit and no other, mean of plain ones and chains.
        attributes: F1 over digit, ink and background, likewise.
        questions: short answers that are right.
    """

    digit: float
    attributes: float
    questions: float


@dataclass(frozen=True)
class Kept:
    """Shares that a curation kept, in %.

    Attributes:
        share: of the unlabelled pictures.
        precision: descriptions kept whose digit is right.
        random: all candidates whose digit is right, each picture counted once.
    """

    share: float
    precision: float
    random: float

    @property
    def gain(self) -> float:
        return self.precision - self.random

    @property
    def passes(self) -> bool:
        """The gate of this experiment."""
        return self.gain >= GATE_POINTS and GATE_KEPT[0] <= self.share <= GATE_KEPT[1]


@dataclass(frozen=True)
class SeedResult:
    """One seed."""

    seed: int
    arms: Mapping[str, Scores]
    kept: Mapping[str, Kept]


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences and half the width of its interval; NaN where one seed is all there is."""

    mean: float
    half: float

    @property
    def is_above_zero(self) -> bool:
        return self.mean - self.half > 0


def paired(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Second minus first, seed by seed, with its 95 % t-interval.

    Raises:
        ValueError: not equally many, or none.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} numbers are no pairs; give both for every seed")
    differences = np.subtract(second, first)
    n = len(differences)
    if n == 1:
        return Difference(float(differences[0]), float("nan"))
    half = t.ppf((1 + CONFIDENCE) / 2, n - 1) * differences.std(ddof=1) / np.sqrt(n)
    return Difference(float(differences.mean()), float(half))


def read_seed(home: Path, regime: Regime, seed: int, split: str) -> SeedResult:
    """All numbers of a finished seed."""
    pools = draw_pools(seed, regime.sizes, regime.renderings)
    arms = {arm: score_arm(home / slug(arm), pools[split], split) for arm in regime.arms}
    truth = {picture.id: picture.digit for picture in pools["unlabelled"]}
    curated = dict.fromkeys(source for arm in regime.arms for source in ARMS[arm] if source.startswith("curated"))
    candidates = home / "candidates" / "generations.jsonl"
    return SeedResult(seed, arms, {name: measure_kept(candidates, home / KEPT / name, truth) for name in curated})


def score_arm(home: Path, pictures: Sequence[Picture], split: str) -> Scores:
    """Judges an arm's answers."""
    described = read_by_id(home / split / "generations.jsonl", Generation)
    asked = read_by_id(home / f"{split}_questions" / "generations.jsonl", Generation)
    captions = [BenchmarkItem(picture.id, "", (picture.caption,)) for picture in pictures]
    answers = [
        BenchmarkItem(f"{picture.id}-{name}", text, (vars(picture)[name],))
        for picture in pictures
        for name, text in QUESTIONS.items()
    ]

    def mean(
        items: list[BenchmarkItem], found: Mapping[str, Generation], prompts: Iterable[str], judging: Judging
    ) -> float:
        return 100 * float(np.mean([o.value for prompt in prompts for o in judge(items, found, prompt, judging)]))

    return Scores(
        digit=mean(captions, described, ("caption", "cod"), Judging("attributes", vocabulary=DIGIT)),
        attributes=mean(captions, described, ("caption", "cod"), Judging("attributes", vocabulary=ALL)),
        questions=mean(answers, asked, ("direct",), Judging("exact")),
    )


def measure_kept(candidates: Path, curated: Path, truth: Mapping[str, str]) -> Kept:
    """How right what was kept is, against what could have been drawn.

    Args:
        truth: digit of every unlabelled picture.
    """
    decisions, right, random = read_by_id(curated / "decisions.jsonl", Decision), [], []
    for generation in read_records(candidates, Generation):
        hits = [_digit(candidate) == truth[generation.id] for candidate in generation.candidates]
        random.append(np.mean(hits))
        decision = decisions[generation.id]
        if decision.kept:
            right.append(hits[decision.chosen])
    precision = 100 * float(np.mean(right)) if right else float("nan")
    return Kept(100 * len(right) / len(random), precision, 100 * float(np.mean(random)))


def _digit(candidate: Candidate) -> str | None:
    """The digit that a description names; None if it names none, or several."""
    clause = final_clause(candidate.text, find_prompt(candidate.prompt).style, "caption")
    found = attributes(clause or "", DIGIT)
    return next(iter(found))[1] if len(found) == 1 else None
