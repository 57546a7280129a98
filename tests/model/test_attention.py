"""Packed attention equals attention of each sequence alone, whatever the back end."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention import varlen

from sicog_mcore.model.attention import PackedAttention, packed_sequences
from sicog_mcore.model.capability import AttentionBackend

TOLERANCE = 1e-6
HEADS, GROUPS, DIM = 4, 2, 8


def attention(backend: AttentionBackend, causal: bool, scale: float | None = None) -> PackedAttention:
    config = TransformerConfig(
        num_layers=1, hidden_size=HEADS * DIM, num_attention_heads=HEADS, num_query_groups=GROUPS, kv_channels=DIM
    )
    mask = AttnMaskType.causal if causal else AttnMaskType.no_mask
    return PackedAttention(config, 1, mask, "self", backend, scale)


def packed_inputs(lengths: list[int]) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = sum(lengths)
    inputs = [torch.randn(rows, 1, n, DIM, generator=generator).requires_grad_() for n in (HEADS, GROUPS, GROUPS)]
    return inputs, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def one_by_one(inputs: list[Tensor], borders: Tensor, causal: bool, scale: float = DIM**-0.5) -> Tensor:
    """Softmax attention written out, a sequence at a time: [t, 1, n * d]."""
    parts = []
    for start, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        query, key, value = (x[start:end, 0].transpose(0, 1) for x in inputs)
        key, value = (x.repeat_interleave(HEADS // GROUPS, dim=0) for x in (key, value))
        scores = query @ key.transpose(1, 2) * scale
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        parts.append((scores.softmax(-1) @ value).transpose(0, 1).flatten(1))
    return torch.cat(parts)[:, None]


def run(module: PackedAttention, inputs: list[Tensor], borders: Tensor) -> Tensor:
    return module(*inputs, None, packed_seq_params=packed_sequences(borders, int(borders.diff().max())))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[5, 1, 9], [4, 4], [7]])
def test_reference_equals_each_sequence_alone_forward_and_backward(causal: bool, lengths: list[int]) -> None:
    inputs, borders = packed_inputs(lengths)
    ours, expected = run(attention("sdpa", causal), inputs, borders), one_by_one(inputs, borders, causal)
    assert ours.shape == (sum(lengths), 1, HEADS * DIM)
    torch.testing.assert_close(ours, expected, rtol=0, atol=TOLERANCE)
    weight = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad((ours * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=10 * TOLERANCE)


def test_softmax_scale_replaces_the_default() -> None:
    inputs, borders = packed_inputs([3, 6])
    expected = one_by_one(inputs, borders, True, scale=0.7)
    torch.testing.assert_close(run(attention("sdpa", True, 0.7), inputs, borders), expected, rtol=0, atol=TOLERANCE)


def test_missing_borders_are_an_error_that_names_the_remedy() -> None:
    inputs, _ = packed_inputs([3])
    with pytest.raises(ValueError, match="packed_sequences"):
        attention("sdpa", True)(*inputs)


def _sequences(query: Tensor, key: Tensor, value: Tensor, cu: Tensor, causal: bool, scale: float | None) -> Tensor:
    parts = []
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        heads = (x[start:end].transpose(0, 1) for x in (query, key, value))
        out = F.scaled_dot_product_attention(*heads, is_causal=causal, scale=scale, enable_gqa=True)
        parts.append(out.transpose(0, 1))
    return torch.cat(parts)


def _old_varlen(query, key, value, cu_seqlens, *_, is_causal=False, scale=None):
    assert query.shape == key.shape, "old kernels know no grouped heads"
    return _sequences(query, key, value, cu_seqlens, is_causal, scale)


def _new_varlen(query, key, value, cu_seqlens, *_, scale=None, window_size=(-1, -1), enable_gqa=False):
    assert enable_gqa == (query.shape != key.shape)
    return _sequences(query, key, value, cu_seqlens, window_size == (-1, 0), scale)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel", [_old_varlen, _new_varlen])
def test_varlen_is_called_as_its_signature_demands(
    monkeypatch: pytest.MonkeyPatch, kernel: Callable, causal: bool
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    inputs, borders = packed_inputs([5, 2, 8])
    ours = run(attention("varlen", causal), inputs, borders)
    torch.testing.assert_close(ours, one_by_one(inputs, borders, causal), rtol=0, atol=TOLERANCE)


def test_this_torch_has_the_varlen_arguments_that_are_used() -> None:
    known = inspect.signature(varlen.varlen_attn).parameters
    assert list(known)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert "window_size" in known or "is_causal" in known


@pytest.mark.parametrize("causal", [True, False])
def test_flash_gets_borders_and_causality(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    def flash_attn_varlen_func(q, k, v, cu_q, *borders, softmax_scale, causal):
        assert borders[1] == borders[2] == int(cu_q.diff().max())
        return _sequences(q, k, v, cu_q, causal, softmax_scale)

    fake = types.ModuleType("flash_attn")
    fake.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    inputs, borders = packed_inputs([5, 2, 8])
    ours = run(attention("flash", causal), inputs, borders)
    torch.testing.assert_close(ours, one_by_one(inputs, borders, causal), rtol=0, atol=TOLERANCE)
