"""Stand-ins for Transformer Engine's layers in Megatron, for machines without it.

They have its parameter names (the norm inside the linear layer), its extra states, its strictness about them, and the hook
by which its attention forgives a checkpoint without one. The arithmetic is that of the local layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from sicog_mcore.model.layers import Norm


class ExtraState(torch.nn.Module):
    """Saves a byte tensor for fp8, and insists on it when it loads."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        assert state is None or torch.is_tensor(state)


class TELayerNormColumnParallelLinear(ExtraState, ColumnParallelLinear):
    def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any):
        super().__init__(input_size, output_size, config=config, **options)
        self._load_state_dict_pre_hooks.clear()  # Megatron's local layers bring a default extra state; these do not
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        if config.normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.zeros(input_size, dtype=config.params_dtype))
        else:
            self.layer_norm_bias = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.layer_norm_bias is None:
            x = F.rms_norm(x, self.layer_norm_weight.shape, self.layer_norm_weight, self.eps)
        else:
            x = F.layer_norm(x, self.layer_norm_weight.shape, self.layer_norm_weight, self.layer_norm_bias, self.eps)
        return super().forward(x, *args, **kwargs)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> Any:
        tensors = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            tensors,
            prefix,
            {"weight": 0, "bias": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class TERowParallelLinear(ExtraState, RowParallelLinear):
    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._load_state_dict_pre_hooks.clear()


class TENorm(ExtraState, Norm):
    pass


class TEDotProductAttention(ExtraState):
    def __init__(self, config: Any, layer_number: int, attn_mask_type: Any, **_: Any):
        super().__init__()
        self.is_causal = attn_mask_type.name == "causal"
        self.register_load_state_dict_post_hook(self._forgive)

    @staticmethod
    def _forgive(_: torch.nn.Module, keys: Any) -> None:
        for key in list(keys.missing_keys):
            if "core_attention._extra_state" in key:
                keys.missing_keys.remove(key)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: Any, **__: Any) -> Tensor:
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        pieces = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (query, key, value)), strict=True)
        attended = [F.scaled_dot_product_attention(*p, is_causal=self.is_causal, enable_gqa=True) for p in pieces]
        return torch.cat(attended, dim=1).transpose(0, 1).flatten(1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> Any:
        return {}


@contextmanager
def fake_transformer_engine() -> Iterator[None]:
    """Puts the stand-ins in the places of Megatron's own classes, which need a CUDA device."""
    parts = (TELayerNormColumnParallelLinear, TERowParallelLinear, TENorm, TEDotProductAttention)
    with patch.multiple(transformer_engine, **{part.__name__: part for part in parts}):
        yield
