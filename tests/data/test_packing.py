"""Packs keep both budgets and are full, on seeded mixes like those that the trainer is meant for; collating joins them."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sicog_mcore.data.batch import IGNORED_LABEL, EncodedSample
from sicog_mcore.data.collate import collate
from sicog_mcore.data.packing import PackBudgets, best_fit, pack_samples
from sicog_mcore.data.row_sizes import Integers
from sicog_mcore.data.stream_bench import MIXES, draw_sizes

SMALL = PackBudgets(1024, 32)
BUDGETS = PackBudgets(8192, 64)
ROWS = 4096
MIN_FILL = 0.99
QUERIES, PATCH_DIM, PAD = 4, 12, 9

few = st.lists(st.tuples(st.integers(1, SMALL.tokens), st.integers(0, SMALL.slices)), max_size=60)
many = st.tuples(
    st.integers(0, 10_000), st.sampled_from((64, 200, 500, SMALL.tokens)), st.sampled_from((0, 3, SMALL.slices))
)


def columns(sizes: list[tuple[int, int]]) -> tuple[Integers, Integers, Integers]:
    table = np.array(sizes, np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1], table[:, 0] ** 2


def check(packs: Integers, tokens: Integers, slices: Integers, budgets: PackBudgets) -> None:
    assert len(packs) == len(tokens) and np.array_equal(np.unique(packs), np.arange(packs.max(initial=-1) + 1))
    assert np.bincount(packs, tokens).max(initial=0) <= budgets.tokens
    assert np.bincount(packs, slices).max(initial=0) <= budgets.slices


@settings(deadline=None)
@given(few)
def test_few_samples_keep_both_budgets(sizes: list[tuple[int, int]]) -> None:
    tokens, slices, attention = columns(sizes)
    check(pack_samples(tokens, slices, attention, SMALL), tokens, slices, SMALL)


@settings(deadline=None, max_examples=60)
@given(many)
def test_many_samples_keep_both_budgets_and_need_no_more_packs_than_best_fit(drawn: tuple[int, int, int]) -> None:
    seed, longest, most_slices = drawn
    draw = np.random.default_rng(seed)
    tokens = draw.integers(1, longest, 600, endpoint=True)
    slices = draw.integers(0, most_slices, 600, endpoint=True)
    packs = pack_samples(tokens, slices, tokens**2, SMALL)
    check(packs, tokens, slices, SMALL)
    least = max(tokens.sum() / SMALL.tokens, slices.sum() / SMALL.slices)
    assert packs.max() + 1 <= max(least * 1.01, best_fit(tokens, slices, SMALL).max() + 1)


@pytest.mark.parametrize("name", MIXES)
def test_packs_are_full_and_alike(name: str) -> None:
    sizes = draw_sizes(name, ROWS, seed=0)
    tokens, slices, attention = (np.asarray(x, np.int64) for x in (sizes.num_tokens, sizes.num_slices, sizes.attention))
    packs = pack_samples(tokens, slices, attention, BUDGETS)
    check(packs, tokens, slices, BUDGETS)
    full = np.bincount(packs, tokens) / BUDGETS.tokens
    assert full.mean() >= MIN_FILL
    assert (full < 0.97).mean() <= 0.01  # what fits nowhere may make one pack more
    # A text that fills a pack alone leaves no room for slices: 3 in 100 rows of "sft" do.
    assert np.bincount(packs, slices).std() <= 0.25 * np.bincount(packs, slices).mean()


def test_the_same_sizes_give_the_same_packs() -> None:
    sizes = draw_sizes("sft", ROWS, seed=1)
    given_twice = [
        pack_samples(*(np.array(x, np.int64) for x in (sizes.num_tokens, sizes.num_slices, sizes.attention)), BUDGETS)
        for _ in range(2)
    ]
    assert np.array_equal(*given_twice)


def test_slices_alone_can_bind() -> None:
    tokens, slices, attention = columns([(10, 20), (10, 20), (10, 12)])
    assert pack_samples(tokens, slices, attention, SMALL).tolist() == [0, 1, 0]
    tokens, slices = np.full(400, 50), np.tile((1, 15), 200)
    packs = pack_samples(tokens, slices, tokens**2, SMALL)
    check(packs, tokens, slices, SMALL)
    assert packs.max() + 1 <= 1.02 * 400 * 8 / SMALL.slices


def test_samples_of_more_than_half_a_budget_stand_alone() -> None:
    tokens = np.full(100, 600)
    packs = pack_samples(tokens, np.zeros(100, np.int64), tokens**2, SMALL)
    assert sorted(packs.tolist()) == list(range(100))


def test_best_fit_takes_the_fullest_pack_that_has_room() -> None:
    tokens, slices, _ = columns([(700, 0), (600, 0), (400, 0), (300, 0)])
    assert best_fit(tokens, slices, SMALL).tolist() == [0, 1, 1, 0]


def test_sample_over_a_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="sample 1 has 1025 tokens"):
        pack_samples(*columns([(5, 0), (1025, 0)]), SMALL)


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


def test_packing_is_as_fast_where_slices_fill_the_packs_as_where_tokens_do() -> None:
    draw = np.random.default_rng(3)
    tokens = draw.integers(100, 500, 2 * ROWS)
    slices = draw.integers(3, 9, 2 * ROWS)  # ten samples fill a pack's slices, and a third of its tokens

    def seconds(budgets: PackBudgets) -> float:
        runs = []
        for _ in range(3):
            started = time.process_time()
            packs = best_fit(tokens, slices, budgets)
            runs.append(time.process_time() - started)
        bound = max(tokens.sum() / budgets.tokens, slices.sum() / budgets.slices)
        assert bound <= packs.max() + 1 <= 1.02 * bound
        return min(runs)

    # Where every search walked over the packs without slices left, it took 50 times as long.
    assert seconds(BUDGETS) < 8 * seconds(PackBudgets(BUDGETS.tokens, 1000))
