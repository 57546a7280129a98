"""Describes the transformer layers of tower and decoder: Megatron's layer, made of parts that this machine can run.

In: TransformerConfig and two choices of capability.py   Out: the spec Megatron builds a TransformerBlock from
Next: vision_tower.py, decoder.py
The tree is written out here because Megatron's own spec functions differ between 0.16 and 0.19; the parts do not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from sicog_mcore.model.attention import PackedAttention
from sicog_mcore.model.capability import AttentionBackend, LayerKind

# Transformer Engine's layers hold the norm in front of a linear layer inside that layer.
FUSED_NORMS = (
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
)
EXTRA_STATE = "_extra_state"  # an entry that matters for fp8 in Transformer Engine alone; local layers leave it empty


def plain_name(name: str) -> str:
    """Returns the name of a parameter in local layers, given its name in either kind of layers."""
    for fused, plain in FUSED_NORMS:
        name = name.replace(fused, plain)
    return name


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm, as ``config.normalization`` says.

    Megatron's own torch norm refuses sequence parallelism. This one marks its parameters instead, and Megatron sums the
    gradients of marked parameters over the tensor-parallel ranks, each of which saw its own rows only.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        else:
            self.register_parameter("bias", None)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h]."""
        if self.bias is None:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class _Parts(NamedTuple):
    """The classes that a layer is assembled from; ``norm_column`` is a linear layer, with its norm in front if fused."""

    norm_before: type
    norm_column: type
    row: type
    final_norm: type
    checkpoint_names: dict[str, str]


def _parts(layers: LayerKind) -> _Parts:
    if layers == "te":
        # Not importable without CUDA; local layers must not need it.
        from megatron.core.extensions import transformer_engine as te

        # The norm is fused into the linear layer behind it, so nothing stands in the norm's own place.
        return _Parts(IdentityOp, te.TELayerNormColumnParallelLinear, te.TERowParallelLinear, te.TENorm, {})
    # A decoder is saved under the names of Transformer Engine's fused layers, a tower under the plain ones (vlm.py).
    names = {plain: fused for fused, plain in FUSED_NORMS}
    return _Parts(Norm, ColumnParallelLinear, RowParallelLinear, Norm, names)


def transformer_block_spec(
    num_layers: int, attention: AttentionBackend, causal: bool, layers: LayerKind, qk_norm: bool = False
) -> TransformerBlockSubmodules:
    """Returns the spec of a block of equal layers; widths, norms, biases and activation come from the config at building.

    Args:
        num_layers: layers of this block (of this pipeline chunk).
        attention: back end of packed attention.
        causal: tokens see earlier tokens only.
        layers: Transformer Engine's parts or Megatron's local ones.
        qk_norm: normalise every query and key head; the config it is built with must say so too (``qk_layernorm``), by
            which Megatron sums the gradients of these norms over tensor-parallel ranks: each sees its own heads.
    """
    parts = _parts(layers)
    head_norm = parts.final_norm if qk_norm else None
    mask = AttnMaskType.causal if causal else AttnMaskType.no_mask
    core_attention: Any = ModuleSpec(module=PackedAttention, params={"backend": attention})
    attention_parts = SelfAttentionSubmodules(
        linear_qkv=parts.norm_column,
        core_attention=core_attention,
        linear_proj=parts.row,
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    mlp_parts = MLPSubmodules(linear_fc1=parts.norm_column, linear_fc2=parts.row)

    def layer() -> ModuleSpec:
        mlp: Any = ModuleSpec(module=MLP, submodules=mlp_parts)
        submodules = TransformerLayerSubmodules(
            input_layernorm=parts.norm_before,
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": mask}, submodules=attention_parts
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=parts.norm_before,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=parts.checkpoint_names,
        )
        return ModuleSpec(module=TransformerLayer, submodules=submodules)

    return TransformerBlockSubmodules(layer_specs=[layer() for _ in range(num_layers)], layer_norm=parts.final_norm)
