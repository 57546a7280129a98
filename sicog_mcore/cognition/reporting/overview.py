"""A round at a glance: how it was made, how far candidates agree, and which items a page shows.

In: items of a round   Out: Overview   Next: page.py
Counts are of all items. Those shown in full are drawn: of every reason equally many, as far as there are so many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import xxhash

from sicog_mcore.cognition.records import Task
from sicog_mcore.cognition.reporting.drift import Gatherer, RoundText
from sicog_mcore.cognition.reporting.rounds import RoundItem
from sicog_mcore.rollout.requests import Sampling

BIN = 0.02


@dataclass(frozen=True)
class Overview:
    """The overview of a round, from a first look at all its items.

    Attributes:
        facts: label and the distinct values found; more than one means that the round was made in different ways.
        reasons: items by the reason of their decision, most frequent first.
        agreements: (agreement, kept) of the items that have a winner.
        candidates: most frequent number of candidates.
        rows: training rows made.
        order: (hash, row) of the items of each reason, smallest hash first.
        content: what drift.py compares.
    """

    facts: Mapping[str, tuple[str, ...]]
    reasons: Mapping[str, int]
    agreements: Mapping[Task, Sequence[tuple[float, bool]]]
    candidates: Mapping[Task, int]
    rows: int
    order: Mapping[str, Sequence[tuple[int, int]]]
    content: Mapping[Task, RoundText]

    @property
    def items(self) -> int:
        return sum(self.reasons.values())

    @property
    def scored(self) -> int:
        return sum(map(len, self.agreements.values()))

    @property
    def kept(self) -> int:
        return sum(kept for pairs in self.agreements.values() for _, kept in pairs)


@dataclass(frozen=True)
class Bar:
    """Items whose agreement lies in [low, high); the last bar includes 1."""

    low: float
    high: float
    kept: int
    dropped: int


@dataclass(frozen=True)
class Threshold:
    """The meaning of a threshold: items at or above it, and the mean similarity to the other candidates it asks for.

    Attributes:
        is_used: the round was curated with it, for some prompt at least.
    """

    value: float
    is_used: bool
    count: int
    share: float
    to_others: float | None


def survey(items: Iterable[RoundItem], seed: int) -> Overview:
    """Looks at every item once.

    Args:
        seed: of the draw of items that are shown.
    """
    facts: dict[str, Counter[str]] = {}
    agreements: dict[Task, list[tuple[float, bool]]] = {}
    candidates: dict[Task, Counter[int]] = {}
    order: dict[str, list[tuple[int, int]]] = {}
    gatherer, rows = Gatherer(), 0
    for row, item in enumerate(items):
        task = item.generation.task
        for label, value in _facts(item):
            facts.setdefault(label, Counter())[value] += 1
        if item.scores.winner >= 0:
            agreements.setdefault(task, []).append((item.scores.agreement, item.decision.kept))
            candidates.setdefault(task, Counter())[len(item.generation.candidates)] += 1
        rows += len(item.decision.rows)
        key = f"{seed}:{item.generation.id}".encode("utf-8", "surrogatepass")
        # By hash and not by place, so that a draw of few is a draw from the whole round.
        order.setdefault(item.decision.reason, []).append((xxhash.xxh64_intdigest(key), row))
        gatherer.add(item)
    return Overview(
        facts={label: tuple(value for value, _ in counts.most_common()) for label, counts in facts.items()},
        reasons=dict(sorted(((r, len(rows)) for r, rows in order.items()), key=lambda pair: (-pair[1], pair[0]))),
        agreements={task: agreements[task] for task in sorted(agreements)},
        candidates={task: counts.most_common(1)[0][0] for task, counts in candidates.items()},
        rows=rows,
        order={reason: sorted(rows) for reason, rows in order.items()},
        content=gatherer.result(),
    )


def _facts(item: RoundItem) -> Iterable[tuple[str, str]]:
    generation = item.generation
    yield "Checkpoint", generation.checkpoint
    yield "Engine", generation.engine
    yield "Sampling", f"{describe_sampling(generation.sampling)}, seed {generation.seed}"
    prompts = ", ".join(f"{prompt.count} × {prompt.id} (version {prompt.version})" for prompt in generation.prompts)
    yield "Scorer", item.scores.scorer
    yield f"Prompts for each {generation.task}", prompts


def describe_sampling(sampling: Sampling) -> str:
    """All that takes part in drawing a token, in words."""
    if sampling.temperature == 0:
        how = "the most probable token"
    else:
        top_k = f"top-k {sampling.top_k}" if sampling.top_k else "no top-k"
        how = f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, {top_k}"
    return f"{how}, at most {sampling.max_new_tokens} tokens"


def choose_rows(order: Mapping[str, Sequence[tuple[int, int]]], most: int) -> frozenset[int]:
    """Rows of the items that are shown: as equal a number of every reason as there are items for.

    Args:
        order: (hash, row) by reason, smallest hash first.
        most: rows in all.
    """
    chosen: list[int] = []
    # The rarest reasons choose first, and what they cannot use is shared by the rest.
    strata = sorted(order, key=lambda reason: (len(order[reason]), reason))
    for number, reason in enumerate(strata):
        share = (most - len(chosen)) // (len(strata) - number)  # what a rare reason leaves goes to the others
        chosen += [row for _, row in order[reason][:share]]
    return frozenset(chosen)


def histogram(agreements: Sequence[tuple[float, bool]]) -> tuple[Bar, ...]:
    """Items by agreement in bars of BIN up to 1, from 0.5, or lower where the values demand it."""
    last = round(1 / BIN)
    # Agreement has six digits; less than half of the last one keeps a value on the edge of a bar out of the one below.
    places = [(min(int((value + 5e-7) // BIN), last - 1), kept) for value, kept in agreements]
    first = min([last // 2, *(place for place, _ in places)])
    counts = Counter(places)
    return tuple(
        Bar(i * BIN, (i + 1) * BIN, kept=counts[i, True], dropped=counts[i, False]) for i in range(first, last)
    )
