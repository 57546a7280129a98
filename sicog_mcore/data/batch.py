"""PackedBatch: the only thing the model accepts.

In: EncodedSample (encode.py), grouped by packing.py   Out: PackedBatch   Next: parallel/distribute.py, model/vlm.py
Shapes use the project's legend (see sicog_mcore/__init__.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

IGNORED_LABEL = -100


@dataclass(frozen=True)
class EncodedSample:
    """One sample as numbers: text, labels, and the uint8 patch rows of its slices.

    Attributes:
        tokens: int64 [s]; placeholders of visual tokens hold the tokenizer's padding id.
        labels: int64 [s]; ``labels[i]`` is the token that position i must predict (already shifted), or -100.
        patches: uint8 [p, 3 * patch_px**2]; each row is one patch, channel-major (c, y, x).
        grids: int64 [k, 2]; (height, width) of each slice in patches; slices in the order of SlicePlan.encoded.
        image_slots: int64 [m]; positions in ``tokens`` that a visual token replaces.
        visual_rows: int64 [m]; which row of the resampler's output [k * q] goes into each slot.
        pair_lengths: of a preference pair, the tokens of the chosen and of the rejected conversation, which stand one after
            the other in ``tokens`` and show the same slices; empty for all other samples.
    """

    id: str
    tokens: Tensor
    labels: Tensor
    patches: Tensor
    grids: Tensor
    image_slots: Tensor
    visual_rows: Tensor
    num_images: int
    pair_lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class PackedBatch:
    """Several samples in one token stream of fixed length, with the slices they need.

    Attributes:
        tokens: int64 [t]; the tail after the last sample is padding.
        labels: int64 [t]; the token each position must predict, or -100.
        positions: int64 [t]; restart at 0 for every sample.
        cu_seqlens: int32 [n + 1]; borders of the samples (of both conversations of a pair), then of the padded tail in
            pieces no longer than the longest of them.
        patches: uint8 [p, 3 * patch_px**2] of all slices, one packed sequence.
        grids: int64 [k, 2] slice sizes (height, width) in patches; sum of products = p. Always on the CPU: they decide
            shapes, and reading them from a device would stall it.
        image_slots: int64 [m] positions in ``tokens`` taken by visual tokens.
        visual_rows: int64 [m] rows of the resampler's output [k * q, h] that go there.
        num_tokens: positions that belong to samples (t minus padding).
        num_pairs: preference pairs; pair i is the segments 2i (chosen) and 2i + 1 (rejected), which share their slices.
            Either all samples of a batch are pairs or none is.
        pair_reference: fp64 [2 * num_pairs] log-probabilities of the segments' answers under the reference model; empty
            where there are no pairs, or where a frozen copy of the model is asked instead.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    patches: Tensor
    grids: Tensor
    image_slots: Tensor
    visual_rows: Tensor
    num_tokens: int
    num_images: int
    sample_ids: tuple[str, ...]
    num_pairs: int = 0
    pair_reference: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))

    @property
    def num_slices(self) -> int:
        return self.grids.shape[0]

    @property
    def max_seqlen(self) -> int:
        return int((self.cu_seqlens[1:] - self.cu_seqlens[:-1]).max())

    def validate(self, queries_per_slice: int) -> PackedBatch:
        """Checks what must hold between the fields; raises ValueError that names the samples."""
        t, p = self.tokens.shape[0], self.patches.shape[0]
        checks = {
            "labels and positions have one entry per token": self.labels.shape == self.positions.shape == (t,),
            "cu_seqlens runs from 0 to t, strictly increasing": bool(
                self.cu_seqlens[0] == 0 and self.cu_seqlens[-1] == t and (self.cu_seqlens.diff() > 0).all()
            ),
            "grids cover every patch row": int(self.grids.prod(-1).sum()) == p,
            "every visual token is used once, in a pair by both conversations": self._uses_each_row(
                self.num_slices * queries_per_slice
            ),
            "image slots are distinct and inside the samples": self.image_slots.unique().numel()
            == self.image_slots.numel()
            and (self.image_slots.numel() == 0 or int(self.image_slots.max()) < self.num_tokens),
            "no label predicts a visual token or padding": bool(
                (self.labels[self.num_tokens :] == IGNORED_LABEL).all()
            ),
        }
        broken = [name for name, holds in checks.items() if not holds]
        if broken:
            raise ValueError(f"packed batch of samples {list(self.sample_ids)} is inconsistent: {'; '.join(broken)}")
        return self

    def _uses_each_row(self, num_rows: int) -> bool:
        if self.visual_rows.shape != self.image_slots.shape:
            return False
        users = [self.visual_rows]
        if self.num_pairs:
            segments = torch.searchsorted(self.cu_seqlens.long(), self.image_slots, right=True) - 1  # [m]
            users = [self.visual_rows[segments % 2 == 0], self.visual_rows[segments % 2 == 1]]
        once = torch.arange(num_rows)
        return torch.equal(users[0], users[-1]) and torch.equal(users[0].sort().values, once)

    def _map_tensors(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "grids"}
        changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed)

    def to(self, device: torch.device) -> PackedBatch:
        """Copies every tensor but ``grids`` to ``device``; asynchronous when the batch is pinned."""
        return self._map_tensors(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        """Called by torch's DataLoader (``pin_memory=True``)."""
        return self._map_tensors(lambda x: x.pin_memory())
