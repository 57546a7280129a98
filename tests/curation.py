"""A round written by hand, for tests: items, their images, generations and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from sicog_mcore.cognition.codec import KINDS, final_clause, render
from sicog_mcore.cognition.curation.filters import PerPrompt
from sicog_mcore.cognition.curation.selection import CandidateSource, Curation, ScoreFile
from sicog_mcore.cognition.prompts import find_prompt
from sicog_mcore.cognition.records import Candidate, Generation, PromptUse, Scores, write_records
from sicog_mcore.files import hash_file
from sicog_mcore.rollout.requests import Finish, Sampling
from tests.builders import write_image

COD = ("A red cup.", "It has one handle.", "It stands on a table.", "A window is behind it.", "A red cup on a table.")
COT = ("Count the cups.", "There are two cups.", "One and one are two.", "2")
SIZE = (48, 64)


class Said(NamedTuple):
    """One candidate: its prompt, its text or its last step, and its score."""

    prompt: str
    text: str
    score: float
    tokens: int = 20
    finish: Finish = "stop"


@dataclass(frozen=True)
class Made:
    """The records of one item."""

    generation: Generation
    scores: Scores


def chain(prompt: str, last: str) -> str:
    """An answer in steps that ends with ``last``; plain prompts have no other step."""
    kind = find_prompt(prompt)
    steps = COD if kind.task == "caption" else COT
    return render([*steps[:-1], last], KINDS[kind.task]) if kind.style == "steps" else last


def item(folder: Path, name: str, said: Sequence[Said], image: int | None = 0, question: str = "What is this?") -> Made:
    """The records of an item. Images of the same number are the same; None is an item without one."""
    path, content = "", ""
    if image is not None:
        path = f"i{image}.png"
        write_image(folder / "images" / path, *SIZE, seed=image)
        content = hash_file(folder / "images" / path)
    names = list(dict.fromkeys(one.prompt for one in said))
    task = find_prompt(names[0]).task
    candidates = tuple(
        Candidate(one.prompt, i, 7 * i, _text(one), one.tokens, -0.5 * one.tokens, one.finish)
        for i, one in enumerate(said)
    )
    clauses = tuple(final_clause(one.text, find_prompt(one.prompt).style, task) for one in candidates)
    values = tuple(one.score for one in said)
    prompts = tuple(PromptUse(prompt, 1, sum(one.prompt == prompt for one in said)) for prompt in names)
    winner = values.index(max(values))
    return Made(
        Generation(
            *(name, task, path, content, question, prompts, "native-1", "c0ffee", Sampling(), 3),
            candidates=candidates,
        ),
        Scores(name, "hand", clauses, tuple((value,) * len(said) for value in values), values, winner, max(values)),
    )


def _text(said: Said) -> str:
    return said.text if said.text.startswith("Step") else chain(said.prompt, said.text)


def failed(name: str, reason: str = "image_missing") -> Made:
    """An item for which generation failed."""
    generation = Generation(name, "caption", "gone.png", "", "", (), "native-1", "c0ffee", Sampling(), 3)
    return Made(replace(generation, failure=reason, detail="no file"), Scores(name, "hand", failure=reason))


def write_round(folder: Path, items: Sequence[Made], name: str = "round") -> Path:
    """Generations and scores in a folder of their own, which is returned."""
    path = folder / name
    (folder / "images").mkdir(parents=True, exist_ok=True)
    write_records(path / "generations.jsonl", [made.generation for made in items])
    write_records(path / "scores.jsonl", [made.scores for made in items])
    return path


def curation(folder: Path, rounds: Sequence[Path], tau: float = 0.8, **options: Any) -> Curation:
    """Curates these rounds with one threshold."""
    sources = tuple(
        CandidateSource(path / "generations.jsonl", (ScoreFile(path / "scores.jsonl", PerPrompt(tau)),))
        for path in rounds
    )
    return Curation(sources=sources, images=folder / "images", **options)
