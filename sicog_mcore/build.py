"""An Experiment becomes a model: layers and attention are chosen, and this rank's part is built, filled and wrapped.

In: a checked Experiment, Topology   Out: VisionLanguageModel chunks, TrainableModel   Next: train/run.py, rollout/load.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from sicog_mcore.checkpoint.weights import import_init
from sicog_mcore.config import Experiment
from sicog_mcore.model.capability import AttentionChoice, LayerChoice, probe
from sicog_mcore.model.decoder import decoder_transformer_config
from sicog_mcore.model.initialise import initialise
from sicog_mcore.model.vlm import StagePlan, VisionLanguageModel
from sicog_mcore.parallel.ddp import TrainableModel, wrap_model
from sicog_mcore.parallel.topology import Topology


@dataclass(frozen=True)
class Build:
    """Decisions that are made before any process group exists, so that a mistake is still one clear message."""

    experiment: Experiment
    layers: LayerChoice
    attention: AttentionChoice
    decoder: TransformerConfig


def plan_build(experiment: Experiment) -> Build:
    """Chooses layers and attention for this machine and asks Megatron whether it accepts the decoder.

    Raises:
        ConfigError: a requested back end cannot run here, or Megatron refuses the sizes.
    """
    capabilities, train = probe(), experiment.train
    layers = capabilities.layers
    decoder = decoder_transformer_config(
        experiment.model.decoder,
        experiment.parallel,
        train,
        on_gpu=torch.cuda.is_available(),
        with_te=layers.name == "te",
    )
    attention = capabilities.attention(train.attention, experiment.model.decoder.head_dim, train.precision)
    return Build(experiment, layers, attention, decoder)


def build_model(
    build: Build, topology: Topology, notice: Callable[[str], None] = lambda _: None, imports: bool = True
) -> TrainableModel:
    """This rank's part of the model with first weights, gradient buffers and optimizer.

    Args:
        notice: is told where weights came from.
        imports: read the weights that ``init`` names; they do not matter where a checkpoint follows.
    """
    chunks = build_chunks(build, topology)
    initialise(chunks, build.experiment.train.seed)
    for line in import_init(chunks, build.experiment, topology) if imports else []:
        notice(line)
    return wrap_model(chunks, build.decoder, build.experiment, topology)


def build_chunks(build: Build, topology: Topology) -> list[VisionLanguageModel]:
    """This rank's part of the model; its weights are undefined."""
    return [
        VisionLanguageModel(
            build.experiment,
            build.decoder,
            StagePlan(
                pre_process=stage.is_first,
                post_process=stage.is_last,
                vp_stage=stage.vp_stage,
                groups=topology.groups,
                tower_groups=topology.tower_groups,
                layers=build.layers.name,
                attention=build.attention.name,
            ),
        )
        for stage in topology.stages
    ]
