"""Runs the exported model in plain torch: it needs transformers, and nothing of the framework that trained it.

In: the inputs that processing_sicog.py makes   Out: logits, and text by ``generate``
Slices of equal grid are encoded together; an image has at most two grids, its slices' and its overview's.
Legend: k slices, p patches of all slices, h hidden size of the decoder, c width of CLIP, q queries per slice.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_sicog import SicogConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of red, green, blue in 0..1
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Samples per window of the resampler, (height, width): the first of those closest to the slice's shape.
BIN_GRIDS = ((2, 4), (2, 3), (3, 4), (3, 3), (4, 2), (3, 2), (4, 3))
NO_ROW = -1  # in visual_rows: text stands here
IMAGE_INPUTS = ("visual_rows", "patches", "grids")


def resize_positions(table: Tensor, height: int, width: int) -> Tensor:
    """Resizes a square table [G * G, x] bicubically to [height * width, x]; computes in fp32."""
    side = math.isqrt(table.shape[0])
    square = table.float().T.reshape(1, -1, side, side)
    resized = F.interpolate(square, size=(height, width), mode="bicubic", align_corners=False)
    return resized.flatten(2)[0].T.to(table.dtype)


class SicogVisionEmbeddings(nn.Module):
    """Embeds patches and a class token with their positions. Parameters are named as CLIP's."""

    def __init__(self, config: Any):
        super().__init__()
        width, side = config.hidden_size, config.image_size // config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(side**2 + 1, width)

    def forward(self, patches: Tensor, height: int, width: int) -> Tensor:
        """Uint8 [k, height * width, 3 * patch_size**2] -> [k, 1 + height * width, c]."""
        weight = self.patch_embedding.weight.flatten(1)
        pixels = patches.unflatten(2, (3, -1)).float() / 255
        mean, std = torch.tensor((CLIP_MEAN, CLIP_STD), device=patches.device)[:, :, None]
        # A convolution that steps by its own width, as a matrix product: the pixels come as flattened patches already.
        x = F.linear(((pixels - mean) / std).flatten(2).to(weight.dtype), weight)
        table = self.position_embedding.weight
        positions = torch.cat([table[:1], resize_positions(table[1:], height, width)])
        return torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], dim=1) + positions


class SicogVisionAttention(nn.Module):
    """Lets every patch of a slice attend to all of that slice."""

    def __init__(self, config: Any):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[k, s, c] -> [k, s, c]."""
        projected = (projection(x) for projection in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in projected)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SicogVisionMLP(nn.Module):
    """CLIP's feed-forward layer, with quick GELU."""

    def __init__(self, config: Any):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[k, s, c] -> [k, s, c]."""
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class SicogVisionLayer(nn.Module):
    """A pre-norm transformer layer of CLIP."""

    def __init__(self, config: Any):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = SicogVisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = SicogVisionMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """[k, s, c] -> [k, s, c]."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SicogVisionModel(nn.Module):
    """CLIP up to the layer whose output is used; no final norm."""

    def __init__(self, config: SicogConfig):
        super().__init__()
        vision = config.vision_config
        self.embeddings = SicogVisionEmbeddings(vision)
        self.pre_layrnorm = nn.LayerNorm(vision.hidden_size, vision.layer_norm_eps)  # CLIP's spelling
        layers = [SicogVisionLayer(vision) for _ in range(config.vision_layers_used)]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})

    def forward(self, patches: Tensor, height: int, width: int) -> Tensor:
        """Encodes slices of one grid: uint8 [k, height * width, 3 * patch_size**2] -> [k, height * width, c]."""
        x = self.pre_layrnorm(self.embeddings(patches, height, width))
        for layer in self.encoder["layers"].children():
            x = layer(x)
        return x[:, 1:]


@functools.lru_cache(maxsize=64)
def window_weights(query_grid: int, height: int, width: int) -> Tensor:
    """Returns the share of every patch in every sample of every query's window: fp32 [q, bins, height * width].

    A slice is cut into query_grid x query_grid windows; a window is sampled at a few places (bins), as RoIAlign does
    (not aligned, adaptive sampling).
    """
    bins_y, bins_x = min(BIN_GRIDS, key=lambda bins: abs(math.log(width / height) - math.log(bins[1] / bins[0])))
    rows, columns = _axis_weights(height, query_grid, bins_y), _axis_weights(width, query_grid, bins_x)
    weights = torch.einsum("iby,jcx->ijbcyx", rows, columns)
    return weights.reshape(query_grid**2, bins_y * bins_x, height * width)


def _axis_weights(side: int, windows: int, bins: int) -> Tensor:
    """Computes RoIAlign along one axis: fp32 [windows, bins, side]. Samples beyond the far edge count as zero."""
    borders = (torch.arange(windows + 1, dtype=torch.float64, device="cpu") * side / windows).float()
    length = borders.diff().clamp(min=1)[:, None, None] / bins
    per_bin = math.ceil(max(side / windows, 1) / bins)
    bin_index, sample = torch.arange(bins, device="cpu")[:, None], torch.arange(per_bin, device="cpu") + 0.5
    at = borders[:-1, None, None] + bin_index * length + sample * length / per_bin  # [windows, bins, per_bin]
    distance = at.clamp(max=side - 1)[..., None] - torch.arange(side, device="cpu")
    return ((1 - distance.abs()).clamp(min=0) * (at <= side)[..., None]).mean(2)


