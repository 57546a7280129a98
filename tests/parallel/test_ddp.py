"""Frozen parts stay as they are and pass gradients on; clipping, bf16 and odd batches under every layout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from sicog_mcore.build import build_model, plan_build
from sicog_mcore.config import Experiment, ModelPart
from sicog_mcore.parallel.ddp import TrainableModel
from sicog_mcore.parallel.topology import Topology, start_topology, stop_topology
from sicog_mcore.train.step import NextToken, StepResult, train_step
from tests.batches import random_batches
from tests.builders import tiny_experiment
from tests.dist import Rank, run_ranks
from tests.tolerances import LAYOUT_GRAD_NORM, LAYOUT_LOSS

PARTS: tuple[ModelPart, ...] = get_args(ModelPart)
LR = 1e-2
BF16_LOSS = 0.01  # against fp32

MICRO_BATCHES = 6  # of five kinds: the third has no image, the fifth no sample
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2+SP": {"parallel": {"tensor": 2, "sequence": True}},
    "PP2 interleaved": {"parallel": {"pipeline": 2, "virtual_pipeline": 2}},
    "PP2, nothing to train on the last stage": {"parallel": {"pipeline": 2}, "optim": {"freeze": ("decoder",)}},
    "TP2, tower frozen": {"parallel": {"tensor": 2}, "optim": {"freeze": ("tower",)}},
    "DP2, tower frozen": {"parallel": {"overlap_grad_reduce": True}, "optim": {"freeze": ("tower",)}},
}


@pytest.fixture(scope="module", autouse=True)
def topology() -> Iterator[Topology]:
    yield start_topology(tiny_experiment(Path("unused")).parallel, seed=0)
    stop_topology()


def experiment_with(**optim: Any) -> Experiment:
    return tiny_experiment(Path("unused"), data={"token_budget": 512}, optim=optim)


def step(experiment: Experiment, topology: Topology) -> tuple[TrainableModel, dict[str, Tensor], StepResult]:
    """One step of a new model; returns the weights from before it too."""
    model = build_model(plan_build(experiment), topology)
    before = {name: parameter.detach().clone() for name, parameter in named(model).items()}
    return model, before, train_step(model, random_batches(experiment, 2), LR, NextToken())


def named(model: TrainableModel) -> dict[str, torch.nn.Parameter]:
    return dict(model.chunks[0].named_parameters())  # type: ignore[attr-defined]


def part_of(name: str) -> ModelPart:
    return next(part for part in PARTS if name.startswith("language_model" if part == "decoder" else part))


@pytest.mark.parametrize("frozen", [("tower",), ("decoder",), ("tower", "resampler"), ("resampler", "decoder")])
def test_frozen_parts_have_no_buffers_and_do_not_move(frozen: tuple[ModelPart, ...], topology: Topology) -> None:
    model, before, result = step(experiment_with(freeze=frozen), topology)
    (optimizer,) = model.optimizer.chained_optimizers
    for name, parameter in named(model).items():
        is_frozen = part_of(name) in frozen
        assert parameter.requires_grad == ("main_grad" in vars(parameter)) == (not is_frozen), name
        assert (parameter in optimizer.model_param_group_index_map) == (not is_frozen), name
        if is_frozen:
            assert torch.equal(parameter, before[name]), name
    moved = {part_of(name) for name, parameter in named(model).items() if not torch.equal(parameter, before[name])}
    trained = sum(parameter.numel() for parameter in named(model).values() if parameter.requires_grad)
    assert moved == set(PARTS) - set(frozen) and result.applied and result.grad_norm > 0
    assert sum(state["exp_avg"].numel() for state in optimizer.optimizer.state.values()) == trained


def test_frozen_parts_pass_gradients_on(topology: Topology) -> None:
    """The tower learns the same behind a frozen decoder as behind one that learns too."""
    free, _, _ = step(experiment_with(clip_grad_norm=0.0), topology)
    frozen, _, _ = step(experiment_with(clip_grad_norm=0.0, freeze=("resampler", "decoder")), topology)
    for name, parameter in named(frozen).items():
        if part_of(name) == "tower":
            assert torch.equal(parameter, named(free)[name]), name


def test_clipping_limits_the_norm_over_all_parts(topology: Topology) -> None:
    free, _, result = step(experiment_with(clip_grad_norm=0.0), topology)
    limit = result.grad_norm / 4
    clipped, _, same = step(experiment_with(clip_grad_norm=limit), topology)
    assert same.grad_norm == result.grad_norm  # reported before clipping
    first, second = ({n: moment_of(p, m) for n, p in named(m).items()} for m in (free, clipped))
    for name, moment in first.items():
        torch.testing.assert_close(second[name], moment / 4, rtol=1e-4, atol=1e-12, msg=name)


def moment_of(parameter: torch.nn.Parameter, model: TrainableModel) -> Tensor:
    """Adam's first moment after one step: (1 - beta1) times the clipped gradient."""
    (optimizer,) = model.optimizer.chained_optimizers
    group, index = optimizer.model_param_group_index_map[parameter]
    return optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][index]]["exp_avg"]


@pytest.mark.slow
def test_bf16_follows_fp32(topology: Topology) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        experiment = tiny_experiment(Path("unused"), data={"token_budget": 512}, train={"precision": precision})
        model = build_model(plan_build(experiment), topology)
        losses[precision] = [
            train_step(model, random_batches(experiment, 2, 20 * i), 1e-3, NextToken()).loss for i in range(3)
        ]
        assert {parameter.dtype for parameter in named(model).values()} == {
            torch.bfloat16 if precision == "bf16" else torch.float32
        }
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=BF16_LOSS) and losses["bf16"][2] < losses["bf16"][0]


def three_steps(experiment: Experiment, topology: Topology) -> list[StepResult]:
    """Two steps with batches of every kind, and one in which nothing is supervised."""
    model = build_model(plan_build(experiment), topology)
    share, size = topology.data_rank, topology.data_size
    steps = [random_batches(experiment, MICRO_BATCHES, seed=100 * i) for i in range(2)]
    padding = random_batches(experiment, 5)[4]
    steps.append([padding] * MICRO_BATCHES)
    return [train_step(model, batches[share::size], 1e-3, NextToken()) for batches in steps]


def _three_steps_of_each(rank: Rank, experiments: list[Experiment]) -> list[list[StepResult]]:
    results = []
    for i, experiment in enumerate(experiments):
        topology = Rank(rank.rank, rank.world_size, f"{rank.init_method}-{i}").start(experiment.parallel)
        results.append(three_steps(experiment, topology))
        stop_topology()
    return results


@pytest.mark.slow
def test_odd_batches_and_frozen_parts_train_alike_under_every_layout(topology: Topology) -> None:
    experiments = [
        tiny_experiment(Path("unused"), data={"token_budget": 512}, **overrides) for overrides in LAYOUTS.values()
    ]
    ranks = run_ranks(_three_steps_of_each, 2, experiments)
    for i, (name, overrides) in enumerate(LAYOUTS.items()):
        expected = three_steps(experiment_with(**overrides.get("optim", {})), topology)
        for steps in (results[i] for results in ranks):
            assert [s.count for s in steps] == [s.count for s in expected], name
            for found, one_rank in zip(steps[:2], expected[:2], strict=True):
                assert found.loss == pytest.approx(one_rank.loss, rel=LAYOUT_LOSS), name
                assert found.grad_norm == pytest.approx(one_rank.grad_norm, rel=LAYOUT_GRAD_NORM), name
            assert steps[2].count == 0 and math.isnan(steps[2].loss) and steps[2].grad_norm == 0, name
