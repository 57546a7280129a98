"""The parts of a model chunk: which are frozen, and the optimizer's parameter group of each.

In: model chunks, OptimConfig   Out: frozen parameters, rules for Megatron's parameter groups   Next: ddp.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, get_args

import torch
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

from sicog_mcore.config import ModelPart, OptimConfig

PARTS: tuple[ModelPart, ...] = get_args(ModelPart)


class ModelChunk(Protocol):
    """A model chunk: the methods that this package calls on one pipeline chunk (model/vlm.py has them)."""

    def parameters_of(self, part: ModelPart) -> list[torch.nn.Parameter]:
        """Parameters of one part on this chunk."""

    def sharded_state_dict(self, *, metadata: dict[str, Any]) -> dict[str, Any]:
        """Megatron's description of the chunk for a distributed checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """As in torch."""

    def load_state_dict(self, state: dict[str, Any], strict: bool) -> Any:
        """As in torch."""


def freeze_parts(chunks: Sequence[ModelChunk], parts: Sequence[ModelPart]) -> None:
    """Frozen parameters get neither gradient buffers nor optimizer state; call before wrapping."""
    for chunk in chunks:
        for part in parts:
            for parameter in chunk.parameters_of(part):
                parameter.requires_grad = False


def mark_parts(chunks: Sequence[ModelChunk]) -> None:
    """Writes on every parameter which part it belongs to; the rules of ``group_overrides`` read it."""
    for chunk in chunks:
        for part in PARTS:
            for parameter in chunk.parameters_of(part):
                parameter.sicog_part = part  # type: ignore[attr-defined]


def group_overrides(optim: OptimConfig) -> dict[ParamKey, dict[str, float]]:
    """One parameter group per part and weight-decay rule: biases and norms are not decayed."""
    scales: dict[ModelPart, float] = {
        "tower": optim.tower_lr_scale,
        "resampler": optim.resampler_lr_scale,
        "decoder": optim.decoder_lr_scale,
    }
    overrides = {
        # Megatron tells groups apart by their multipliers when it loads a checkpoint: another key would mix parts up.
        ParamKey(predicate=ParamPredicate(name=f"part {part}", fn=_belongs_to(part))): {"lr_mult": scale}
        for part, scale in scales.items()
    }
    vectors = ParamKey(predicate=ParamPredicate(name="biases and norms", fn=lambda p: p.dim() <= 1))
    overrides[vectors] = {"wd_mult": 0.0}
    return overrides


def _belongs_to(part: ModelPart) -> Any:
    return lambda parameter: parameter.sicog_part == part
