"""First weights are those of one rank under every layout, and follow the rules of Megatron and of the released resampler."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sicog_mcore.build import build_model, plan_build
from sicog_mcore.config import Experiment
from sicog_mcore.model.initialise import STD, global_names
from sicog_mcore.parallel.ddp import TrainableModel
from sicog_mcore.parallel.topology import Topology, start_topology, stop_topology
from sicog_mcore.train.step import NextToken, train_step
from tests.batches import random_batches
from tests.builders import tiny_experiment
from tests.dist import Rank, run_ranks
from tests.tolerances import LAYOUT_GRAD_NORM, LAYOUT_LOSS

STD_TOLERANCE = 0.05  # of a sample of thousands
TABLE, HEAD = "language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"
TIED = {"decoder": {"tie_embeddings": True}}


def experiment_with(seed: int = 3, **overrides: Any) -> Experiment:
    return tiny_experiment(Path("unused"), data={"token_budget": 512}, train={"seed": seed}, **overrides)


def weights(model: TrainableModel) -> dict[str, Tensor]:
    """All weights of this rank, by their name in the whole model."""
    found = {}
    for chunk in model.chunks:
        parameters: dict[str, Tensor] = dict(chunk.named_parameters())  # type: ignore[attr-defined]
        found |= {whole: parameters[name].detach().clone() for name, whole in global_names(chunk).items()}  # type: ignore[arg-type]
    return found


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    yield start_topology(experiment_with().parallel, seed=0)
    stop_topology()


def build(experiment: Experiment, topology: Topology) -> dict[str, Tensor]:
    return weights(build_model(plan_build(experiment), topology))


def test_weights_follow_from_the_seed_and_no_two_tensors_are_alike(topology: Topology) -> None:
    first, again, other = (build(experiment_with(seed), topology) for seed in (3, 3, 4))
    matrices = {name: w for name, w in first.items() if w.dim() > 1 and "pos_embed" not in name}
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in matrices)
    starts = {tuple(weight.flatten()[:8].tolist()) for weight in matrices.values()}
    assert len(starts) == len(matrices)


def test_scales_are_megatrons(topology: Topology) -> None:
    experiment = experiment_with()
    depths = {"tower": experiment.model.tower.layers_used, "language_model": experiment.model.decoder.num_layers}
    for name, weight in build(experiment, topology).items():
        part = name.partition(".")[0]
        if part == "resampler":
            continue  # its own test has the rules of the released module
        if name.endswith("bias"):
            assert not weight.any(), name
        elif "norm" in name:
            assert (weight == 1).all(), name
        elif weight.dim() > 1:
            residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            std = STD / math.sqrt(2 * depths[part]) if residual else STD
            assert float(weight.std()) == pytest.approx(std, rel=STD_TOLERANCE), name


def test_tied_embeddings_are_one_tensor_and_separate_ones_differ(topology: Topology) -> None:
    separate, tied = build(experiment_with(), topology), build(experiment_with(model=TIED), topology)
    assert HEAD not in tied and torch.equal(tied[TABLE], separate[TABLE])
    assert not torch.equal(separate[HEAD], separate[TABLE])


class Trained(NamedTuple):
    """Two steps on one rank; tensors as arrays, which can leave the process."""

    first: dict[str, Any]
    losses: list[float]
    grad_norms: list[float]
    table: Any  # tied embeddings after the steps; None on a stage without


def _train_on_ranks(rank: Rank, experiments: list[Experiment]) -> list[Trained]:
    results = []
    for i, experiment in enumerate(experiments):
        topology = Rank(rank.rank, rank.world_size, f"{rank.init_method}-{i}").start(experiment.parallel)
        results.append(_train(experiment, topology))
        stop_topology()
    return results


def _train(experiment: Experiment, topology: Topology) -> Trained:
    model = build_model(plan_build(experiment), topology)
    first = {name: weight.numpy() for name, weight in weights(model).items()}
    steps = [train_step(model, random_batches(experiment, 2, seed=50 * i), 1e-3, NextToken()) for i in range(2)]
    table = weights(model)[TABLE].numpy() if TABLE in first else None
    return Trained(first, [step.loss for step in steps], [step.grad_norm for step in steps], table)


def whole_of(name: str, parts: list[Tensor]) -> Tensor:
    """The full tensor from its tensor-parallel parts; gate and up projections are cut each by itself."""
    if name.startswith("language_model.") and "linear_fc1" in name:
        halves = zip(*(part.chunk(2) for part in parts), strict=True)
        return torch.cat([torch.cat(half) for half in halves])
    rows_are_whole = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
    return torch.cat(parts, dim=1 if rows_are_whole else 0)


@pytest.mark.slow
def test_two_ranks_start_from_and_train_the_same_model_as_one(topology: Topology) -> None:
    layouts: list[dict[str, Any]] = [
        {"parallel": {"tensor": 2}},
        {"parallel": {"pipeline": 2, "virtual_pipeline": 2}},
        {"parallel": {"pipeline": 2}, "model": TIED},
        {"parallel": {"tensor": 2, "sequence": True}, "model": TIED},
    ]
    experiments = [experiment_with(**layout) for layout in layouts]
    for layout, rank0, rank1 in zip(layouts, *run_ranks(_train_on_ranks, 2, experiments), strict=True):
        overrides = {key: value for key, value in layout.items() if key != "parallel"}
        expected = _train(experiment_with(**overrides), topology)
        first, second = ({n: torch.tensor(w) for n, w in rank.first.items()} for rank in (rank0, rank1))
        assert first.keys() | second.keys() == expected.first.keys()
        for name, weight in expected.first.items():
            parts = [rank[name] for rank in (first, second) if name in rank]
            cut = len(parts) == 2 and parts[0].shape != weight.shape
            candidates = [whole_of(name, parts)] if cut else parts
            assert all(torch.equal(found, torch.tensor(weight)) for found in candidates), name
        for rank in (rank0, rank1):
            assert rank.losses == pytest.approx(expected.losses, rel=LAYOUT_LOSS)
            assert rank.grad_norms == pytest.approx(expected.grad_norms, rel=LAYOUT_GRAD_NORM)
        if layout["parallel"] == {"pipeline": 2}:  # the table of the first stage and the head of the last one
            assert (rank0.table == rank1.table).all() and not (rank0.table == expected.first[TABLE]).all()
