"""Layers: the norm is its formula, and the tree is assembled from the parts that a kind of layers has."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig

from sicog_mcore.model.capability import LayerKind
from sicog_mcore.model.layers import Norm, plain_name, transformer_block_spec
from tests.fake_te import fake_transformer_engine

EXACT = 1e-6
EPS = 1e-2  # large enough to be seen


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_the_norm_is_its_formula(kind: str) -> None:
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, normalization=kind)
    norm = Norm(config, 8, eps=EPS)
    x = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        norm.weight.copy_(torch.arange(8) + 1.0)
        if norm.bias is not None:
            norm.bias.fill_(0.5)
    wide = x.double() - (x.double().mean(-1, keepdim=True) if kind == "LayerNorm" else 0)
    expected = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * (torch.arange(8) + 1.0)
    expected = expected + (0.5 if kind == "LayerNorm" else 0)
    torch.testing.assert_close(norm(x).double(), expected, rtol=EXACT, atol=EXACT)
    assert (norm.bias is None) == (kind == "RMSNorm")


def test_gradients_of_norms_are_summed_where_the_sequence_is_split() -> None:
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, normalization="LayerNorm")
    for split in (False, True):
        config.sequence_parallel = split
        assert [vars(p)["sequence_parallel"] for p in Norm(config, 8).parameters()] == [split, split]


@pytest.mark.parametrize("layers", ["local", "te"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_tree_has_the_parts_of_its_kind(layers: LayerKind, qk_norm: bool) -> None:
    with fake_transformer_engine():
        spec = transformer_block_spec(3, "torch", causal=True, layers=layers, qk_norm=qk_norm)
    assert spec.layer_specs is not None and len(spec.layer_specs) == 3
    layer = spec.layer_specs[0].submodules
    attention = layer.self_attention
    assert (layer.input_layernorm is Norm) == (layers == "local") and (layer.pre_mlp_layernorm is IdentityOp) == (
        layers == "te"
    )
    assert attention.params["attn_mask_type"] is AttnMaskType.causal
    assert (attention.submodules.q_layernorm is not None) is qk_norm
    assert len(layer.sharded_state_dict_keys_map) == (2 if layers == "local" else 0)


def test_fused_names_have_plain_ones() -> None:
    assert plain_name("layers.3.mlp.linear_fc1.layer_norm_weight") == "layers.3.pre_mlp_layernorm.weight"
    assert plain_name("layers.0.self_attention.linear_qkv.layer_norm_bias") == "layers.0.input_layernorm.bias"
    assert plain_name("layers.0.mlp.linear_fc2.weight") == "layers.0.mlp.linear_fc2.weight"
