"""Writes visual tokens into the embedding stream, and shares slices out to the tensor-parallel ranks.

In: PackedBatch, resampler output   Out: embeddings with images in place   Next: decoder.py
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SliceShare:
    """The slices that one tensor-parallel rank encodes.

    Every rank has the same number of slices, at least one: where images run out, a blank slice of one patch stands in. So
    image-free batches take the same path and the same collectives as all others, and no rank ever waits for another.
    """

    patches: Tensor  # uint8 [p', patch_dim]
    grids: Tensor  # int64 [k', 2]


def share_slices(patches: Tensor, grids: Tensor, rank: int, size: int) -> SliceShare:
    """Cuts the packed slices into ``size`` contiguous shares of equal count and returns share ``rank``.

    Args:
        patches: uint8 [p, patch_dim] of all slices.
        grids: int64 [k, 2] patches per slice (height, width).
    """
    # Every rank must run the tower on as many slices as the others: the gather behind it needs equal shapes. Equal counts
    # are also fair, since all slices have about the same area.
    count = max(1, -(-grids.shape[0] // size))
    first, last = rank * count, min((rank + 1) * count, grids.shape[0])
    ends = torch.cat([grids.new_zeros(1), grids.prod(-1).cumsum(0)]).tolist()  # [k + 1] patch rows before each slice
    mine = grids[first:last]
    blanks = count - mine.shape[0]
    # With fewer slices than ranks, ``first`` may lie behind the last slice: such a rank encodes blanks alone.
    rows = patches[ends[min(first, len(ends) - 1)] : ends[last]] if blanks < count else patches[:0]
    return SliceShare(
        patches=torch.cat([rows, rows.new_zeros(blanks, patches.shape[1])]),
        grids=torch.cat([mine, mine.new_ones(blanks, 2)]),
    )


def splice(embeddings: Tensor, visual: Tensor, slots: Tensor, rows: Tensor, first_position: int) -> Tensor:
    """Writes visual tokens over their placeholders.

    Args:
        embeddings: [t', 1, h]; under sequence parallelism the part of the stream that starts at ``first_position``.
        visual: [r, h] output rows of the resampler, gathered over tensor-parallel ranks.
        slots: int64 [m] positions in the whole stream.
        rows: int64 [m] row of ``visual`` for each slot.

    Returns:
        [t', 1, h]; connected to ``visual`` in the autograd graph even if no slot is here.
    """
    # Out of place, so the embedding table and the tower both get their gradients. An empty index still ties ``visual`` into
    # the graph: the backward pass of the tower then runs its collectives on every rank, also where no image shows.
    here = (slots >= first_position) & (slots < first_position + embeddings.shape[0])
    target = slots[here] - first_position
    return embeddings.index_put((target, torch.zeros_like(target)), visual[rows[here]].to(embeddings.dtype))
