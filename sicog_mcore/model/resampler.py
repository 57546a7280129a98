"""Window resampler: a fixed number of visual tokens per slice, whatever the slice's grid.

In: features of all patches [p, c]   Out: visual tokens [k, q, h]   Next: splice.py
A slice is cut into q windows, one per query. Query i attends to a few samples (bins) of window i, which RoIAlign takes
from the feature map. RoIAlign is linear, so instead of projecting every sample, the patches are projected once and the
attention scores and weights are carried over from patches to samples and back; the result is the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sicog_mcore.config import ResamplerConfig
from sicog_mcore.model.positions import CACHED_GRIDS, Grid, interpolate_positions

# Samples per window, (height, width): the shape closest to the slice's own is taken, the first of equals.
BIN_GRIDS = ((2, 4), (2, 3), (3, 4), (3, 3), (4, 2), (3, 2), (4, 3))
MAX_BINS = 12
INIT_STD = 0.02


class Windows(NamedTuple):
    """The windows of one slice, or stacked of many: which patches a window covers, and their shares in its samples.

    Attributes:
        rows: int64 [q, r] patches that the samples of a window depend on (its region); padded with row 0.
        weights: fp32 [q, bins, r] share of each region patch in each sample; zero on padding.
        is_bin: bool [bins]; a slice has 6 to 12 samples per window.
    """

    rows: Tensor
    weights: Tensor
    is_bin: Tensor


def _bin_grid(height: int, width: int) -> tuple[int, int]:
    # Aspects are compared as logarithms, in which twice as wide and twice as high are equally far from a square.
    return min(BIN_GRIDS, key=lambda bins: abs(math.log(width / height) - math.log(bins[1] / bins[0])))


def _axis_weights(side: int, num_windows: int, bins: int) -> Tensor:
    """RoIAlign along one axis (not aligned, adaptive sampling): fp32 [windows, bins, side].

    A window is at least one patch wide, so on a side shorter than the number of windows the last ones reach beyond the
    map. A sample out there counts as zero: the weights of a bin then sum to less than one.
    """
    borders = (torch.arange(num_windows + 1, dtype=torch.float64, device="cpu") * side / num_windows).float()
    bin_length = borders.diff().clamp(min=1)[:, None, None] / bins
    # Adaptive sampling of RoIAlign: as many samples in a bin as it covers patches, at least one.
    per_bin = math.ceil(max(side / num_windows, 1) / bins)
    bin_index, sample = torch.arange(bins, device="cpu")[:, None], torch.arange(per_bin, device="cpu") + 0.5
    # In fp32 and in RoIAlign's order of operations: rounding decides whether a sample on the far edge lies inside.
    at = borders[:-1, None, None] + bin_index * bin_length + sample * bin_length / per_bin  # [windows, bins, per_bin]
    # Linear interpolation between two neighbouring patches; beyond the last patch, that one alone counts.
    distance = at.clamp(max=side - 1)[..., None] - torch.arange(side, device="cpu")
    linear = (1 - distance.abs()).clamp(min=0) * (at <= side)[..., None]  # [windows, bins, per_bin, side]
    return linear.mean(2)


def _axis_regions(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Cuts weights [windows, bins, side] down to the e patches that a window needs.

    Returns:
        patches int64 [windows, e], and their weights [windows, bins, e].
    """
    # A window touches a few neighbouring patches of the axis. Attention over these e patches instead of all ``side`` is what
    # makes the resampler cheap; e is the same for all windows, so that they stack, and shorter windows are padded.
    side = weights.shape[-1]
    used = (weights.sum(1) > 0).int()
    # argmax finds the first patch that is used. It is 0 for a row without any: a window whose samples all lie beyond a short
    # side then takes that whole side, with weights that are zero anyway.
    first, end = used.argmax(1), side - used.flip(1).argmax(1)
    index = first[:, None] + torch.arange(int((end - first).max()), device="cpu")
    # Patches inside the map but behind a window's own end have weight zero already. Only indices beyond the map need care:
    # clamping repeats the last patch, whose weight would count twice.
    padding = index >= side
    index = index.clamp(max=side - 1)
    cut = weights.gather(2, index[:, None].expand(-1, weights.shape[1], -1))
    return index, cut.masked_fill(padding[:, None], 0.0)


