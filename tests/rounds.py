"""Small rounds on disk, for whatever reads the files of one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from PIL import Image

from sicog_mcore.cognition.records import Candidate, Decision, Generation, PromptUse, Scores, Task, write_records
from sicog_mcore.cognition.reporting.rounds import RoundItem
from sicog_mcore.rollout.requests import Sampling

TASKS: tuple[Task, ...] = ("caption", "answer")


def make_item(name: str, texts: Sequence[str], agreement: float = 0.9, **fields: Any) -> RoundItem:
    """An item whose first candidate wins; no texts make it one that failed.

    Args:
        fields: "task", "image", "image_hash" and "question" of the generation; "reason", else it is kept.
    """
    failure = "" if texts else "image_missing"
    reason = fields.pop("reason", failure or "kept")
    candidates = tuple(
        Candidate("cod", i, i, text, len(text.split()), -0.5 * len(text.split()), "stop")
        for i, text in enumerate(texts)
    )
    known = {"task": "caption", "image": "", "image_hash": "", "question": "What is there?"} | fields
    generation = Generation(
        id=name,
        prompts=(PromptUse("cod", 1, len(texts)),),
        engine="native 1",
        checkpoint="c0ffee",
        sampling=Sampling(),
        seed=7,
        candidates=candidates,
        failure=failure,
        **known,
    )
    if failure:
        return RoundItem(generation, Scores(name, "tfidf", failure=failure), Decision(name, False, reason))
    count = len(texts)
    off_diagonal = (agreement * count - 1) / (count - 1) if count > 1 else 1.0
    matrix = tuple(tuple(1.0 if i == j else off_diagonal for j in range(count)) for i in range(count))
    scores = Scores(name, "tfidf", tuple(texts), matrix, (agreement,) * count, 0, agreement)
    if reason != "kept":
        return RoundItem(generation, scores, Decision(name, False, reason, "found 1 < 2"))
    return RoundItem(generation, scores, Decision(name, True, reason, "", 0, count - 1, (f"{name}#chain",)))


def write_round(folder: Path, items: Sequence[RoundItem], **funnel: Any) -> Path:
    """Writes the four files of a round. Returns its folder."""
    write_records(folder / "generations.jsonl", [item.generation for item in items])
    write_records(folder / "scores.jsonl", [item.scores for item in items])
    write_records(folder / "decisions.jsonl", [item.decision for item in items])
    came = Counter(item.generation.task for item in items)
    kept = Counter(item.generation.task for item in items if item.decision.kept)
    dropped = Counter((item.decision.reason, item.generation.task) for item in items if not item.decision.kept)
    steps = [
        {"stage": "own", "reason": reason, **counts, "count": sum(counts.values())}
        for reason in sorted({reason for reason, _ in dropped})
        for counts in [{task: dropped[reason, task] for task in TASKS}]
    ]
    content = {
        "in": len(items),
        "dropped": steps,
        "kept": sum(kept.values()),
        "tasks": {task: {"in": came[task], "kept": kept[task]} for task in TASKS},
        "rows": {"chain": sum(kept.values())},
        "pairs": {"written": sum(kept.values())},
        "settings": {"thresholds": [[{"general": 0.87, "special": [["cod", 0.93]]}]], "image_radius": 4},
    }
    (folder / "funnel.json").write_text(json.dumps(content | funnel), encoding="utf-8")
    return folder


def write_image(folder: Path, name: str, height: int, width: int, **options: Any) -> dict[str, str]:
    """Writes an image of noise, which no encoder makes small. Returns its fields of a generation."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(name)).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(folder / name, **options)
    return {"image": name, "image_hash": xxhash.xxh128_hexdigest((folder / name).read_bytes())}
