"""Every part learns at its own rate; biases and norms are not decayed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sicog_mcore.config import ModelPart
from sicog_mcore.parallel.ddp import TrainableModel
from sicog_mcore.parallel.param_groups import group_overrides
from sicog_mcore.parallel.topology import Topology, start_topology, stop_topology
from tests.builders import tiny_experiment
from tests.parallel.test_ddp import LR, experiment_with, named, part_of, step

SCALES: dict[ModelPart, float] = {"tower": 0.1, "resampler": 3.0, "decoder": 1.0}


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    yield start_topology(tiny_experiment(Path("unused")).parallel, seed=0)
    stop_topology()


def test_there_is_a_rule_for_every_part_and_one_for_vectors() -> None:
    optim = experiment_with(tower_lr_scale=0.1, resampler_lr_scale=3.0).optim
    rules = list(group_overrides(optim).values())
    assert rules == [{"lr_mult": 0.1}, {"lr_mult": 3.0}, {"lr_mult": 1.0}, {"wd_mult": 0.0}]


def group_of(parameter: torch.nn.Parameter, model: TrainableModel) -> dict[str, Any]:
    (optimizer,) = model.optimizer.chained_optimizers
    return optimizer.optimizer.param_groups[optimizer.model_param_group_index_map[parameter][0]]


def test_every_parameter_learns_at_the_rate_of_its_part(topology: Topology) -> None:
    scales = {f"{part}_lr_scale": scale for part, scale in SCALES.items()}
    scaled, before, _ = step(experiment_with(clip_grad_norm=0.0, eps=1e-20, **scales), topology)
    plain, same, _ = step(experiment_with(clip_grad_norm=0.0, eps=1e-20), topology)
    for name, parameter in named(scaled).items():
        scale = SCALES[part_of(name)]
        assert group_of(parameter, scaled)["lr"] == pytest.approx(LR * scale), name
        assert torch.equal(before[name], same[name])
        change, plain_change = parameter.detach() - before[name], named(plain)[name].detach() - before[name]
        torch.testing.assert_close(change, scale * plain_change, rtol=1e-3, atol=1e-6, msg=name)
        # Adam's first step moves every weight that has a gradient by the learning rate, whatever the gradient.
        assert float(change.abs().max()) == pytest.approx(LR * scale, rel=1e-3), name


def test_matrices_are_decayed_and_biases_and_norms_are_not(topology: Topology) -> None:
    decay = 0.5
    decayed, before, _ = step(experiment_with(weight_decay=decay), topology)
    plain, _, _ = step(experiment_with(weight_decay=0.0), topology)
    for name, parameter in named(decayed).items():
        expected = named(plain)[name].detach() - (LR * decay * before[name] if parameter.dim() > 1 else 0)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-7, msg=name)
    assert {name.rsplit(".", 1)[-1] for name, p in named(decayed).items() if p.dim() <= 1} >= {"bias", "weight"}


def test_a_scale_of_zero_holds_a_part_still(topology: Topology) -> None:
    model, before, _ = step(experiment_with(tower_lr_scale=0.0, weight_decay=0.1), topology)
    still = {part_of(name) for name, parameter in named(model).items() if torch.equal(parameter, before[name])}
    assert still == {"tower"}
