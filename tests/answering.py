"""Checkpoints that answer, and runs that ask them, for tests of generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sicog_mcore.config import Experiment
from sicog_mcore.parallel.topology import Topology
from tests.builders import write_image

SHARPNESS = 8.0  # factor on the output head: far from uniform, as a trained model is
# (height, width) in px of the items' images, in turn: 0, 2, 4 and 6 slices under the tiny preset. None: text only.
SIZES = ((64, 64), (100, 180), None, (200, 200), (240, 340), (33, 57), (90, 160))
QUESTIONS = ("What color is the circle?", "Is there a <|im_end|> in it?", "How many objects are there?")
DRAW = ("--temperature", "1.0", "--top-p", "0.9", "--top-k", "0", "--max-new-tokens", "12", "--seed", "3")


def write_checkpoint(experiment: Experiment, folder: Path, topology: Topology) -> None:
    """Random weights as one of our checkpoints. Collective."""
    import torch

    from sicog_mcore.build import build_chunks, plan_build
    from sicog_mcore.checkpoint.part_writer import save_weights
    from sicog_mcore.model.initialise import initialise

    chunks = build_chunks(plan_build(experiment), topology)
    initialise(chunks, seed=5)
    for chunk in chunks:
        if chunk.post_process:
            with torch.no_grad():
                chunk.language_model.output_layer.weight.mul_(SHARPNESS)
    save_weights(chunks, experiment, topology, folder)


def write_items(folder: Path, count: int) -> None:
    """``items.jsonl`` and ``images/``: rows with a question and without, the fourth with an image that is none."""
    rows: list[dict[str, Any]] = []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(count):
        size, row = SIZES[i % len(SIZES)], {"id": f"i{i}"}
        if size is not None:
            row["image"] = f"i{i}.png"
            write_image(folder / "images" / row["image"], *size, seed=i)
        if i % 2 or size is None:
            mark = "<image>\n" if size is not None else ""
            row["conversations"] = [{"from": "human", "value": mark + QUESTIONS[i % len(QUESTIONS)]}]
        rows.append(row)
    if count > 3:
        (folder / "images" / "i3.png").write_bytes(b"no image at all")
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    """Of launch/generate.py, for what ``write_checkpoint`` and ``write_items`` put into a folder."""
    prompts = ("--prompts", "cod=2", "caption=1")
    files = ("--checkpoint", folder / "model", "--rows", folder / "items.jsonl", "--images", folder / "images")
    return [*map(str, files), *prompts, *DRAW, "--out", str(out), *more]
