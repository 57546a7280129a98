from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sicog_mcore.data.batch import IGNORED_LABEL, EncodedSample
from sicog_mcore.data.collate import collate
from sicog_mcore.data.packing import pack_window

TOKENS, SLICES = 1024, 32
QUERIES, PATCH_DIM, PAD = 4, 12, 9
MIN_FILL = 0.95

sizes = st.lists(st.tuples(st.integers(1, TOKENS), st.integers(0, SLICES)), max_size=60)


@settings(deadline=None)
@given(sizes)
def test_pack_never_splits_a_sample_and_respects_both_budgets(window: list[tuple[int, int]]) -> None:
    packs = pack_window(window, TOKENS, SLICES)
    assert sorted(member for pack in packs for member in pack) == list(range(len(window)))
    for pack in packs:
        assert sum(window[member][0] for member in pack) <= TOKENS
        assert sum(window[member][1] for member in pack) <= SLICES


def test_best_fit_fills_packs() -> None:
    draw = random.Random(0)
    window = [(draw.choice([30, 60, 177, 240, 353]) + draw.randrange(80), draw.randrange(3)) for _ in range(512)]
    packs = pack_window(window, TOKENS, SLICES)
    assert sum(tokens for tokens, _ in window) / (len(packs) * TOKENS) >= MIN_FILL


def test_slice_budget_alone_separates_samples() -> None:
    assert pack_window([(10, 20), (10, 20), (10, 12)], TOKENS, SLICES) == [[0, 2], [1]]


def test_sample_over_a_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="sample 1 has 1025 tokens"):
        pack_window([(5, 0), (1025, 0)], TOKENS, SLICES)


def sample(name: str, length: int, num_slices: int) -> EncodedSample:
    num_visual = num_slices * QUERIES
    return EncodedSample(
        id=name,
        tokens=torch.full((length,), len(name)),
        labels=torch.full((length,), 7),
        patches=torch.full((6 * num_slices, PATCH_DIM), num_slices, dtype=torch.uint8),
        grids=torch.tensor([[2, 3]] * num_slices, dtype=torch.int64).reshape(-1, 2),
        image_slots=torch.arange(1, 1 + num_visual),
        visual_rows=torch.arange(num_visual).flip(0),
        num_images=int(num_slices > 0),
    )


def test_collate_offsets_slots_and_rows_and_pads_as_last_segment() -> None:
    samples = [sample("a", 10, 1), sample("bb", 6, 0), sample("ccc", 12, 2)]
    batch = collate(samples, token_budget=32, pad_id=PAD, queries=QUERIES, patch_dim=PATCH_DIM)
    assert batch.tokens.tolist() == [1] * 10 + [2] * 6 + [3] * 12 + [PAD] * 4
    assert batch.labels.tolist() == [7] * 28 + [IGNORED_LABEL] * 4
    assert batch.positions.tolist() == [*range(10), *range(6), *range(12), *range(4)]
    assert batch.cu_seqlens.tolist() == [0, 10, 16, 28, 32] and batch.cu_seqlens.dtype == torch.int32
    assert batch.image_slots.tolist() == [*range(1, 5), *range(17, 25)]
    assert batch.visual_rows.tolist() == [3, 2, 1, 0, 11, 10, 9, 8, 7, 6, 5, 4]
    assert batch.patches[:, 0].tolist() == [1] * 6 + [2] * 12
    assert (batch.num_tokens, batch.num_images, batch.num_slices) == (28, 2, 3)
    assert batch.sample_ids == ("a", "bb", "ccc")


def test_full_pack_has_no_tail() -> None:
    batch = collate([sample("a", 10, 1)], token_budget=10, pad_id=PAD, queries=QUERIES, patch_dim=PATCH_DIM)
    assert batch.cu_seqlens.tolist() == [0, 10]


def test_padding_is_cut_into_pieces_no_longer_than_the_longest_sample() -> None:
    samples = [sample("a", 3, 0), sample("b", 5, 0)]
    batch = collate(samples, token_budget=20, pad_id=PAD, queries=QUERIES, patch_dim=PATCH_DIM)
    assert batch.cu_seqlens.tolist() == [0, 3, 8, 13, 18, 20] and batch.max_seqlen == 5
    assert batch.positions[8:].tolist() == [*range(5), *range(5), 0, 1]


def test_no_samples_give_a_batch_of_padding() -> None:
    batch = collate([], token_budget=8, pad_id=PAD, queries=QUERIES, patch_dim=PATCH_DIM)
    assert batch.tokens.tolist() == [PAD] * 8 and batch.cu_seqlens.tolist() == [0, 8]
    assert batch.patches.shape == (0, PATCH_DIM) and batch.grids.shape == (0, 2)
    assert batch.patches.dtype == torch.uint8 and batch.image_slots.dtype == torch.int64
    assert (batch.num_tokens, batch.sample_ids) == (0, ())


def test_samples_longer_than_the_stream_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'a'.*10 tokens, at most 8"):
        collate([sample("a", 10, 0)], token_budget=8, pad_id=PAD, queries=QUERIES, patch_dim=PATCH_DIM)
