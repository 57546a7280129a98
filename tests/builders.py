"""Small real inputs for tests: images and rows on disk, and experiments that point at them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sicog_mcore import presets
from sicog_mcore.config import DataConfig, Experiment, SourceConfig

ASSETS = Path(__file__).parent / "assets"
TOKENIZER = str(ASSETS / "tokenizer.json")

# (height, width) in px; the tiny preset slices what is larger than 112 x 112 px. None is a row without an image.
IMAGE_SIZES = ((64, 64), (90, 130), None, (150, 200), (300, 140), (112, 112), (240, 240), None, (80, 400), (33, 57))
QUESTIONS = ("What color is the circle?", "Describe this image in detail.", "Is there a red square in the image?")
ANSWERS = (
    "The circle is red.",
    "A cat with green eyes looks straight at the camera, and the sky in the background is bright.",
    "No.",
    "There are two people at the left side and three at the right side. The number of objects is 5.",
)


def write_image(path: Path, height: int, width: int, seed: int) -> None:
    """A smooth random pattern, as PNG or JPEG by the name's ending."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)


def write_dataset(folder: Path, num_samples: int, seed: int = 0) -> Path:
    """A LLaVA JSONL file with sliced, unsliced and missing images, one or two turns; returns its path.

    Sample i has the id ``s<i>`` and stands in line i + 1; its image, if any, is ``images/s<i>.png`` or ``.jpg``.
    """
    lines = []
    for i in range(num_samples):
        size = IMAGE_SIZES[(i + seed) % len(IMAGE_SIZES)]
        row: dict[str, Any] = {"id": f"s{i}"}
        question = QUESTIONS[i % len(QUESTIONS)]
        if size is not None:
            row["image"] = f"s{i}.{'png' if i % 2 else 'jpg'}"
            write_image(folder / "images" / row["image"], *size, seed=seed + i)
            question = f"<image>\n{question}"
        row["conversations"] = [
            {"from": "human", "value": question},
            {"from": "gpt", "value": ANSWERS[i % len(ANSWERS)]},
        ]
        if i % 3 == 0:
            row["conversations"] += [{"from": "human", "value": "And sample?"}, {"from": "gpt", "value": f"It is {i}."}]
        lines.append(json.dumps(row))
    path = folder / "data.jsonl"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tiny_experiment(folder: Path, **overrides: Any) -> Experiment:
    """The tiny preset on the data set that ``write_dataset`` put into ``folder``.

    A dictionary replaces fields inside that section: ``tiny_experiment(folder, data={"workers": 2}, output="x")``.
    """
    source = SourceConfig(path=str(folder / "data.jsonl"), images=str(folder / "images"))
    base = presets.tiny()
    data = replace(base.data, sources=(source,), tokenizer=TOKENIZER)
    return _override(replace(base, output=str(folder / "run"), data=data), overrides)


def with_values(experiment: Experiment, values: Mapping[str, Any]) -> Experiment:
    """The experiment with values set by dotted path: ``with_values(experiment, {"train.steps": 3})``."""
    for path, value in values.items():
        experiment = _set(experiment, path.split("."), value)
    return experiment


def _set(node: Any, path: list[str], value: Any) -> Any:
    head, *rest = path
    return replace(node, **{head: _set(getattr(node, head), rest, value) if rest else value})


def _override(config: Any, changes: dict[str, Any]) -> Any:
    """Replaces fields of a configuration, dictionaries inside the section they name."""
    values = {
        name: _override(old, new) if is_dataclass(old := vars(config)[name]) and isinstance(new, dict) else new
        for name, new in changes.items()
    }
    return replace(config, **values)


def data_config(**changes: Any) -> DataConfig:
    """The tiny preset's data section with the tests' tokenizer and no data set."""
    return replace(presets.tiny().data, tokenizer=TOKENIZER, **changes)
