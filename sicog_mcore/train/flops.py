"""Model FLOPs of a step, from the configuration and from what the step held.

In: ModelConfig, OptimConfig.freeze, WorkCounts   Out: FLOPs, and the share of the device's peak (MFU)   Next: metrics.py
The convention is CONVENTION, printed with every run. Norms, softmax, activations and the optimiser are not counted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields

from sicog_mcore.config import DecoderConfig, ModelConfig, ModelPart, ResamplerConfig, TowerConfig, TrainConfig
from sicog_mcore.data.batch import IGNORED_LABEL, PackedBatch
from sicog_mcore.data.deal import PackCost

CONVENTION = (
    "model FLOPs: tower + resampler + decoder + head on supervised positions; recompute not counted; 1 MAC = 2 FLOP"
)
WINDOW_SAMPLES = 9  # keys of a query: 3 x 3 is the middle of the 6 to 12 that a window's shape can ask for

PEAK_BF16_TFLOPS: Mapping[str, float] = {"A100": 312.0, "H100": 989.4, "H200": 989.4}  # dense; SXM modules
SLOWER_VARIANTS = ("H100 PCIe", "H100 NVL", "H200 NVL")


@dataclass(frozen=True)
class WorkCounts:
    """Counts of the work that went through the model; they add up over micro-batches and over data-parallel ranks.

    Attributes:
        positions: length of all packed sequences, padding included.
        tokens: positions that belong to samples, visual tokens included, padding not.
        squared_tokens: sum over samples of the squared length.
        supervised_tokens: positions with a label.
        patches: patch rows of all slices.
        squared_patches: sum over slices of (patches + 1)**2; the 1 is the tower's class token.
    """

    samples: int = 0
    positions: int = 0
    tokens: int = 0
    squared_tokens: int = 0
    supervised_tokens: int = 0
    images: int = 0
    slices: int = 0
    patches: int = 0
    squared_patches: int = 0

    @classmethod
    def of(cls, batch: PackedBatch) -> WorkCounts:
        """Counts of one packed batch; reads its tensors, so call it before they move to a device."""
        samples = len(batch.sample_ids)
        borders = batch.cu_seqlens.long()
        lengths = borders.diff()[borders[:-1] < batch.num_tokens]  # [n], without the padded tail
        patches = batch.grids.long().prod(-1)  # [k]
        return cls(
            samples=samples,
            positions=batch.tokens.shape[0],
            tokens=batch.num_tokens,
            squared_tokens=int(lengths.square().sum()),
            supervised_tokens=int((batch.labels != IGNORED_LABEL).sum()),
            images=batch.num_images,
            slices=batch.num_slices,
            patches=int(patches.sum()),
            squared_patches=int((patches + 1).square().sum()),
        )

    def __add__(self, other: WorkCounts) -> WorkCounts:
        return WorkCounts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Forward:
    """Forward FLOPs of a part: products with weights, and products of activations with each other (core attention)."""

    linear: int
    attention: int


def tower_forward(config: TowerConfig, counts: WorkCounts) -> Forward:
    """Patch embedding and the layers that are used; every slice has a class token."""
    tokens = counts.patches + counts.slices
    layer_weights = 4 * config.hidden**2 + 2 * config.hidden * config.ffn
    embedding = 2 * counts.patches * config.patch_dim * config.hidden
    return Forward(
        linear=embedding + config.layers_used * 2 * tokens * layer_weights,
        attention=config.layers_used * 4 * counts.squared_patches * config.hidden,
    )


def resampler_forward(config: ResamplerConfig, tower: TowerConfig, hidden: int, counts: WorkCounts) -> Forward:
    """Keys and values projected for every patch, then sampled into each query's window.

    The projected queries do not depend on the input and are not counted.
    """
    queries = counts.slices * config.queries
    features = 2 * counts.patches * tower.hidden * hidden
    keys_and_values = 2 * 2 * counts.patches * hidden**2
    output = 2 * 2 * queries * hidden**2  # attention output and final projection
    attention = 2 * 2 * queries * WINDOW_SAMPLES * hidden
    sampling = 2 * 2 * 4 * queries * WINDOW_SAMPLES * hidden  # bilinear: four taps per key and value
    return Forward(linear=features + keys_and_values + output, attention=attention + sampling)


def decoder_forward(config: DecoderConfig, counts: WorkCounts) -> Forward:
    """Layers on every position, causal attention inside each sample, the head where there is a label."""
    query_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer_weights = config.hidden * (2 * query_width + 2 * kv_width + 3 * config.ffn)
    head = 2 * counts.supervised_tokens * config.hidden * config.vocab_size
    return Forward(
        linear=config.num_layers * 2 * counts.tokens * layer_weights + head,
        attention=config.num_layers * 2 * counts.squared_tokens * query_width,  # half of the square is masked
    )


def _with_backward(forward: Forward, trained: bool, passes_gradient: bool) -> int:
    """Forward and backward FLOPs of a part.

    A trained product costs three forwards. A frozen one that must pass a gradient on costs two; core attention has no
    weights, so its backward pass is always whole. A frozen part with nothing trained before it runs forward only.
    """
    if trained:
        return 3 * (forward.linear + forward.attention)
    if passes_gradient:
        return 2 * forward.linear + 3 * forward.attention
    return forward.linear + forward.attention


def step_flops(config: ModelConfig, freeze: Collection[ModelPart], counts: WorkCounts) -> int:
    """Model FLOPs of a step over everything that ``counts`` holds."""
    tower, resampler, decoder = (part not in freeze for part in ("tower", "resampler", "decoder"))
    hidden = config.decoder.hidden
    return (
        _with_backward(tower_forward(config.tower, counts), tower, passes_gradient=False)
        + _with_backward(resampler_forward(config.resampler, config.tower, hidden, counts), resampler, tower)
        + _with_backward(decoder_forward(config.decoder, counts), decoder, tower or resampler)
    )


def pack_cost(config: ModelConfig, freeze: Collection[ModelPart]) -> PackCost:
    """Gives the FLOPs that tokens, attention and slices of a pack cost in this model; replicas get equal sums of them.

    A slice counts as a full one, and the head, whose positions are not known before the texts are read, not at all.
    """
    patches = (config.tower.image_px // config.tower.patch_px) ** 2
    slice_counts = WorkCounts(slices=1, patches=patches, squared_patches=(patches + 1) ** 2)
    return PackCost(
        token=step_flops(config, freeze, WorkCounts(tokens=1)),
        attention=step_flops(config, freeze, WorkCounts(squared_tokens=1)),
        slice=step_flops(config, freeze, slice_counts),
    )


def peak_tflops(device_name: str, config: TrainConfig) -> float | None:
    """Dense peak of one device (TFLOP/s): the configured one, or the known one in bf16; None if neither is there."""
    if config.peak_tflops > 0:
        return config.peak_tflops
    if config.precision != "bf16" or any(variant in device_name for variant in SLOWER_VARIANTS):
        return None
    return next((peak for name, peak in PEAK_BF16_TFLOPS.items() if name in device_name), None)
