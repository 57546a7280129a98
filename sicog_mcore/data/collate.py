"""The samples of a pack joined into one batch.

In: EncodedSamples of a pack   Out: PackedBatch   Next: loader.py
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from sicog_mcore.data.batch import IGNORED_LABEL, EncodedSample, PackedBatch


def collate(
    samples: Sequence[EncodedSample], *, token_budget: int, pad_id: int, queries: int, patch_dim: int
) -> PackedBatch:
    """Joins samples into one token stream of fixed length. No samples give a batch of padding.

    Args:
        samples: together within the budget.
        token_budget: length t of the stream.
        pad_id: token of the padded tail.
        queries: resampler outputs q per slice.
        patch_dim: width of a patch row.

    Raises:
        ValueError: the samples are longer than the stream, or contradict themselves.
    """
    lengths = [len(sample.tokens) for sample in samples]
    num_tokens = sum(lengths)
    if num_tokens > token_budget:
        ids = [sample.id for sample in samples]
        raise ValueError(f"samples {ids} have {num_tokens} tokens, at most {token_budget} fit; did a file change?")
    tail = token_budget - num_tokens
    answers = [segment for sample in samples for segment in sample.segments]
    inside = [segment.length for segment in answers]
    segments = [*inside, *_cut(tail, max(inside, default=tail))]
    weights = [segment.weight for segment in answers]
    first_tokens = _starts(lengths)
    first_rows = _starts([len(sample.grids) * queries for sample in samples])
    slots = [sample.image_slots + start for sample, start in zip(samples, first_tokens, strict=True)]
    rows = [sample.visual_rows + start for sample, start in zip(samples, first_rows, strict=True)]
    no_patches, no_grids = torch.empty(0, patch_dim, dtype=torch.uint8), torch.empty(0, 2, dtype=torch.int64)
    batch = PackedBatch(
        tokens=torch.cat([*(sample.tokens for sample in samples), _filled(tail, pad_id)]),  # [t]
        labels=torch.cat([*(sample.labels for sample in samples), _filled(tail, IGNORED_LABEL)]),  # [t]
        positions=torch.cat([torch.arange(length) for length in segments]),  # [t]
        cu_seqlens=torch.tensor([*_starts(segments), token_budget], dtype=torch.int32),  # [n + 1]
        patches=torch.cat([no_patches, *(sample.patches for sample in samples)]),  # [p, patch_dim]
        grids=torch.cat([no_grids, *(sample.grids for sample in samples)]),  # [k, 2]
        image_slots=torch.cat([_filled(0, 0), *slots]),  # [m]
        visual_rows=torch.cat([_filled(0, 0), *rows]),  # [m]
        group_sizes=torch.tensor([len(sample.segments) for sample in samples], dtype=torch.int64),  # [g]
        num_tokens=num_tokens,
        num_images=sum(sample.num_images for sample in samples),
        sample_ids=tuple(sample.id for sample in samples),
        max_seqlen=max(segments),
        segment_weights=torch.tensor([] if all(weight == 1 for weight in weights) else weights, dtype=torch.float64),
    )
    return batch.validate(queries)


def _starts(lengths: Sequence[int]) -> list[int]:
    return list(accumulate(lengths, initial=0))[:-1]


def _cut(tail: int, longest: int) -> list[int]:
    """Padding as segments no longer than a segment: attention costs the square, or pads all to the longest."""
    return [min(longest, tail - start) for start in range(0, tail, longest)] if tail else []


def _filled(length: int, value: int) -> Tensor:
    return torch.full((length,), value, dtype=torch.int64)
