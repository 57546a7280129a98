"""Describes the parameters of the whole model by name, and the ranks that hold them: the targets of foreign weights.

In: this rank's chunks   Out: Target per parameter, the same on all ranks   Next: weights.py, export.py
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sicog_mcore.checkpoint.mapping import Target
from sicog_mcore.config import ModelPart
from sicog_mcore.model.initialise import global_names
from sicog_mcore.model.layers import plain_name
from sicog_mcore.model.vlm import VisionLanguageModel
from sicog_mcore.parallel.topology import Topology

MODULES: tuple[tuple[ModelPart, str], ...] = (
    ("tower", "tower."),
    ("resampler", "resampler."),
    ("decoder", "language_model."),
)
PARTS: tuple[ModelPart, ...] = tuple(part for part, _ in MODULES)


def part_of(name: str) -> ModelPart:
    """Returns the part that a parameter or an entry of our checkpoints belongs to."""
    return next(part for part, module in MODULES if name.startswith(module))


def local_parameters(chunks: Sequence[VisionLanguageModel]) -> list[tuple[str, torch.nn.Parameter]]:
    """Lists this rank's parameters by their names in the whole model, the same for both kinds of layers."""
    named = []
    for chunk in chunks:
        names = global_names(chunk)
        named += [(plain_name(names[local]), parameter) for local, parameter in chunk.named_parameters()]
    return named


def describe(chunks: Sequence[VisionLanguageModel], topology: Topology) -> tuple[Target, ...]:
    """Lists every parameter of the whole model, from the first to the last stage. Collective; the same on all ranks."""
    # One data-parallel replica speaks for all, which hold the same shards.
    mine: list[tuple[str, Target, bool]] = []
    if topology.data_rank == 0:
        for name, parameter in local_parameters(chunks):
            is_cut = bool(vars(parameter).get("tensor_model_parallel"))  # Megatron marks what it shards
            axis = vars(parameter)["partition_dim"] if is_cut else 0
            target = Target(name, tuple(parameter.shape), axis, (topology.rank,), parameter.dtype)
            mine.append((name, target, is_cut))
    holders: dict[str, list[tuple[Target, bool]]] = {}
    for described in topology.gather_objects(mine):
        for name, target, is_cut in described:
            holders.setdefault(name, []).append((target, is_cut))
    return tuple(_whole([shard for shard, _ in found], topology, found[0][1]) for found in holders.values())


def _whole(shards: list[Target], topology: Topology, is_cut: bool) -> Target:
    """Joins the shards of one parameter, in the order of their ranks."""
    # Tensor-parallel ranks are neighbours, so the first ones hold the shards in order. A table that is tied over stages is
    # found a second time behind them, on the ranks of the last stage; that copy is left out.
    first = shards[0]
    owners = tuple(shard.owners[0] for shard in shards[: topology.config.tensor if is_cut else 1])
    shape = tuple(n * len(owners) if d == first.axis else n for d, n in enumerate(first.shape))
    return Target(first.name, shape, first.axis, owners, first.dtype)
