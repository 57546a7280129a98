"""Slices are shared out to ranks without loss, and visual tokens land in their places wherever the stream is cut."""

from __future__ import annotations

import pytest
import torch

from sicog_mcore.model.splice import share_slices, splice

WIDTH = 3
GRIDS = [(2, 3), (1, 1), (4, 2), (1, 5), (3, 3), (2, 2), (1, 2)]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("num_slices", range(len(GRIDS) + 1))
def test_every_slice_is_encoded_once_in_order_and_blanks_come_last(num_slices: int, size: int) -> None:
    grids = torch.tensor(GRIDS[:num_slices], dtype=torch.int64).reshape(-1, 2)
    rows = int(grids.prod(-1).sum())
    patches = torch.arange(1, rows + 1).repeat_interleave(WIDTH).reshape(-1, WIDTH).to(torch.uint8)
    shares = [share_slices(patches, grids, rank, size) for rank in range(size)]
    counts = {len(share.grids) for share in shares}
    assert counts == {max(1, -(-num_slices // size))}  # the same on every rank: the gather needs it
    assert all(int(share.grids.prod(-1).sum()) == len(share.patches) for share in shares)
    together, encoded = torch.cat([share.grids for share in shares]), torch.cat([share.patches for share in shares])
    assert torch.equal(together[:num_slices], grids) and (together[num_slices:] == 1).all()
    assert torch.equal(encoded[:rows], patches) and not encoded[rows:].any()
    assert encoded.dtype == torch.uint8


def test_visual_tokens_replace_their_placeholders_and_nothing_else() -> None:
    embeddings = torch.arange(12.0).reshape(6, 1, 2)
    visual = -torch.arange(1.0, 9).reshape(4, 2)
    slots, rows = torch.tensor([4, 1, 2]), torch.tensor([0, 3, 1])
    out = splice(embeddings, visual, slots, rows, 0)
    assert torch.equal(out[slots, 0], visual[rows])
    text = torch.tensor([0, 3, 5])
    assert torch.equal(out[text], embeddings[text])


@pytest.mark.parametrize("size", [2, 3, 6])
def test_the_parts_of_a_sequence_parallel_stream_make_the_whole(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    embeddings, visual = torch.randn(12, 1, 4, generator=generator), torch.randn(8, 4, generator=generator)
    slots, rows = torch.tensor([9, 2, 3, 4, 5]), torch.tensor([7, 0, 5, 1, 2])  # whole ranks without a slot
    length = 12 // size
    parts = [splice(part, visual, slots, rows, rank * length) for rank, part in enumerate(embeddings.chunk(size))]
    assert torch.equal(torch.cat(parts), splice(embeddings, visual, slots, rows, 0))


def test_gradients_reach_each_used_row_once_and_no_placeholder() -> None:
    embeddings, visual = torch.zeros(6, 1, 2, requires_grad=True), torch.zeros(4, 2, requires_grad=True)
    splice(embeddings, visual, torch.tensor([1, 4]), torch.tensor([3, 0]), 0).sum().backward()
    assert embeddings.grad is not None and visual.grad is not None
    assert embeddings.grad[:, 0, 0].tolist() == [1, 0, 1, 1, 0, 1]
    assert visual.grad[:, 0].tolist() == [1, 0, 0, 1]


def test_without_slots_the_stream_is_unchanged_but_still_connected_to_the_images() -> None:
    embeddings, visual = torch.randn(4, 1, 2), torch.randn(3, 2, requires_grad=True)
    empty = torch.empty(0, dtype=torch.int64)
    out = splice(embeddings, visual, empty, empty, 0)
    assert torch.equal(out, embeddings)
    out.sum().backward()  # every rank runs the backward pass of the tower, and so its collectives
    assert visual.grad is not None and not visual.grad.any()


def test_visual_tokens_take_the_streams_dtype() -> None:
    out = splice(torch.zeros(2, 1, 2, dtype=torch.bfloat16), torch.ones(1, 2), torch.tensor([1]), torch.tensor([0]), 0)
    assert out.dtype == torch.bfloat16 and out[:, 0, 0].tolist() == [0, 1]