@functools.lru_cache(maxsize=CACHED_GRIDS)
def slice_windows(query_grid: int, height: int, width: int, device: torch.device) -> Windows:
    """Returns the windows of a slice of height x width patches; bins are padded to MAX_BINS."""
    bins_y, bins_x = _bin_grid(height, width)
    rows, row_weights = _axis_regions(_axis_weights(height, query_grid, bins_y))
    columns, column_weights = _axis_regions(_axis_weights(width, query_grid, bins_x))
    # RoIAlign is separable: the share of a patch in a sample is the product of its shares along both axes.
    index = rows[:, None, :, None] * width + columns[None, :, None, :]  # [qy, qx, ey, ex]
    weights = torch.einsum("iby,jcx->ijbcyx", row_weights, column_weights)  # [qy, qx, bins_y, bins_x, ey, ex]
    num_bins, queries = bins_y * bins_x, query_grid**2
    weights = F.pad(weights.reshape(queries, num_bins, -1), (0, 0, 0, MAX_BINS - num_bins))
    is_bin = torch.arange(MAX_BINS, device="cpu") < num_bins
    return Windows(index.reshape(queries, -1).to(device), weights.to(device), is_bin.to(device))


@functools.lru_cache(maxsize=CACHED_GRIDS)
def _padded_windows(query_grid: int, grid: Grid, region: int, device: torch.device) -> Windows:
    # Row 0 with weight 0 pads a region, so slices of all grids stack and the padding adds nothing.
    windows = slice_windows(query_grid, *grid, device)
    missing = region - windows.rows.shape[1]
    return Windows(F.pad(windows.rows, (0, missing)), F.pad(windows.weights, (0, missing)), windows.is_bin)


def batch_windows(query_grid: int, grids: Sequence[Grid], device: torch.device) -> Windows:
    """Returns the windows of all slices, rows counted over the packed patches: [k, q, r], [k, q, bins, r], [k, bins]."""
    region = max(slice_windows(query_grid, *grid, device).rows.shape[1] for grid in grids)
    rows, weights, is_bin = zip(*(_padded_windows(query_grid, grid, region, device) for grid in grids), strict=True)
    lengths = torch.tensor([height * width for height, width in grids], device=device)
    starts = lengths.cumsum(0) - lengths  # [k]; the first packed row of each slice
    return Windows(torch.stack(rows) + starts[:, None, None], torch.stack(weights), torch.stack(is_bin))


def attend_to_windows(query: Tensor, key: Tensor, value: Tensor, windows: Windows) -> Tensor:
    """Computes the attention of every query to the samples of its own window, in every slice.

    Args:
        query: [q, n, d], the same for all slices.
        key: [p, n, d] of the patches.
        value: [p, n, d] of the patches.

    Returns:
        [k, q, n, d].
    """
    (slices, queries, region), (patches, heads, head_dim) = windows.rows.shape, value.shape
    # Queries are the same for all slices, so one product scores all q against all p patches; a window then picks its r
    # patches. A sample is a weighted sum of patches, and so is its score: no key is ever sampled.
    scores = torch.einsum("qnd,pnd->nqp", query * head_dim**-0.5, key)
    rows = windows.rows.transpose(0, 1).reshape(1, queries, -1)  # [1, q, k * r]
    scores = scores.gather(2, rows.expand(heads, -1, -1)).unflatten(2, (slices, region))
    scores = scores.permute(2, 1, 0, 3).float()  # [k, q, n, r], of the patches
    scores = scores @ windows.weights.transpose(2, 3)  # [k, q, n, bins], of the samples
    scores = scores.masked_fill(~windows.is_bin[:, None, None], float("-inf"))
    shares = scores.softmax(-1) @ windows.weights  # [k, q, n, r], of the patches again
    # One fused gather and weighted sum: the value rows of each window are never materialised.
    bags = windows.rows[:, :, None] * heads + torch.arange(heads, device=value.device)[:, None]  # [k, q, n, r]
    out = F.embedding_bag(
        bags.flatten(0, 2),
        value.reshape(patches * heads, head_dim),
        per_sample_weights=shares.flatten(0, 2).to(value.dtype),
        mode="sum",
    )
    return out.unflatten(0, (slices, queries, heads))


