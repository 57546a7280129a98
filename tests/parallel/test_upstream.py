"""Faults of Megatron: here with the mending, and still there without it. Where the second fails, the mending can go."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from sicog_mcore.build import build_model, plan_build
from sicog_mcore.parallel.padding import FAULT
from sicog_mcore.parallel.topology import start_topology, stop_topology
from sicog_mcore.parallel.upstream import install_fixes
from sicog_mcore.train.step import NextToken, train_step
from tests.batches import random_batches
from tests.builders import tiny_experiment

own_adam = pytest.mark.skipif(distrib_optimizer.HAVE_APEX_OR_TE, reason="torch's AdamW is not used")


@pytest.fixture(scope="module")
def member() -> Iterator[Any]:
    """The distributed optimizer of a model after one step."""
    experiment = tiny_experiment(Path("unused"), data={"token_budget": 512})
    topology = start_topology(experiment.parallel, seed=0)
    model = build_model(plan_build(experiment), topology)
    train_step(model, random_batches(experiment, 1), 1e-3, NextToken())
    yield model.optimizer.chained_optimizers[0]
    stop_topology()


def step_tensors(member: Any) -> tuple[int, int]:
    """Number of parameters, and of tensors that hold their Adam steps."""
    steps = [state["step"] for state in member.optimizer.state.values()]
    return len(steps), len({step.data_ptr() for step in steps})


@own_adam
def test_every_parameter_has_its_own_step_after_a_load(member: Any) -> None:
    member.load_state_dict(member.state_dict())
    parameters, tensors = step_tensors(member)
    assert tensors == parameters > 1


@own_adam
def test_a_state_without_step_is_taken(member: Any) -> None:
    parameter = next(iter(member.model_param_group_index_map))
    state = member._get_main_param_and_optimizer_states(parameter)
    assert float(state.pop("step")) == 1.0
    with torch.no_grad():
        member._set_main_param_and_optimizer_states(parameter, state)
    assert float(member._get_main_param_and_optimizer_states(parameter)["step"]) == 1.0


@own_adam
def test_megatron_alone_still_shares_one_step(member: Any) -> None:
    """Fails where ``_repair_adam_step`` has nothing to mend any more."""
    load = vars(DistributedOptimizer)["load_state_dict"].__wrapped__
    load(member, member.state_dict())
    assert step_tensors(member)[1] == 1
    parameter = next(iter(member.model_param_group_index_map))
    state = member._get_main_param_and_optimizer_states(parameter)
    del state["step"]
    with torch.no_grad(), pytest.raises(KeyError, match="step"):
        vars(DistributedOptimizer)["_set_main_param_and_optimizer_states"].__wrapped__(member, parameter, state)


def test_mending_twice_is_mending_once() -> None:
    install_fixes()
    mended = DistributedOptimizer.load_state_dict
    install_fixes()
    assert DistributedOptimizer.load_state_dict is mended


def test_megatron_alone_still_shifts_padded_buckets() -> None:
    """Fails where padding.py has nothing to mend any more; tests/parallel/test_settle.py shows what it mends."""
    assert FAULT in inspect.getsource(DistributedOptimizer.sharded_param_state_fully_reshardable)
