"""Draws first weights that are equal for every parallel layout.

Each full tensor is drawn from a seed made of the run's seed and the tensor's name in the whole model, then cut to
this rank's shard. So one rank and a thousand start from the same model, and layouts can be compared step by step.
Rules: normal(0, 0.02), residual projections divided by sqrt(2 * layers) (Megatron's default); norms one; biases zero.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import torch
import xxhash
from torch import Tensor

from sicog_mcore.model.vlm import VisionLanguageModel

STD = 0.02
RESIDUAL_PROJECTIONS = ("linear_proj.weight", "linear_fc2.weight")


def global_names(chunk: VisionLanguageModel) -> dict[str, str]:
    """Maps local parameter names to those in the whole model: layers counted over all stages, tied tables under one name."""
    first_layer = {
        f"{name}.": f"{name.rsplit('.', 1)[0]}.{module.layer_number - 1}."
        for name, module in chunk.named_modules()
        if re.search(r"\.layers\.\d+$", name)
    }
    names = {}
    for local, _ in chunk.named_parameters():
        whole = local
        for prefix, renumbered in first_layer.items():
            if local.startswith(prefix):
                whole = renumbered + local[len(prefix) :]
        if chunk.share_embeddings_and_output_weights and local == "language_model.output_layer.weight":
            whole = "language_model.embedding.word_embeddings.weight"
        names[local] = whole
    return names


def initialise(chunks: Iterable[VisionLanguageModel], seed: int) -> None:
    """Fills every parameter of this rank's chunks in place."""
    for chunk in chunks:
        names = global_names(chunk)
        rank, size = chunk.groups.tp.rank(), chunk.groups.tp.size()
        for local, parameter in chunk.named_parameters():
            if local.startswith("resampler."):
                continue  # has its own rules, below
            split = size if vars(parameter).get("tensor_model_parallel") else 1  # Megatron marks what it shards
            axis = parameter.partition_dim if split > 1 else 0
            # Of the stack that the parameter stands in: residual sums grow with the depth of their own stack only.
            layers = chunk.model_config.tower.layers_used if local.startswith("tower.") else chunk.config.num_layers
            full = _draw(names[local], parameter, split, axis, layers, seed)
            with torch.no_grad():
                parameter.copy_(_shard(full, local, rank, split, axis))
        if chunk.resampler is not None:
            chunk.resampler.reset_parameters(_generator("resampler", seed, torch.device("cpu")))


def _generator(name: str, seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(xxhash.xxh3_64_intdigest(f"{seed}:{name}".encode()) >> 1)


def _draw(name: str, parameter: Tensor, split: int, axis: int, layers: int, seed: int) -> Tensor:
    shape = list(parameter.shape)
    shape[axis] *= split
    if name.endswith("bias"):
        return parameter.new_zeros(shape)
    if "norm" in name:
        return parameter.new_ones(shape)
    std = STD / math.sqrt(2 * layers) if name.endswith(RESIDUAL_PROJECTIONS) else STD
    # Every rank draws the full tensor and keeps its shard: numbers drawn for shards would depend on the layout. The
    # largest table of 72B takes 5 GB for a moment.
    generator = _generator(name, seed, parameter.device)
    return torch.randn(shape, generator=generator, device=parameter.device, dtype=torch.float32) * std


def _shard(full: Tensor, name: str, rank: int, split: int, axis: int) -> Tensor:
    """Returns this rank's shard of a full tensor."""
    if split == 1:
        return full
    # Gate and up projection are stacked [2 * ffn, h]. SwiGLU multiplies them row by row on each rank, so a shard is a part
    # of the gate above the same part of the up projection, not a run of rows.
    if name.startswith("language_model.") and "linear_fc1" in name:
        return torch.cat([half.chunk(split, 0)[rank] for half in full.chunk(2, 0)])
    return full.chunk(split, axis)[rank]
