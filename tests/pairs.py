"""Preference pairs on disk, for tests: sliced, unsliced and missing images, answers of different length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sicog_mcore.config import Experiment
from tests.builders import IMAGE_SIZES, QUESTIONS, tiny_experiment, write_image

CHOSEN = ("The circle is red.", "Yes, there is a cat with green eyes at the left side.", "There are two people.")
REJECTED = (
    "The square is blue, and the number of objects is 5.",
    "No.",
    "A dog in the sky looks straight at the camera.",
)


def write_pairs(folder: Path, num_pairs: int) -> Path:
    """A JSONL file of pairs; pair i has the id ``p<i>`` and stands in line i + 1. Returns its path."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(num_pairs):
        size = IMAGE_SIZES[i % len(IMAGE_SIZES)]
        row: dict[str, Any] = {"id": f"p{i}", "prompt": f"{QUESTIONS[i % len(QUESTIONS)]} ({i})"}
        if size is not None:
            row["image"] = f"p{i}.png"
            write_image(folder / "images" / row["image"], *size, seed=i)
        row |= {"chosen": CHOSEN[i % len(CHOSEN)], "rejected": REJECTED[(i // 2) % len(REJECTED)]}
        lines.append(json.dumps(row))
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def pair_experiment(folder: Path, **overrides: Any) -> Experiment:
    """The tiny preset, training preferences on what ``write_pairs`` put into ``folder``."""
    return tiny_experiment(folder, objective="dpo", **overrides)
