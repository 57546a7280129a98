"""No parameter is touched before the forward of the module that owns it has begun: only there Megatron waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sicog_mcore.build import build_chunks, plan_build
from sicog_mcore.config import Experiment
from sicog_mcore.model.vlm import VisionLanguageModel
from sicog_mcore.parallel.topology import Topology, start_topology, stop_topology
from tests.batches import random_batches
from tests.builders import tiny_experiment
from tests.dist import Rank, run_ranks

VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {"model": {"decoder": {"tie_embeddings": False}}},
    "tied": {"model": {"decoder": {"tie_embeddings": True}}},
    "norms of heads": {"model": {"decoder": {"qk_norm": True, "qkv_bias": False}}},
    "trained positions": {"model": {"resampler": {"train_positions": True}}},
    "recomputed": {"train": {"recompute_tower": "full", "recompute_decoder": "full"}},
}
TENSOR_PARALLEL = {"parallel": {"tensor": 2, "sequence": True}, "model": {"decoder": {"tie_embeddings": True}}}


class Touches(TorchDispatchMode):
    """Notes every operator on a parameter's memory, views and ``.data`` included, and whether its owner had begun."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self._names = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters()}
        self._begun: set[str] = set()
        self.touched: set[str] = set()
        self.early: set[str] = set()
        for module in model.modules():  # as Megatron registers its own hooks
            module.register_forward_pre_hook(self._begin)

    def _begin(self, module: nn.Module, *_: Any) -> None:
        self._begun |= {self._names[p.untyped_storage().data_ptr()] for p in module.parameters(recurse=False)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and type(value) in (Tensor, nn.Parameter):
                name = self._names.get(value.untyped_storage().data_ptr())
                if name is not None:
                    self.touched.add(name)
                    if name not in self._begun:
                        self.early.add(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module", autouse=True)
def topology() -> Iterator[Topology]:
    yield start_topology(tiny_experiment(Path("unused")).parallel, seed=0)
    stop_topology()


def experiment_with(overrides: dict[str, Any]) -> Experiment:
    return tiny_experiment(Path("unused"), data={"token_budget": 512}, **overrides)


def build(experiment: Experiment, topology: Topology) -> VisionLanguageModel:
    (chunk,) = build_chunks(plan_build(experiment), topology)
    for parameter in chunk.parameters():
        parameter.data.fill_(0.01)
    return chunk


def touches_of(chunk: VisionLanguageModel, experiment: Experiment) -> tuple[set[str], set[str]]:
    """Parameters touched in a forward pass, and those of them touched too early."""
    (batch,) = random_batches(experiment, 1)
    with Touches(chunk) as touches:
        chunk(batch)
    return touches.touched, touches.early


@pytest.mark.parametrize("name", VARIANTS)
def test_no_parameter_is_used_outside_its_owners_forward(name: str, topology: Topology) -> None:
    experiment = experiment_with(VARIANTS[name])
    chunk = build(experiment, topology)
    touched, early = touches_of(chunk, experiment)
    assert early == set()
    assert touched == {name for name, _ in chunk.named_parameters()}  # the whole model was looked at


def _tensor_parallel(rank: Rank, experiment: Experiment) -> tuple[set[str], int]:
    chunk = build(experiment, rank.start(experiment.parallel))
    touched, early = touches_of(chunk, experiment)
    return early, len(touched) - len(list(chunk.named_parameters()))


@pytest.mark.slow
def test_the_same_under_tensor_and_sequence_parallelism() -> None:
    assert run_ranks(_tensor_parallel, 2, experiment_with(TENSOR_PARALLEL)) == [(set(), 0)] * 2


class Borrower(nn.Module):
    """Uses the weights of a module that it never calls."""

    def __init__(self, how: str):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "chunk":
            return nn.functional.linear(x, self.attn.in_proj_weight.chunk(3)[0])
        if self.how == "data":
            return x @ self.attn.in_proj_weight.data.T
        return self.attn.out_proj(x) + self.attn.in_proj_bias[:8]


@pytest.mark.parametrize(("how", "found"), [("chunk", "weight"), ("data", "weight"), ("bias", "bias")])
def test_a_borrowed_parameter_is_found(how: str, found: str) -> None:
    model = Borrower(how)
    with Touches(model) as touches:
        model(torch.zeros(3, 8))
    assert touches.early == {f"attn.in_proj_{found}"}
