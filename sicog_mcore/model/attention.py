"""Attention over packed sequences: the core attention of every layer, with four back ends behind one class.

In: query, key, value of all sequences in one row of tokens, and their borders   Out: one row of attended tokens
Used by layers.py in the ``core_attention`` slot of Megatron's layers. The borders come as PackedSeqParams with
``qkv_format="sbhd"``: Megatron then rotates all tokens in one call instead of one call per sequence.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from sicog_mcore.model.capability import AttentionBackend


def packed_sequences(cu_seqlens: Tensor, max_seqlen: int) -> PackedSeqParams:
    """Returns the borders of packed sequences in the form that Megatron hands down to PackedAttention.

    Args:
        cu_seqlens: int32 [n + 1]; running total of the lengths, from 0 to t.
        max_seqlen: length of the longest sequence.
    """
    return PackedSeqParams(
        qkv_format="sbhd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
    )


class CachedPass(PackedSeqParams):
    """A forward pass that fills or reads a KV cache (rollout/kv_cache.py), handed down in place of the borders."""

    def attend(self, core: PackedAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Computes the attention of one layer.

        Args:
            core: the layer's attention.
            query: [t, n, d], rotated.
            key: [t, g, d], rotated.
            value: [t, g, d].

        Returns:
            [t, n, d]
        """
        raise NotImplementedError


