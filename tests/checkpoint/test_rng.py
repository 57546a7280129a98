"""Random states come back: the numbers drawn after loading are those drawn after saving."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from safetensors.torch import load_file

from sicog_mcore.checkpoint.rng import load_rng, save_rng
from sicog_mcore.config import ParallelConfig
from sicog_mcore.parallel.topology import start_topology, stop_topology


@pytest.fixture(autouse=True, scope="module")
def started() -> Iterator[None]:
    start_topology(ParallelConfig(), seed=3)
    yield
    stop_topology()


def draw() -> list[float]:
    """Numbers of every generator; the normal ones keep half a pair back for the next call."""
    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(3)
    return [
        *torch.rand(3).tolist(),
        *tracked.tolist(),
        *np.random.rand(3),
        *np.random.normal(size=3),
        random.random(),
        random.gauss(0, 1),
    ]


def test_the_same_numbers_come_after_loading(tmp_path: Path) -> None:
    path = tmp_path / "rng" / "rank.safetensors"
    draw()
    save_rng(path)
    expected = draw()
    assert draw() != expected
    load_rng(path)
    assert draw() == expected


def test_a_fresh_generator_is_restored_too(tmp_path: Path) -> None:
    random.seed(5)  # no half pair of normal numbers is kept yet
    np.random.seed(5)
    save_rng(tmp_path / "rank.safetensors")
    expected = draw()
    load_rng(tmp_path / "rank.safetensors")
    assert draw() == expected


def test_saving_draws_nothing_and_names_megatrons_states(tmp_path: Path) -> None:
    states = [torch.get_rng_state(), *get_cuda_rng_tracker().get_states().values()]
    save_rng(tmp_path / "rank.safetensors")
    after = [torch.get_rng_state(), *get_cuda_rng_tracker().get_states().values()]
    assert all(torch.equal(a, b) for a, b in zip(states, after, strict=True))
    assert "tracker.model-parallel-rng" in load_file(tmp_path / "rank.safetensors")
