"""Runs CLIP's vision transformer over slices of any grid: all slices of a micro-batch are one packed sequence.

In: uint8 patch rows and grids of a PackedBatch   Out: one feature per patch [p, c]   Next: resampler.py
A slice is its class token followed by its patches, in raster order. Pixels are normalised here, on the device. Only the
layers up to the one whose output is used are built; there is no final norm.
"""

from __future__ import annotations

from typing import Literal

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from sicog_kernels import normalise_patches
from sicog_mcore.config import TowerConfig
from sicog_mcore.model.attention import packed_sequences
from sicog_mcore.model.capability import AttentionBackend, LayerKind
from sicog_mcore.model.layers import Norm, transformer_block_spec
from sicog_mcore.model.positions import interpolate_positions

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of red, green, blue in 0..1
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's activation. Megatron's is the same under torch.compile, which would compile anew for varying lengths."""
    return x * torch.sigmoid(1.702 * x)


def tower_transformer_config(
    tower: TowerConfig, params_dtype: torch.dtype, recompute: Literal["none", "full"]
) -> TransformerConfig:
    """Returns Megatron's configuration of the tower: CLIP's layer, on one rank whatever the decoder's layout is."""
    recomputation = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=tower.layers_used,
        hidden_size=tower.hidden,
        num_attention_heads=tower.num_heads,
        ffn_hidden_size=tower.ffn,
        normalization="LayerNorm",
        layernorm_epsilon=tower.norm_eps,
        activation_func=quick_gelu,
        add_bias_linear=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=params_dtype,
        bf16=params_dtype is torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,  # initialise.py does it, independent of the layout
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,  # Megatron has no fused quick-GELU without a gate
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **(recomputation if recompute == "full" else {}),
    )


class VisionTower(MegatronModule):
    """Turns patch rows of all slices into features. Weights are undefined until initialise.py or a checkpoint fills them.

    Args:
        config: sizes.
        transformer: from ``tower_transformer_config``.
        layers: Transformer Engine's layers or Megatron's local ones.
        attention: back end of packed attention.
        groups: process groups with a tensor-parallel group of one rank, because the weights are replicated.
    """

    def __init__(
        self,
        config: TowerConfig,
        transformer: TransformerConfig,
        layers: LayerKind,
        attention: AttentionBackend,
        groups: ProcessGroupCollection,
    ):
        super().__init__(transformer)
        dtype = transformer.params_dtype
        self.patch_embedding = torch.nn.Linear(config.patch_dim, config.hidden, bias=False, dtype=dtype)
        self.class_embedding = torch.nn.Parameter(torch.empty(config.hidden, dtype=dtype))
        positions = torch.empty(config.grid**2 + 1, config.hidden, dtype=dtype)  # row 0 is the class token's
        self.position_embedding = torch.nn.Parameter(positions)
        self.pre_norm = Norm(transformer, config.hidden, config.norm_eps)
        spec = transformer_block_spec(config.layers_used, attention, causal=False, layers=layers)
        self.transformer = TransformerBlock(transformer, spec, post_layer_norm=False, pg_collection=groups)
        for parameter in self.parameters():
            # Replicated, not sharded: Megatron counts unmarked parameters once in the gradient norm.
            parameter.tensor_model_parallel = False

    def forward(self, patches: Tensor, grids: Tensor) -> Tensor:
        """Returns the features of every patch; class tokens are dropped.

        Args:
            patches: uint8 [p, 3 * patch_px**2] of all slices.
            grids: int64 [k, 2], (height, width) of each slice in patches; k >= 1. On the CPU it costs no
                synchronisation.

        Returns:
            [p, c] in the dtype of the weights.
        """
        sizes = [(height, width) for height, width in grids.tolist()]
        cls_slots, patch_slots, cu_seqlens = _sequence_layout(grids.to(patches.device), patches.shape[0])
        x = self._embed(patches, sizes)  # [p, c]
        cls = (self.class_embedding + self.position_embedding[0]).expand(len(sizes), -1)  # [k, c]
        rows, slots = torch.cat([cls, x]), torch.cat([cls_slots, patch_slots])
        # Written by slot instead of concatenated slice by slice: the number of operations does not grow with the slices.
        x = torch.zeros_like(rows).index_copy(0, slots, rows)  # [k + p, c], each class token before its patches
        longest = 1 + max(height * width for height, width in sizes)
        x = self.transformer(
            hidden_states=self.pre_norm(x).unsqueeze(1),  # [k + p, 1, c]
            attention_mask=None,
            packed_seq_params=packed_sequences(cu_seqlens, longest),
        )
        return x.squeeze(1).index_select(0, patch_slots)  # [p, c]

    def _embed(self, patches: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        pixels = normalise_patches(patches, CLIP_MEAN, CLIP_STD, self.patch_embedding.weight.dtype)
        return self.patch_embedding(pixels) + interpolate_positions(self.position_embedding[1:], sizes)


def _sequence_layout(grids: Tensor, num_patches: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the slots of class tokens [k] and patches [p] in the packed sequence, and its borders int32 [k + 1]."""
    lengths = grids.prod(-1)
    slices = torch.arange(lengths.shape[0], device=grids.device)
    patch_ends = lengths.cumsum(0)
    cls_slots = patch_ends - lengths + slices
    # A patch is moved up by one for every class token before it; a known output size avoids a synchronisation.
    patch_slots = torch.arange(num_patches, device=grids.device) + 1
    patch_slots = patch_slots + slices.repeat_interleave(lengths, output_size=num_patches)
    cu_seqlens = torch.cat([cls_slots, patch_ends[-1:] + lengths.shape[0]]).to(torch.int32)
    return cls_slots, patch_slots, cu_seqlens
