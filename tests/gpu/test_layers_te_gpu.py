"""Transformer Engine's layers and Megatron's local ones are the same model: same checkpoint keys, same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from sicog_mcore.model.capability import LayerKind, probe
from sicog_mcore.model.decoder import decoder_transformer_config
from sicog_mcore.model.initialise import initialise
from sicog_mcore.model.vlm import StagePlan, VisionLanguageModel
from sicog_mcore.parallel.topology import Topology, start_topology, stop_topology
from tests.batches import random_batches
from tests.builders import tiny_experiment

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


def parameters_by_key(model: VisionLanguageModel) -> dict[str, torch.nn.Parameter]:
    """The language model's and the tower's parameters under their names in a checkpoint."""
    entries = {
        **model.language_model.sharded_state_dict("language_model."),
        **(model.tower.transformer.sharded_state_dict("tower.transformer.") if model.tower else {}),
    }
    return {x.key: x.data for x in entries.values() if isinstance(x, ShardedTensor | ShardedTensorFactory)}


def test_both_kinds_of_layers_have_the_same_keys_losses_and_gradients(topology: Topology) -> None:
    if probe().layers.name != "te":
        pytest.skip(probe().layers.why)
    fused, local = build("te", topology), build("local", topology)
    ours, theirs = parameters_by_key(fused), parameters_by_key(local)
    assert ours.keys() == theirs.keys()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in theirs.items():  # norms and biases too: fresh ones are all alike
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter))
            ours[key].copy_(parameter)
    batch = random_batches(EXPERIMENT, 1)[0].to(topology.device)
    losses = [model(batch) for model in (fused, local)]
    torch.testing.assert_close(*losses, rtol=TOLERANCE, atol=0)
    for loss in losses:
        loss.mean().backward()
    for key, parameter in theirs.items():
        expected, found = parameter.grad, ours[key].grad
        assert expected is not None and found is not None, key
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()), msg=key)