class SicogResampler(nn.Module):
    """A fixed number of visual tokens per slice; query i attends to the samples of window i.

    Sampling is linear, so the patches are projected once, and scores and shares are carried from patches to samples and
    back.
    """

    def __init__(self, config: SicogConfig):
        super().__init__()
        width, queries, eps = config.text_config.hidden_size, config.query_grid**2, config.resampler_norm_eps
        self.query_grid, self.heads = config.query_grid, config.resampler_heads
        self.query = nn.Parameter(torch.zeros(queries, width))
        self.pos_embed = nn.Parameter(torch.zeros(queries, width))
        self.kv_proj = nn.Linear(config.vision_config.hidden_size, width, bias=False)
        self.attn = nn.MultiheadAttention(width, self.heads)  # holds the weights; never called
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width, eps) for _ in range(3))
        self.proj = nn.Parameter(torch.zeros(width, width))

    def forward(self, features: Tensor, height: int, width: int) -> Tensor:
        """Returns the visual tokens of slices of one grid: [k, height * width, c] -> [k, q, h]."""
        weight_q, weight_k, weight_v = self.attn.in_proj_weight.chunk(3)
        # The key bias adds the same to all scores of a query, which the softmax does not see.
        bias_q, _, bias_v = self.attn.in_proj_bias.chunk(3)
        x = self.ln_kv(self.kv_proj(features))
        query = F.linear(self.ln_q(self.query) + self.pos_embed, weight_q, bias_q)  # [q, h]
        key = F.linear(x + resize_positions(self.pos_embed, height, width), weight_k)  # [k, p, h]
        value = F.linear(x, weight_v)
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in (query, key, value))
        windows = window_weights(self.query_grid, height, width).to(features.device)  # [q, b, p]
        scores = torch.einsum("qnd,kpnd->kqnp", query * query.shape[-1] ** -0.5, key).float()
        shares = (scores @ windows.mT).softmax(-1) @ windows  # samples [k, q, n, b], and patches again [k, q, n, p]
        attended = torch.einsum("kqnp,kpnd->kqnd", shares.to(value.dtype), value).flatten(2) + bias_v
        return self.ln_post(self.attn.out_proj(attended)) @ self.proj


class SicogForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Generates text from text and images."""

    config_class = SicogConfig
    _no_split_modules = ["SicogVisionLayer", "SicogResampler"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: SicogConfig):
        super().__init__(config)
        self.vision_tower = nn.ModuleDict({"vision_model": SicogVisionModel(config)})
        self.resampler = SicogResampler(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SicogVisionEmbeddings | SicogResampler):
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, std=0.02)

    def get_input_embeddings(self) -> nn.Module:
        """Returns the embedding table of the decoder."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the embedding table of the decoder."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Returns the output head of the decoder."""
        return self.language_model.get_output_embeddings()

    def encode_images(self, patches: Tensor, grids: Tensor) -> Tensor:
        """Encodes all slices; returns their visual tokens in the order of the slices.

        Args:
            patches: uint8 [p, 3 * patch_size**2]; a row is one patch, channel-major (c, y, x).
            grids: int64 [k, 2]; (height, width) of every slice in patches.

        Returns:
            [k * q, h].
        """
        sizes = [(height, width) for height, width in grids.tolist()]
        slices = patches.split([height * width for height, width in sizes])
        visual: list[Tensor] = [patches] * len(sizes)  # every entry is replaced below
        # Slices of one grid form a batch without padding. An image has at most two grids, so batches stay few.
        for grid in dict.fromkeys(sizes):
            members = [i for i, size in enumerate(sizes) if size == grid]
            features = self.vision_tower["vision_model"](torch.stack([slices[i] for i in members]), *grid)
            for i, tokens in zip(members, self.resampler(features, *grid), strict=True):
                visual[i] = tokens
        return torch.cat(visual)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        visual_rows: Tensor | None = None,
        patches: Tensor | None = None,
        grids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Computes the logits of the language model.

        Args:
            input_ids: int64 [b, s]; what stands in the place of a visual token does not matter.
            attention_mask: int64 [b, s]; 0 on padding.
            position_ids: int64 [b, s].
            past_key_values: cache of ``generate``.
            visual_rows: int64 [b, s]; for each position the row of the visual tokens that replaces it, or -1.
            patches: uint8 [p, 3 * patch_size**2], see ``encode_images``.
            grids: int64 [k, 2].
            logits_to_keep: number of last positions that get logits; 0 for all.
            kwargs: what else the language model takes: labels, use_cache, output_hidden_states, ...
        """
        x = self.get_input_embeddings()(input_ids)  # [b, s, h]
        if visual_rows is not None and patches is not None and grids is not None and len(grids):
            is_visual = visual_rows >= 0
            # masked_scatter fills positions in raster order, which is the order in which their rows are listed here.
            visual = self.encode_images(patches, grids)[visual_rows[is_visual]]
            x = x.masked_scatter(is_visual[..., None], visual.to(x.dtype))
        return self.language_model(
            inputs_embeds=x,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Hands images to the first step only; later steps find them in the KV cache."""
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and kwargs.get("past_key_values") is not None:
            return {name: value for name, value in inputs.items() if name not in IMAGE_INPUTS}
        if inputs.get("visual_rows") is not None:
            # Without a cache every step reads the whole text again, which has grown by what was generated.
            rows, length = inputs["visual_rows"], inputs["input_ids"].shape[1]
            inputs["visual_rows"] = F.pad(rows, (0, input_ids.shape[1] - rows.shape[1]), value=NO_ROW)[:, -length:]
        return inputs

    def _expand_inputs_for_generation(
        self, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeats rows for several continuations of a prompt; they share its slices, so pixels are not repeated."""
        # Taken out of what transformers repeats along the batch: pixels have no batch axis, rows point into them.
        pixels = {name: kwargs.pop(name) for name in ("patches", "grids") if name in kwargs}
        input_ids, expanded = super()._expand_inputs_for_generation(input_ids=input_ids, **kwargs)
        return input_ids, {**expanded, **pixels}