class PackedAttention(MegatronModule):
    """Attention of packed sequences: a token attends to its own sequence only, to all of it or to what stands before.

    Args:
        backend: "te", "flash", "varlen" (all CUDA), or "sdpa", the reference that runs anywhere.
        softmax_scale: factor on the scores; None for 1 / sqrt(d).
        Others: as Megatron passes them to a core attention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        backend: AttentionBackend,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__(config)
        self.layer_number = layer_number
        self.mask_type = attn_mask_type
        self.is_causal = attn_mask_type is AttnMaskType.causal
        self.softmax_scale = softmax_scale
        self.attend = {"te": self._te, "flash": self._flash, "varlen": self._varlen, "sdpa": self._sdpa}[backend]
        if backend == "te":
            # Not importable without CUDA; the other back ends must not need it.
            from megatron.core.extensions.transformer_engine import TEDotProductAttention

            # So named because Transformer Engine forgives a checkpoint without its extra state under this name alone.
            self.core_attention = TEDotProductAttention(
                config=config,
                layer_number=layer_number,
                attn_mask_type=attn_mask_type,
                attention_type=attention_type,
                softmax_scale=softmax_scale,
                cp_comm_type=cp_comm_type,
                pg_collection=pg_collection,
            )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: object,
    ) -> Tensor:
        """Computes attention inside each packed sequence.

        Args:
            query: [t, 1, n, d].
            key: [t, 1, g, d]; g divides n.
            value: [t, 1, g, d].
            packed_seq_params: the borders, see ``packed_sequences``.

        Returns:
            [t, 1, n * d].

        Raises:
            ValueError: no borders were given.
        """
        if packed_seq_params is None:
            raise ValueError("packed attention got no packed_seq_params; pass packed_sequences(cu_seqlens, max_seqlen)")
        # Megatron hands over [t, 1, n, d], with a batch axis of one that no kernel for packed rows wants.
        rotated = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        # In generation the KV cache decides which keys a query sees: borders cannot describe a shared prefix.
        if isinstance(packed_seq_params, CachedPass):
            rows = packed_seq_params.attend(self, *rotated)
        else:
            rows = self.attend(*rotated, packed_seq_params)
        return rows.reshape(rows.shape[0], 1, -1)  # [t, n, d] -> [t, 1, n * d]

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor, borders: PackedSeqParams) -> Tensor:
        """Attends in one call for all sequences, each padded on the right to the longest."""
        length, num = borders.max_seqlen_q, borders.cu_seqlens_q.shape[0] - 1
        # SDPA knows no borders, so sequences become its batch dimension. Where all are equally long, the packed row is that
        # batch already: no slot moves, and no mask is needed.
        slots = None if num * length == query.shape[0] else _padded_slots(borders.cu_seqlens_q, length, query.shape[0])
        query, key, value = (_pad(x, slots, num, length).transpose(1, 2) for x in (query, key, value))
        mask = None
        if slots is not None and not self.is_causal:  # causal rows never look right, where the padding is
            lengths = borders.cu_seqlens_q.diff()
            mask = torch.arange(length, device=query.device) < lengths[:, None]
            mask = mask[:, None, None, :]  # [num, length] -> [num, 1, 1, length]
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=self.is_causal, scale=self.softmax_scale, enable_gqa=True
        )  # [num, n, length, d]
        out = out.transpose(1, 2).flatten(0, 1)
        return out if slots is None else out.index_select(0, slots)

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor, borders: PackedSeqParams) -> Tensor:
        """Calls the kernel built into torch. Its options differ between torch 2.10 and 2.13, so its signature decides."""
        from torch.nn.attention import varlen

        kernel: Callable[..., Any] = varlen.varlen_attn
        known = inspect.signature(kernel).parameters
        options: dict[str, object] = {"scale": self.softmax_scale} if self.softmax_scale is not None else {}
        if self.is_causal:
            # Newer versions spell "causal" as a window: everything to the left (-1), nothing to the right (0).
            options.update({"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True})
        if key.shape[1] != query.shape[1]:
            if "enable_gqa" in known:
                options["enable_gqa"] = True
            else:
                # [t, g, d] -> [t, n, d]: this kernel wants as many key/value heads as query heads; exact, but a copy.
                key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        cu, longest = borders.cu_seqlens_q, borders.max_seqlen_q
        return kernel(query, key, value, cu, cu, longest, longest, **options)

    def _flash(self, query: Tensor, key: Tensor, value: Tensor, borders: PackedSeqParams) -> Tensor:
        from flash_attn import flash_attn_varlen_func

        cu, longest = borders.cu_seqlens_q, borders.max_seqlen_q
        return flash_attn_varlen_func(
            query, key, value, cu, cu, longest, longest, softmax_scale=self.softmax_scale, causal=self.is_causal
        )

    def _te(self, query: Tensor, key: Tensor, value: Tensor, borders: PackedSeqParams) -> Tensor:
        # The row came as "sbhd" so that Megatron rotates all tokens in one call; the kernel wants the packed format.
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=borders.cu_seqlens_q,
            cu_seqlens_kv=borders.cu_seqlens_kv,
            max_seqlen_q=borders.max_seqlen_q,
            max_seqlen_kv=borders.max_seqlen_kv,
        )
        return self.core_attention(query, key, value, None, attn_mask_type=self.mask_type, packed_seq_params=packed)


def _padded_slots(cu_seqlens: Tensor, length: int, num_tokens: int) -> Tensor:
    """Returns the slot of each packed token once every sequence is padded to ``length``: int64 [t]."""
    lengths = cu_seqlens.diff()
    # Sequence i starts at slot i * length instead of cu_seqlens[i]; all of its tokens move by that difference.
    padding = torch.arange(lengths.shape[0], device=lengths.device) * length - cu_seqlens[:-1]
    shift = padding.repeat_interleave(lengths, output_size=num_tokens)  # a known size avoids a device synchronisation
    return torch.arange(num_tokens, device=lengths.device) + shift


def _pad(x: Tensor, slots: Tensor | None, num: int, length: int) -> Tensor:
    """[t, n, d] -> [num, length, n, d], zeros behind each sequence."""
    if slots is not None:
        # One scatter into zeros, whose backward pass is a gather; a loop over sequences would launch a kernel for each.
        x = x.new_zeros(num * length, *x.shape[1:]).index_copy(0, slots, x)
    return x.unflatten(0, (num, length))
