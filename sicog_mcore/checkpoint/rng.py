"""Saves the random states of one rank as tensors: torch, CUDA, Megatron's tensor-parallel tracker, numpy, Python.

They are stored as safetensors, one file per rank, because a random state belongs to a place in a layout, not to a parameter.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sicog_mcore.checkpoint.commit import write_tensors
from sicog_mcore.errors import CheckpointError

TRACKER = "tracker."


def save_rng(path: Path) -> None:
    """Writes this process's random states."""
    # Python's state is a version, 625 words and a cached normal number or None; numpy's is 624 words, a position, a
    # flag and the cached number. Integers and floats are kept in tensors of their own, so that nothing is rounded.
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*np.asarray(keys).tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        **{TRACKER + name: value for name, value in get_cuda_rng_tracker().get_states().items()},
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {name: value.clone() for name, value in state.items()})


def load_rng(path: Path) -> None:
    """Restores the states that ``save_rng`` wrote, in a process at the same place of the same layout.

    Raises:
        CheckpointError: the file holds something else.
    """
    try:
        _restore(load_file(path))
    except (
        SafetensorError,
        OSError,
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        OverflowError,
        RuntimeError,
    ) as error:
        raise CheckpointError(f"{path} holds no random states ({error}); use another checkpoint") from error


def _restore(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    version, *words = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    *keys, position, has_gauss = state["numpy"].tolist()
    cached = state["numpy_gauss"].item()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    tracked = {name.removeprefix(TRACKER): value for name, value in state.items() if name.startswith(TRACKER)}
    get_cuda_rng_tracker().set_states(tracked)
