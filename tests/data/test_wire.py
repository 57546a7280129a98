"""A batch goes through its two buffers unchanged, and every field of it travels or is known to stay."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sicog_mcore.data.batch import SCALARS, TENSORS, PackedBatch, Wire
from sicog_mcore.data.wire import most_words, num_pixel_bytes, pack, pixels_of, unpack, with_pixels, without_pixels

TOKENS, SLICES, PATCH_DIM = 40, 6, 12
STAY = {"sample_ids"}  # the rank that loads keeps the record of what was consumed


def random_tensor(wire: Wire, length: int, generator: torch.Generator) -> torch.Tensor:
    """Any bits of that type: also NaN, infinities and negative zero."""
    shape = (length, PATCH_DIM if wire.dtype == torch.uint8 else 2)[: wire.ndim]
    raw = torch.randint(0, 256, (*shape, wire.dtype.itemsize), dtype=torch.uint8, generator=generator)
    return raw.view(wire.dtype).view(shape)


@st.composite
def batches(draw: st.DrawFn) -> PackedBatch:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    most = {"tokens": TOKENS + 1, "slices": SLICES}
    values: dict[str, Any] = {
        name: random_tensor(wire, draw(st.integers(0, most[wire.most])), generator) for name, wire in TENSORS.items()
    }
    values |= {name: draw(st.integers(0, 2**40)) for name in SCALARS}
    return PackedBatch(**values, sample_ids=("a",))


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def content(batch: PackedBatch) -> dict[str, Any]:
    return {name: bits(getattr(batch, name)) for name in TENSORS} | {name: getattr(batch, name) for name in SCALARS}


@settings(deadline=None)
@given(batches())
def test_a_batch_comes_out_of_its_buffers_as_it_went_in(batch: PackedBatch) -> None:
    words = torch.full((most_words(TOKENS, SLICES),), -1)
    pack(batch, words)
    pixels = pixels_of(batch)
    assert pixels.dtype == torch.uint8 and len(pixels) == num_pixel_bytes(batch) == batch.patches.numel()
    announced = unpack(words)
    assert num_pixel_bytes(announced) == len(pixels) and announced.patches.is_meta and announced.sample_ids == ()
    assert content(with_pixels(announced, pixels)) == content(batch)
    behind = without_pixels(announced)
    assert content(behind) == content(replace(batch, patches=batch.patches[:0]))


def test_every_field_travels_or_is_known_to_stay() -> None:
    assert {*TENSORS, *SCALARS} | STAY == {f.name for f in fields(PackedBatch)}
    assert not {*TENSORS, *SCALARS} & STAY
    assert {name for name, wire in TENSORS.items() if wire.needed_by == "first stage"} == {
        name for name, wire in TENSORS.items() if wire.dtype == torch.uint8
    }


def test_a_batch_over_the_budgets_is_refused() -> None:
    batch = PackedBatch(
        **{
            name: random_tensor(wire, {"tokens": TOKENS + 1, "slices": SLICES}[wire.most], torch.Generator())
            for name, wire in TENSORS.items()
        },
        **dict.fromkeys(SCALARS, 1),  # type: ignore[arg-type]  # numbers
        sample_ids=("a",),
    )
    pack(batch, torch.empty(most_words(TOKENS, SLICES), dtype=torch.int64))
    too_many = replace(batch, tokens=torch.zeros(TOKENS + 2, dtype=torch.int64))
    most = most_words(TOKENS, SLICES)
    with pytest.raises(ValueError, match=f"'a'.* needs {most + 1} words, expected at most {most}; make it within"):
        pack(too_many, torch.empty(most_words(TOKENS, SLICES), dtype=torch.int64))


def test_the_buffer_of_a_full_batch_is_small() -> None:
    assert most_words(8192, 32) * 8 < 600_000  # bytes
