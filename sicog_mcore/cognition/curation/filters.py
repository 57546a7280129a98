"""Judges items one by one: which are worth learning from.

In: Generation, Scores   Out: None, or the Drop that says why not   Next: curated_round.py (what needs all items: duplicates)
Reasons, in this order, the first that applies: the failure code of the item, no_image, no_candidates, no_clause, cut,
below_threshold, too_short, too_long, repetition. All but the first three look at the winner alone: only it is learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal, NamedTuple

from sicog_mcore.cognition.codec import KINDS, parse
from sicog_mcore.cognition.curation.near_duplicates import words
from sicog_mcore.cognition.prompts import Prompt, find_prompt
from sicog_mcore.cognition.records import Generation, Scores
from sicog_mcore.errors import ConfigError, ConfigProblem, RecordError

FilterStage = Literal["item", "score", "form", "row", "image", "evaluation", "duplicate", "mix"]

REPETITION_WORDS = 4
STYLES = ("steps", "plain")


@dataclass(frozen=True)
class PerPrompt:
    """A number that prompts may differ in: of the prompt's id, else of its style, else the general one.

    Attributes:
        special: (id or style, number).
    """

    general: float
    special: tuple[tuple[str, float], ...] = ()

    def of(self, prompt: Prompt) -> float:
        # The narrower rule wins: a prompt's own number before that of its style.
        special = dict(self.special)
        return special.get(prompt.id, special.get(prompt.style, self.general))


@dataclass(frozen=True)
class LengthLimits:
    """The limits of a winner's length and repetition.

    Attributes:
        min_tokens, max_tokens: of its length, the token that ended it counted; a maximum of 0 is none.
        max_repetition: largest share of runs of four words that occurred before, in any of its steps.
    """

    min_tokens: PerPrompt = PerPrompt(2)
    max_tokens: PerPrompt = PerPrompt(0)
    max_repetition: float = 0.3


class Drop(NamedTuple):
    """Why an item is not kept: the filter, a code that is counted, and the numbers behind it."""

    stage: FilterStage
    reason: str
    detail: str


def parse_per_prompt(option: str, values: Sequence[str]) -> PerPrompt:
    """Reads "0.85 cod=0.9 plain=0.8": the general number, then those of prompts or styles.

    Raises:
        ConfigError: no general number, or a name that is neither a prompt nor a style.
    """
    special: list[tuple[str, float]] = []
    try:
        general = _finite(values[0])
        for value in values[1:]:
            name, _, number = value.partition("=")
            if name not in STYLES:
                find_prompt(name)
            special.append((name, _finite(number)))
    except (ValueError, IndexError, RecordError) as error:
        fix = "give a number, then NAME=NUMBER for prompts or styles, e.g. 0.85 cod=0.9 plain=0.8"
        raise ConfigError([ConfigProblem(option, " ".join(values), str(error), fix)]) from error
    return PerPrompt(general, tuple(special))


def _finite(text: str) -> float:
    """A number; "nan" would let everything pass."""
    number = float(text)
    if not isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number


def judge(
    generation: Generation, scores: Sequence[Scores], thresholds: Sequence[PerPrompt], limits: LengthLimits
) -> Drop | None:
    """Finds the first reason against an item; None without one.

    Args:
        scores: of this item, from each scorer; the first names the winner, each must find it good enough.
        thresholds: of each scorer.
    """
    failure = generation.failure or next((row.failure for row in scores if row.failure), "")
    if failure:
        return Drop("item", failure, generation.detail)
    if generation.task == "caption" and not generation.image:
        return Drop("item", "no_image", "a description of no picture is made up")
    winner = scores[0].winner
    if winner < 0:
        return Drop("item", "no_candidates", "nothing was generated")
    candidate = generation.candidates[winner]
    prompt = find_prompt(candidate.prompt)
    if scores[0].clauses[winner] is None:
        return Drop("item", "no_clause", f"candidate {winner} has no part that could be compared")
    if candidate.finish == "length":
        return Drop("form", "cut", f"candidate {winner} was cut after {candidate.tokens} tokens")
    # The first scorer named the winner; the others may only object to it.
    for row, threshold in zip(scores, thresholds, strict=True):
        if row.scores[winner] < threshold.of(prompt):
            found = f"{row.scores[winner]:.4f} by {row.scorer}"
            return Drop("score", "below_threshold", f"{found}, at least {threshold.of(prompt):g} expected")
    return _judge_form(candidate.text, candidate.tokens, prompt, limits)


def _judge_form(text: str, tokens: int, prompt: Prompt, limits: LengthLimits) -> Drop | None:
    """Finds the first reason against a winner in its length and wording."""
    shortest, longest = limits.min_tokens.of(prompt), limits.max_tokens.of(prompt)
    if tokens < shortest:
        return Drop("form", "too_short", f"{tokens} tokens, at least {shortest:g} expected")
    if longest and tokens > longest:
        return Drop("form", "too_long", f"{tokens} tokens, at most {longest:g} allowed")
    # Step by step: the last step of a chain says again what the others said, and may.
    share = max(repetition(part) for part in parts(text, prompt))
    if share > limits.max_repetition:
        return Drop(
            "form", "repetition", f"{share:.2f} of the runs of words occur again, at most {limits.max_repetition:g}"
        )
    return None


def parts(text: str, prompt: Prompt) -> tuple[str, ...]:
    """The steps of a text, or the text; a synthesis may say again what the steps before it said."""
    steps = parse(text, KINDS[prompt.task]).steps if prompt.style == "steps" else None
    return steps or (text,)


def repetition(text: str) -> float:
    """Share of runs of four words that occurred before; 0 for a text that is shorter."""
    found = words(text)
    # Runs of four words: shorter ones occur again in any good text.
    runs = [tuple(found[start : start + REPETITION_WORDS]) for start in range(len(found) - REPETITION_WORDS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
