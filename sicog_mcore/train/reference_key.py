"""The key of reference log-probabilities: a hash of rows, tokenizer, template, model and first weights.

In: Experiment, DataFingerprint of its rows   Out: a hash   Next: reference.py
Rows, shards and tokenizer count as data/fingerprint.py says; weights, which are large, by name, size and time of change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from sicog_mcore.checkpoint.locate import CHECKPOINTS
from sicog_mcore.config import Experiment
from sicog_mcore.data.fingerprint import TOKENIZER, DataFingerprint


def fingerprint(experiment: Experiment, mark: DataFingerprint) -> str:
    """Hashes the inputs; equal for equal inputs, and independent of the layout, the packing and the optimiser.

    Args:
        mark: of the rows.
    """
    data = experiment.data
    content = {
        # By content and not by path: a data set that was moved keeps its reference.
        "rows": [[file.rows, file.ordered] for file in mark.files],
        "duplicate_ids": data.duplicate_ids,
        "tokenizer": mark.settings[TOKENIZER],
        "template": [data.template, data.system_prompt],
        "model": asdict(experiment.model),
        "precision": experiment.train.precision,
        "seed": experiment.train.seed,  # of weights that are drawn at random
        "weights": {part: list(_weights(Path(path))) if path else [] for part, path in asdict(experiment.init).items()},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _weights(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yields the files of a weights folder; of a run's output folder those of its checkpoints."""
    if path.is_file():
        yield _stat(path)
        return
    # Logs of an output folder grow while the weights stay, and must not count.
    root = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    yield from (_stat(file) for file in sorted(root.rglob("*")) if file.is_file())


def _stat(path: Path) -> tuple[str, int, int]:
    return path.name, path.stat().st_size, path.stat().st_mtime_ns
