"""Every attention back end of this machine is as exact as plain attention in the same precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from sicog_mcore.errors import ConfigError
from sicog_mcore.model.attention import PackedAttention, packed_sequences
from sicog_mcore.model.capability import AttentionBackend, probe

pytestmark = pytest.mark.gpu
# A back end may err this many times as much as the reference does in bf16: output, then each gradient.
ERROR_FACTORS = (2.0, 3.0, 3.0, 3.0)
ERROR_FLOOR = 1e-3  # where the reference happens to be exact; inputs have unit variance


def require(backend: str, head_dim: int) -> AttentionBackend:
    """Skips the test, with the reason, where the back end cannot run."""
    try:
        return probe().attention(backend, head_dim, "bf16").name
    except ConfigError as error:
        pytest.skip(error.problems[0].problem)


def plain(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], causal: bool) -> Tensor:
    """Attention written out, a sequence at a time, in the precision of the inputs: [t, 1, n * d]."""
    heads, groups, dim = query.shape[2], key.shape[2], query.shape[3]
    parts = []
    for sequence in zip(*(x.squeeze(1).split(lengths) for x in (query, key, value)), strict=True):
        q, k, v = (x.transpose(0, 1) for x in sequence)  # [n, s, d]
        k, v = (x.repeat_interleave(heads // groups, dim=0) for x in (k, v))
        scores = q @ k.mT * dim**-0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        parts.append((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
    return torch.cat(parts)[:, None]


def packed(
    backend: AttentionBackend, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], causal: bool
) -> Tensor:
    heads, groups, dim = query.shape[2], key.shape[2], query.shape[3]
    config = TransformerConfig(
        num_layers=1,
        hidden_size=heads * dim,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=dim,
        attention_dropout=0.0,
        params_dtype=query.dtype,
        bf16=query.dtype is torch.bfloat16,
    )
    module = PackedAttention(config, 1, AttnMaskType.causal if causal else AttnMaskType.no_mask, "self", backend)
    borders = torch.tensor([0, *lengths], device=query.device).cumsum(0).to(torch.int32)
    return module(query, key, value, None, packed_seq_params=packed_sequences(borders, max(lengths)))


def with_gradients(attend: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """Output and gradients of query, key and value, in fp32."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = attend(*inputs)
    return [x.float() for x in (out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype)))]


def rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[129, 1, 77], [64, 333, 5, 1], [1]], ids=str)
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (14, 2)])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("backend", ["te", "flash", "varlen", "sdpa"])
def test_error_is_that_of_the_reference_in_the_same_precision(
    backend: str, head_dim: int, heads: int, groups: int, lengths: list[int], causal: bool
) -> None:
    name, rows = require(backend, head_dim), sum(lengths)
    generator = torch.Generator("cuda").manual_seed(0)
    low = [
        torch.randn(rows, 1, n, head_dim, generator=generator, device="cuda", dtype=torch.bfloat16)
        for n in (heads, groups, groups)
    ]
    upstream = torch.randn(rows, 1, heads * head_dim, generator=generator, device="cuda", dtype=torch.bfloat16)
    reference = partial(plain, lengths=lengths, causal=causal)
    truth = with_gradients(reference, [x.float() for x in low], upstream)
    own_error = with_gradients(reference, low, upstream)
    ours = with_gradients(partial(packed, name, lengths=lengths, causal=causal), low, upstream)
    for x, expected, rounded, factor in zip(ours, truth, own_error, ERROR_FACTORS, strict=True):
        assert rms(x - expected) <= factor * rms(rounded - expected) + ERROR_FLOOR


def test_auto_takes_a_fused_kernel_in_bf16() -> None:
    choice = probe().attention("auto", 128, "bf16")
    if probe().compute_capability >= (8, 0):
        assert choice.name != "sdpa", choice.why
