"""What reference log-probabilities depend on, as one short text: rows, tokenizer, template, model, first weights.

In: Experiment, the files it names   Out: a hash   Next: reference.py
Rows and tokenizer count by content; shards and weights, which are large, by name, size and time of change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from sicog_mcore.config import Experiment

ROW_FILES = (".json", ".jsonl")
CHECKPOINTS = "checkpoints"


def fingerprint(experiment: Experiment) -> str:
    """Equal for equal inputs; independent of the layout, the packing and the optimiser."""
    data = experiment.data
    content = {
        "rows": [_rows(Path(source.path)) for source in data.sources],
        "duplicate_ids": data.duplicate_ids,
        "tokenizer": _digest(Path(data.tokenizer)),
        "template": [data.template, data.system_prompt],
        "model": asdict(experiment.model),
        "precision": experiment.train.precision,
        "seed": experiment.train.seed,  # of weights that are drawn at random
        "weights": {part: list(_weights(Path(path))) if path else [] for part, path in asdict(experiment.init).items()},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _rows(path: Path) -> object:
    if path.suffix in ROW_FILES:
        return _digest(path)
    return [_stat(shard) for shard in (sorted(path.glob("*.tar")) if path.is_dir() else [path])]


def _weights(path: Path) -> Iterator[tuple[str, int, int]]:
    """The files of a weights folder; of a run's output folder those of its checkpoints."""
    if path.is_file():
        yield _stat(path)
        return
    root = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    yield from (_stat(file) for file in sorted(root.rglob("*")) if file.is_file())


def _stat(path: Path) -> tuple[str, int, int]:
    return path.name, path.stat().st_size, path.stat().st_mtime_ns


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
