"""Transformer Engine's layers and Megatron's local ones are the same model: same checkpoint keys, same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from sicog_mcore.build import build_model, plan_build
from sicog_mcore.checkpoint.store import CheckpointStore, RunState
from sicog_mcore.model.capability import LayerChoice, LayerKind, probe
from sicog_mcore.model.decoder import decoder_transformer_config
from sicog_mcore.model.initialise import initialise
from sicog_mcore.model.vlm import StagePlan, VisionLanguageModel
from sicog_mcore.parallel.topology import Topology, start_topology, stop_topology
from sicog_mcore.train.step import NextToken, train_step
from tests.batches import random_batches
from tests.builders import ASSETS, tiny_experiment

pytestmark = pytest.mark.gpu
TOLERANCE = 1e-2  # relative to the largest entry: Transformer Engine multiplies fp32 matrices in TF32
EXPERIMENT = tiny_experiment(Path("unused"), train={"attention": "sdpa"}, data={"token_budget": 512})


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    yield start_topology(EXPERIMENT.parallel, seed=0)
    stop_topology()


def build(layers: LayerKind, topology: Topology) -> VisionLanguageModel:
    """The whole model on one rank, not wrapped, so that parameters keep their own gradients."""
    stage = topology.stages[0]
    config = decoder_transformer_config(
        EXPERIMENT.model.decoder,
        EXPERIMENT.parallel,
        EXPERIMENT.train,
        on_gpu=torch.cuda.is_available(),
        with_te=layers == "te",
    )
    plan = StagePlan(
        pre_process=stage.is_first,
        post_process=stage.is_last,
        vp_stage=stage.vp_stage,
        groups=topology.groups,
        tower_groups=topology.tower_groups,
        layers=layers,
        attention="sdpa",
    )
    model = VisionLanguageModel(EXPERIMENT, config, plan)
    initialise([model], EXPERIMENT.train.seed)
    return model


def parameters_by_key(model: VisionLanguageModel, topology: Topology) -> dict[str, list[torch.nn.Parameter]]:
    """The parameters under their names in a checkpoint, which stack the decoder's layers under one name."""
    found: dict[str, list[torch.nn.Parameter]] = {}
    for entry in model.sharded_state_dict(metadata={"dp_cp_group": topology.groups.dp_cp}).values():
        assert isinstance(entry, ShardedTensor | ShardedTensorFactory)
        found.setdefault(entry.key, []).append(entry.data)
    return found


def test_both_kinds_of_layers_have_the_same_keys_losses_and_gradients(topology: Topology) -> None:
    if probe().layers.name != "te":
        pytest.skip(probe().layers.why)
    fused, local = build("te", topology), build("local", topology)
    ours, theirs = parameters_by_key(fused, topology), parameters_by_key(local, topology)
    committed = (ASSETS / "checkpoint_keys" / "qwen2.txt").read_text().splitlines()
    assert sorted(ours) == sorted(theirs) == committed
    pairs = [(key, *pair) for key in theirs for pair in zip(ours[key], theirs[key], strict=True)]
    assert len(pairs) == len(list(local.parameters()))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, target, parameter in pairs:  # norms and biases too: fresh ones are all alike
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter))
            target.copy_(parameter)
    batch = random_batches(EXPERIMENT, 1)[0].to(topology.device)
    losses = [model(batch) for model in (fused, local)]
    torch.testing.assert_close(*losses, rtol=TOLERANCE, atol=0)
    for loss in losses:
        loss.mean().backward()
    for key, target, parameter in pairs:
        expected, found = parameter.grad, target.grad
        assert expected is not None and found is not None, key
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()), msg=key)


@pytest.mark.parametrize(("writer", "reader"), [("te", "te"), ("te", "local"), ("local", "te")])
def test_a_run_goes_on_with_either_kind_of_layers(
    writer: LayerKind, reader: LayerKind, topology: Topology, tmp_path: Path
) -> None:
    if probe().layers.name != "te":
        pytest.skip(probe().layers.why)
    experiment = replace(EXPERIMENT, output=str(tmp_path))
    models = {}
    for name, kind in (("saved", writer), ("resumed", reader)):
        plan = replace(plan_build(experiment), layers=LayerChoice(kind, "the test's choice"))
        models[name] = build_model(plan, topology)
    train_step(models["saved"], random_batches(experiment, 1), 1e-3, NextToken())
    store = CheckpointStore(experiment, topology)
    store.save(models["saved"], RunState(1))
    store.load(models["resumed"], 1)
    steps = [train_step(m, random_batches(experiment, 1, seed=50), 1e-3, NextToken()) for m in models.values()]
    assert steps[1].loss == pytest.approx(steps[0].loss, rel=TOLERANCE)
