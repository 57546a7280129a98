"""PackedBatch: the only thing the model accepts.

In: EncodedSample (encode.py), grouped by packing.py   Out: PackedBatch   Next: wire.py, parallel/distribute.py, model/vlm.py
Shapes use the project's legend (see sicog_mcore/__init__.py).

A sample is a group: some slices, and one or more answer segments that all show these slices. A segment is one whole
conversation with its own labels and a weight; the segments of a group differ in their last answer only. A row of
supervised fine-tuning is a group of one segment, a preference pair is a group of two (first the chosen answer), and the
candidates of a prompt are a group of as many as there are. The tower encodes the slices of a group once, whatever the
number of its segments, because every segment's image slots name the same rows of the resampler's output. Nothing between
the encoder and the loss asks what kind of group it is; an objective that needs groups of one size refuses all others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

IGNORED_LABEL = -100
WIRE = "wire"  # in the metadata of a field of PackedBatch


class Segment(NamedTuple):
    """One answer segment: its length in tokens, and the weight of its loss."""

    length: int
    weight: float = 1.0


@dataclass(frozen=True)
class EncodedSample:
    """One sample as numbers: text, labels, and the uint8 patch rows of its slices.

    Attributes:
        tokens: int64 [s] of all segments, one after the other; placeholders of visual tokens hold the padding id.
        labels: int64 [s]; ``labels[i]`` is the token that position i must predict (already shifted), or -100.
        patches: uint8 [p, 3 * patch_px**2]; each row is one patch, channel-major (c, y, x).
        grids: int64 [k, 2]; (height, width) of each slice in patches; slices in the order of SlicePlan.encoded.
        image_slots: int64 [m]; positions in ``tokens`` that a visual token replaces.
        visual_rows: int64 [m]; which row of the resampler's output [k * q] goes into each slot.
        segments: where the segments end, and their weights; () stands for one segment of weight 1 over all tokens.
    """

    id: str
    tokens: Tensor
    labels: Tensor
    patches: Tensor
    grids: Tensor
    image_slots: Tensor
    visual_rows: Tensor
    num_images: int
    segments: tuple[Segment, ...] = ()

    def __post_init__(self) -> None:
        """Writes the one segment out, so that every sample has segments.

        Raises:
            ValueError: the segments do not cover the tokens.
        """
        if not self.segments:
            object.__setattr__(self, "segments", (Segment(len(self.tokens)),))
        covered = sum(segment.length for segment in self.segments)
        if covered != len(self.tokens):
            raise ValueError(
                f"sample {self.id!r} has segments of {covered} tokens, expected {len(self.tokens)}, all of its tokens"
            )


class Wire(NamedTuple):
    """How a tensor of a batch travels to the other ranks of its replica (wire.py).

    Attributes:
        dtype: of the tensor.
        most: what bounds its length: "tokens" (the token budget and one more) or "slices" (the slice budget).
        ndim: number of dimensions; a second one has two columns, or, in patches, the width of a patch.
        needed_by: all ranks, or those of the first pipeline stage, which alone encode images.
        on_host: the tensor stays in host memory, because its values decide shapes and reading a device would stall it.
    """

    dtype: torch.dtype
    most: Literal["tokens", "slices"] = "tokens"
    ndim: int = 1
    needed_by: Literal["all", "first stage"] = "all"
    on_host: bool = False


SCALAR: Mapping[str, str] = {WIRE: "scalar"}  # of a whole number, which travels in the header


def _wire(*args: Any, **kwargs: Any) -> Mapping[str, Wire]:
    return {WIRE: Wire(*args, **kwargs)}


INT64, INT32, FP64 = torch.int64, torch.int32, torch.float64


@dataclass(frozen=True)
class PackedBatch:
    """Several samples in one token stream of fixed length, with the slices they need.

    The metadata of a field say how it travels; a field without them stays on the rank that loads.

    Attributes:
        tokens: int64 [t]; the tail after the last sample is padding.
        labels: int64 [t]; the token each position must predict, or -100.
        positions: int64 [t]; restart at 0 for every segment.
        cu_seqlens: int32 [n + 1]; borders of the segments, then of the padded tail in pieces no longer than the longest
            segment.
        patches: uint8 [p, 3 * patch_px**2] of all slices, one packed sequence.
        grids: int64 [k, 2] slice sizes (height, width) in patches; sum of products = p. Always on the CPU.
        image_slots: int64 [m] positions in ``tokens`` taken by visual tokens.
        visual_rows: int64 [m] rows of the resampler's output [k * q, h] that go there.
        group_sizes: int64 [g] answer segments of each sample, in the order of the segments. Always on the CPU.
        num_tokens: positions that belong to samples (t minus padding).
        max_seqlen: length of the longest segment, or piece of the tail.
        segment_weights: fp64 [segments]; empty where all are 1, so that a host knows it without asking a device.
        segment_reference: fp64 [segments] log-probabilities of the segments' answers under a reference model; empty where
            nothing has a reference, or where a frozen copy of the model is asked instead.
    """

    tokens: Tensor = field(metadata=_wire(INT64))
    labels: Tensor = field(metadata=_wire(INT64))
    positions: Tensor = field(metadata=_wire(INT64))
    cu_seqlens: Tensor = field(metadata=_wire(INT32))
    patches: Tensor = field(metadata=_wire(torch.uint8, "slices", 2, "first stage"))
    grids: Tensor = field(metadata=_wire(INT64, "slices", 2, on_host=True))
    image_slots: Tensor = field(metadata=_wire(INT64))
    visual_rows: Tensor = field(metadata=_wire(INT64))
    group_sizes: Tensor = field(metadata=_wire(INT64, on_host=True))
    num_tokens: int = field(metadata=SCALAR)
    num_images: int = field(metadata=SCALAR)
    max_seqlen: int = field(metadata=SCALAR)
    sample_ids: tuple[str, ...]
    segment_weights: Tensor = field(metadata=_wire(FP64), default_factory=lambda: torch.empty(0, dtype=FP64))
    segment_reference: Tensor = field(metadata=_wire(FP64), default_factory=lambda: torch.empty(0, dtype=FP64))

    @property
    def num_slices(self) -> int:
        return self.grids.shape[0]

    @property
    def num_segments(self) -> int:
        """Answer segments of all samples; the first ones of ``cu_seqlens``."""
        return int(self.group_sizes.sum())

    @property
    def is_weighted(self) -> bool:
        """Whether a segment has another weight than 1."""
        return self.segment_weights.shape[0] > 0

    def validate(self, queries_per_slice: int) -> PackedBatch:
        """Checks what must hold between the fields; raises ValueError that names the samples."""
        t, p, segments = self.tokens.shape[0], self.patches.shape[0], self.num_segments
        lengths = self.cu_seqlens.diff()
        checks = {
            "labels and positions have one entry per token": self.labels.shape == self.positions.shape == (t,),
            "cu_seqlens runs from 0 to t, strictly increasing, by max_seqlen at most": bool(
                self.cu_seqlens[0] == 0
                and self.cu_seqlens[-1] == t
                and (lengths > 0).all()
                and lengths.max() == self.max_seqlen
            ),
            "the groups have at least one segment each, and cover the samples": bool(
                (self.group_sizes > 0).all()
                and segments < len(self.cu_seqlens)
                and self.cu_seqlens[segments] == self.num_tokens
            ),
            "weights and references are finite, one per segment or none": all(
                len(values) in (0, segments) and bool(values.isfinite().all())
                for values in (self.segment_weights, self.segment_reference)
            ),
            "grids cover every patch row": int(self.grids.prod(-1).sum()) == p,
            "every segment of a group uses each visual token of its slices once": self._uses_each_row(
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
        """Whether the first segments of all groups share the rows out, and all others repeat their group's first."""
        if self.visual_rows.shape != self.image_slots.shape:
            return False
        owner = torch.searchsorted(self.cu_seqlens.long(), self.image_slots, right=True) - 1  # [m]
        if owner.numel() and not 0 <= int(owner.min()) <= int(owner.max()) < self.num_segments:
            return False
        # Slots ordered by segment; those of a segment's group stand from ``begins[first]`` on, where the group's first
        # segment has its own.
        rows, owner = self.visual_rows[owner.argsort(stable=True)], owner.sort(stable=True).values
        first = torch.repeat_interleave(self.group_sizes.cumsum(0) - self.group_sizes, self.group_sizes)  # [segments]
        counts = torch.bincount(owner, minlength=self.num_segments)  # [segments]
        if not torch.equal(counts, counts[first]):
            return False
        begins = counts.cumsum(0) - counts
        models = rows[torch.arange(len(rows)) - begins[owner] + begins[first[owner]]]
        own = rows[first[owner] == owner]
        return torch.equal(rows, models) and torch.equal(own.sort().values, torch.arange(num_rows))

    def _map_tensors(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        changed: dict[str, Any] = {n: change(getattr(self, n)) for n, wire in TENSORS.items() if not wire.on_host}
        return replace(self, **changed)

    def to(self, device: torch.device) -> PackedBatch:
        """Copies every tensor but those of the host to ``device``; asynchronous when the batch is pinned."""
        return self._map_tensors(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        """Called by torch's DataLoader (``pin_memory=True``)."""
        return self._map_tensors(lambda x: x.pin_memory())


TENSORS: Mapping[str, Wire] = {
    f.name: f.metadata[WIRE] for f in fields(PackedBatch) if isinstance(f.metadata.get(WIRE), Wire)
}
SCALARS: tuple[str, ...] = tuple(f.name for f in fields(PackedBatch) if f.metadata == SCALAR)
