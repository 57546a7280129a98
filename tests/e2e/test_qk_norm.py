"""A decoder with normalised query and key heads (Qwen3) trains the same under every cut of its heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.builders import tiny_experiment, write_dataset
from tests.e2e.runs import train_ranks
from tests.tolerances import LAYOUT_GRAD_NORM, LAYOUT_LOSS

pytestmark = pytest.mark.slow
STEPS = 3


def _metrics(data: Path, output: Path, world_size: int, **parallel: Any) -> list[tuple[float, float]]:
    experiment = tiny_experiment(
        data,
        output=str(output),
        train={"steps": STEPS, "packs_per_step": 2, "tensorboard": False},
        data={"token_budget": 512},
        model={"decoder": {"qk_norm": True, "qkv_bias": False}},
        parallel=parallel,
    )
    return [(line["loss"], line["grad_norm"]) for line in train_ranks(experiment, world_size)]


def test_tensor_parallel_head_norms_equal_one_rank(tmp_path: Path) -> None:
    write_dataset(tmp_path, 20)
    expected = _metrics(tmp_path, tmp_path / "one", 1)
    assert len(expected) == STEPS
    for sequence in (False, True):
        found = _metrics(tmp_path, tmp_path / f"two-{sequence}", 2, tensor=2, sequence=sequence)
        assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=LAYOUT_LOSS)
        assert [norm for _, norm in found] == pytest.approx([norm for _, norm in expected], rel=LAYOUT_GRAD_NORM)
