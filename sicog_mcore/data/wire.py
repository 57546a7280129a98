"""A batch as two buffers, one of int64 words and one of bytes, and back.

In: PackedBatch   Out: int64 words (sizes first) and uint8 pixels; the same PackedBatch   Next: parallel/distribute.py
The table of fields is the metadata of PackedBatch: a new field of it travels without a change here. Tensors stand in the
words one after the other by their bit patterns, each from a whole word on, so that unpacking copies nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from sicog_mcore.data.batch import SCALARS, TENSORS, PackedBatch, Wire

WORD = 8  # bytes
NUM_SIZES = sum(wire.ndim for wire in TENSORS.values())
HEADER = (
    len(SCALARS) + NUM_SIZES
)  # words before the first tensor: the numbers of a batch, then the sizes of its tensors
COLUMNS = 2  # of tensors of two dimensions that travel as words


def most_words(token_budget: int, slice_budget: int) -> int:
    """Words that hold any batch within the budgets: what a receiver can know before it knows the batch."""
    bounds = {"tokens": token_budget + 1, "slices": slice_budget}
    return HEADER + sum(
        _num_words((bounds[wire.most], COLUMNS)[: wire.ndim], wire.dtype) for wire in _in_words().values()
    )


def pack(batch: PackedBatch, words: Tensor) -> None:
    """Writes all of a batch in host memory but its pixels into the first words of a buffer.

    Args:
        words: int64 [at least as many as the batch needs], in host memory.

    Raises:
        ValueError: the buffer is too short, so the batch does not keep to the budgets.
    """
    shapes = {name: tuple(getattr(batch, name).shape) for name in TENSORS}
    needed = HEADER + sum(_num_words(shapes[name], wire.dtype) for name, wire in _in_words().items())
    if needed > len(words):
        raise ValueError(
            f"the batch of samples {list(batch.sample_ids)} needs {needed:,} words, expected at most {len(words):,}; "
            "make it within data.token_budget and data.slice_budget"
        )
    scalars = [getattr(batch, name) for name in SCALARS]
    words[:HEADER] = torch.tensor([*scalars, *(size for shape in shapes.values() for size in shape)])
    for name, place in _places(words, shapes):
        place.copy_(getattr(batch, name))


def unpack(words: Tensor) -> PackedBatch:
    """The batch in a buffer, without its sample ids. Its tensors share the buffer's memory.

    Args:
        words: int64, as ``pack`` filled it, in host memory.

    Returns:
        the batch; its pixels are tensors of torch's meta device, which have a shape and no content (``with_pixels``).
    """
    numbers = words[:HEADER].tolist()
    scalars, sizes = dict(zip(SCALARS, numbers, strict=False)), iter(numbers[len(SCALARS) :])
    shapes = {name: tuple(next(sizes) for _ in range(wire.ndim)) for name, wire in TENSORS.items()}
    pixels = {name: torch.empty(shapes[name], dtype=wire.dtype, device="meta") for name, wire in _in_bytes().items()}
    values: dict[str, Any] = {**scalars, **pixels, **dict(_places(words, shapes))}
    return PackedBatch(**values, sample_ids=())


def num_pixel_bytes(batch: PackedBatch) -> int:
    """Length of the buffer of pixels; known from a batch that has none yet."""
    return sum(getattr(batch, name).numel() for name in _in_bytes())


def pixels_of(batch: PackedBatch) -> Tensor:
    """Joins the pixels, which only the first pipeline stage needs, into one buffer: uint8 [bytes]."""
    parts = [getattr(batch, name).reshape(-1) for name in _in_bytes()]
    return parts[0] if len(parts) == 1 else torch.cat(parts)  # joining copies, and pixels are many


def with_pixels(batch: PackedBatch, pixels: Tensor) -> PackedBatch:
    """The batch with the pixels of a buffer, whose memory it shares.

    Args:
        pixels: uint8 [bytes], as ``pixels_of`` gave it, on any device.
    """
    parts = pixels.split([getattr(batch, name).numel() for name in _in_bytes()])
    changed: dict[str, Any] = {
        name: part.view(getattr(batch, name).shape) for name, part in zip(_in_bytes(), parts, strict=True)
    }
    return replace(batch, **changed)


def without_pixels(batch: PackedBatch) -> PackedBatch:
    """The batch as ranks behind the first pipeline stage get it: no patch rows, and nothing on the meta device."""
    shapes = {name: (0, *getattr(batch, name).shape[1:]) for name in _in_bytes()}
    changed: dict[str, Any] = {name: torch.empty(shape, dtype=torch.uint8) for name, shape in shapes.items()}
    return replace(batch, **changed)


def _places(words: Tensor, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Where each tensor stands in the words, as a view of its own type and shape."""
    start = HEADER
    for name, wire in _in_words().items():
        length = _num_words(shapes[name], wire.dtype)
        yield name, words[start : start + length].view(wire.dtype)[: prod(shapes[name])].view(shapes[name])
        start += length


def _num_words(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-prod(shape) * dtype.itemsize // WORD)


def _in_words() -> dict[str, Wire]:
    return {name: wire for name, wire in TENSORS.items() if wire.dtype != torch.uint8}


def _in_bytes() -> dict[str, Wire]:
    return {name: wire for name, wire in TENSORS.items() if wire.dtype == torch.uint8}
