"""Gradients of the replicated parts, summed over the tensor-parallel ranks.

In: model chunks whose gradients lie in Megatron's buffers   Out: the same, summed in place   Next: ddp.py
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sicog_mcore.config import ModelPart
from sicog_mcore.parallel.param_groups import PARTS, ModelChunk

REPLICATED_PARTS: tuple[ModelPart, ...] = (
    "tower",
    "resampler",
)  # same weights on all tensor-parallel ranks, own slices each


def sum_replicated_grads(chunks: Sequence[ModelChunk], group: Any) -> None:
    """Adds the gradients of tower and resampler over tensor-parallel ranks: each encoded its own slices.

    In place, in Megatron's buffers: a copy would cost as much memory again as these gradients.

    Args:
        group: process group of the tensor-parallel ranks.
    """
    if group.size() == 1:
        return
    for chunk in chunks:
        for stretch in replicated_stretches(chunk):
            dist.all_reduce(stretch, group=group)


def replicated_stretches(chunk: ModelChunk) -> list[Tensor]:
    """The gradients of tower and resampler as views, as long as possible, of the buffers they lie in.

    Between neighbours in a buffer there is nothing but padding, which is zero on all ranks.
    """
    members: dict[tuple[int, torch.dtype], list[tuple[int, Tensor, bool]]] = {}
    for part in PARTS:
        for parameter in chunk.parameters_of(part):
            if parameter.requires_grad:
                grad = vars(parameter)["main_grad"]  # Megatron's: a view of a buffer
                buffer = (grad.untyped_storage().data_ptr(), grad.dtype)
                entry = (grad.storage_offset(), grad, part in REPLICATED_PARTS)
                members.setdefault(buffer, []).append(entry)
    stretches = []
    for entries in members.values():
        ordered = sorted(entries, key=lambda entry: entry[0])
        for is_replicated, run in groupby(ordered, key=lambda entry: entry[2]):
            if is_replicated:
                grads = [grad for _, grad, _ in run]
                first, last = grads[0], grads[-1]
                length = last.storage_offset() + last.numel() - first.storage_offset()
                stretches.append(first.as_strided((length,), (1,)))
    return stretches
