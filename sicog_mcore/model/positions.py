"""Resizes learned position tables bicubically to the grids of all slices of a micro-batch, in one operation.

In: a square table [G * G, c] and the grids of all slices   Out: one position row per patch [p, c]
Next: vision_tower.py, resampler.py
Bicubic resizing is linear: a patch's row is a weighted sum of at most 16 table rows. Indices and weights depend on the
grid only, are computed once per grid, and kept on the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]  # (height, width) of a slice in patches
TAPS = 4  # table rows per axis that a bicubic sample depends on
CACHED_GRIDS = 256


def _axis_taps(side: int, length: int) -> tuple[Tensor, Tensor]:
    """Returns the entries (of ``side``) that each of ``length`` samples reads, and their weights: [length, taps] each."""
    # Resizing the identity yields exactly the weights F.interpolate applies.
    identity = torch.eye(side, device="cpu")[None, :, :, None]
    weights = F.interpolate(identity, size=(length, 1), mode="bicubic", align_corners=False)[0, :, :, 0].T
    # A bicubic sample has four neighbours with weights; all other entries of its row are exactly zero.
    index = weights.abs().topk(min(TAPS, side)).indices  # [length, taps]
    return index, weights.gather(1, index)


@functools.lru_cache(maxsize=CACHED_GRIDS)
def grid_taps(side: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns table rows and weights of every patch of a grid: int64 and fp32, each [height * width, at most 16]."""
    rows, row_weights = _axis_taps(side, height)
    columns, column_weights = _axis_taps(side, width)
    # Bicubic resizing is separable: 4 x 4 table rows, each weighted by the product of its weights along both axes.
    index = rows[:, None, :, None] * side + columns[None, :, None, :]
    weights = row_weights[:, None, :, None] * column_weights[None, :, None, :]
    patches = height * width
    return index.reshape(patches, -1).to(device), weights.reshape(patches, -1).to(device)


def interpolate_positions(table: Tensor, grids: Sequence[Grid]) -> Tensor:
    """Returns position rows of all patches of all slices, as F.interpolate gives them (bicubic, half-pixel centres).

    Args:
        table: [G * G, c], raster order; gradients flow to it.
        grids: (height, width) of each slice in patches, at least one.

    Returns:
        [p, c] in the dtype of ``table``; weighted in fp32.
    """
    side = math.isqrt(table.shape[0])
    taps = [grid_taps(side, height, width, table.device) for height, width in grids]
    index, weights = (torch.cat(parts) for parts in zip(*taps, strict=True))
    # One gather and sum for all slices; F.interpolate would need one call for each grid. Sums of 16 terms stay in fp32.
    rows = F.embedding_bag(index, table.float(), per_sample_weights=weights, mode="sum")
    return rows.to(table.dtype)