def _sine_cosine_table(side: int, width: int) -> Tensor:
    """Returns a position table [side * side, width]: the first half of the channels encodes x, the second y."""
    frequencies = 10000.0 ** (-torch.arange(width // 4) / (width / 4))
    angles = torch.arange(side)[:, None] * frequencies  # [side, width / 4]
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    x, y = axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)
    return torch.cat([x, y], dim=1)


class WindowAttention(nn.Module):
    """Projections around ``attend_to_windows``, with the parameters of torch's MultiheadAttention.

    It is a module of its own, and its ``forward`` is called. Where parameters are gathered late, Megatron waits for them in
    front of the forward of the module that owns them, and nowhere else.
    """

    def __init__(self, width: int, num_heads: int, dtype: torch.dtype):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width, dtype=dtype))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width, dtype=dtype))
        self.out_proj = nn.Linear(width, width, dtype=dtype)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, windows: Windows) -> Tensor:
        """Returns attended and projected values.

        Args:
            query: [q, h], the same for all slices.
            key: [p, h] of the patches.
            value: [p, h] of the patches.

        Returns:
            [k, q, h].
        """
        weight_q, weight_k, weight_v = self.in_proj_weight.chunk(3)
        # The key bias adds the same to all scores of a query, which the softmax does not see.
        bias_q, _, bias_v = self.in_proj_bias.chunk(3)
        query = F.linear(query, weight_q, bias_q)  # [q, h]
        key = F.linear(key, weight_k)  # [p, h]
        value = F.linear(value, weight_v)  # [p, h]; its bias is added once: the attention weights sum to one
        query, key, value = (x.unflatten(1, (self.num_heads, -1)) for x in (query, key, value))
        attended = attend_to_windows(query, key, value, windows).flatten(2) + bias_v  # [k, q, h]
        return self.out_proj(attended)


class Resampler(nn.Module):
    """Turns features into visual tokens. Its parameters have the names of released LLaVA-UHD weights.

    Weights are undefined until ``reset_parameters`` or a checkpoint fills them.

    Args:
        config: number of queries and heads.
        kv_width: width c of the features.
        width: hidden size h of the decoder.
        dtype: of the parameters.
    """

    def __init__(self, config: ResamplerConfig, kv_width: int, width: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config
        self.query = nn.Parameter(torch.empty(config.queries, width, dtype=dtype))
        self.pos_embed = nn.Parameter(
            torch.empty(config.queries, width, dtype=dtype), requires_grad=config.train_positions
        )
        self.kv_proj = nn.Linear(kv_width, width, bias=False, dtype=dtype)
        self.attn = WindowAttention(width, config.num_heads, dtype)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width, config.norm_eps, dtype=dtype) for _ in range(3))
        self.proj = nn.Parameter(torch.empty(width, width, dtype=dtype))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialises as the released module does, with numbers from ``generator``."""
        width = self.proj.shape[0]
        bound = math.sqrt(6 / (4 * width))  # Xavier's for the packed matrix [3 * h, h]

        def draw(weight: Tensor, distribution: Callable[..., Tensor], *args: float) -> None:
            # On the CPU in fp32, so that the numbers do not depend on the device.
            weight.copy_(distribution(torch.empty(weight.shape, device="cpu"), *args, generator=generator))

        draw(self.attn.in_proj_weight, nn.init.uniform_, -bound, bound)
        for weight in (self.query, self.kv_proj.weight, self.attn.out_proj.weight):
            draw(weight, nn.init.trunc_normal_, 0.0, INIT_STD)
        draw(self.proj, nn.init.normal_, 0.0, width**-0.5)
        self.pos_embed.copy_(_sine_cosine_table(self.config.query_grid, width))
        for norm in (self.ln_q, self.ln_kv, self.ln_post):
            norm.reset_parameters()
        for bias in (self.attn.in_proj_bias, self.attn.out_proj.bias):
            nn.init.zeros_(bias)

    def forward(self, features: Tensor, grids: Tensor) -> Tensor:
        """Returns the visual tokens of every slice.

        Args:
            features: [p, c] of the patches of all slices.
            grids: int64 [k, 2], (height, width) of each slice in patches; k >= 1. On the CPU it costs no
                synchronisation.

        Returns:
            [k, q, h].
        """
        sizes = [(height, width) for height, width in grids.tolist()]
        x = self.ln_kv(self.kv_proj(features))  # [p, h]
        query = self.ln_q(self.query) + self.pos_embed  # [q, h]
        windows = batch_windows(self.config.query_grid, sizes, features.device)
        attended = self.attn(query, x + interpolate_positions(self.pos_embed, sizes), x, windows)  # [k, q, h]
        return self.ln_post(attended) @ self.proj
