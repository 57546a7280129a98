"""FLOPs against numbers from an independent derivation (CLIP-L/14-336, 144 queries, Qwen2-7B)."""

from __future__ import annotations

import pytest
import torch

from sicog_mcore.config import ModelPart, TrainConfig
from sicog_mcore.data.batch import PackedBatch
from sicog_mcore.data.plan import PackPlan
from sicog_mcore.presets import uhd_qwen2_7b
from sicog_mcore.train.flops import (
    CONVENTION,
    WorkCounts,
    decoder_forward,
    pack_cost,
    peak_tflops,
    resampler_forward,
    step_flops,
    tower_forward,
)

MODEL = uhd_qwen2_7b().model
FULL_SLICE = WorkCounts(slices=1, patches=576, squared_patches=577**2)


def sample(slices: int, patches: int, prompt: int, answer: int) -> WorkCounts:
    """Slices of equal size; 144 visual tokens each, and a separator between two slices."""
    tokens = slices * 144 + max(0, slices - 1) + prompt + answer
    return WorkCounts(
        samples=1,
        tokens=tokens,
        squared_tokens=tokens**2,
        supervised_tokens=answer,
        images=int(slices > 0),
        slices=slices,
        patches=slices * patches,
        squared_patches=slices * (patches + 1) ** 2,
    )


ALIGN = sample(slices=1, patches=560, prompt=30, answer=20)
RECAPTION = sample(slices=5, patches=545, prompt=40, answer=200)
TEXT = sample(slices=0, patches=0, prompt=100, answer=300)


@pytest.mark.parametrize("freeze", [(), ("tower",), ("tower", "decoder")])
def test_the_cost_of_a_pack_is_the_flops_of_its_samples_without_the_head(freeze: tuple[ModelPart, ...]) -> None:
    samples = [sample(slices=3, patches=576, prompt=40, answer=0), sample(slices=0, patches=0, prompt=700, answer=0)]
    counts = samples[0] + samples[1]
    plan = PackPlan(0, 0, 0, (0, 1), counts.tokens, counts.slices, counts.squared_tokens)
    assert pack_cost(MODEL, freeze).of(plan) == step_flops(MODEL, freeze, counts)


def test_tower_forward_of_a_full_slice_is_366_gigaflop() -> None:
    forward = tower_forward(MODEL.tower, FULL_SLICE)
    assert forward.linear + forward.attention == 366_033_858_560


def test_resampler_forward_of_a_full_slice_is_41_gigaflop() -> None:
    forward = resampler_forward(MODEL.resampler, MODEL.tower, MODEL.decoder.hidden, FULL_SLICE)
    assert forward.linear + forward.attention == 41_314_516_992


def test_decoder_forward_of_7b() -> None:
    assert decoder_forward(MODEL.decoder, WorkCounts(tokens=1)).linear == 13_050_576_896
    assert decoder_forward(MODEL.decoder, WorkCounts(supervised_tokens=1)).linear == 1_089_994_752
    assert decoder_forward(MODEL.decoder, WorkCounts(squared_tokens=4096**2)).attention == 3_367_254_360_064


@pytest.mark.parametrize(
    ("counts", "freeze", "expected"),
    [
        (RECAPTION, (), 44_719_822_823_424),
        (RECAPTION, ("tower",), 41_272_086_503_424),
        (RECAPTION, ("tower", "decoder"), 28_473_331_425_280),
        (ALIGN, (), 8_869_736_189_952),
        (ALIGN, ("tower", "decoder"), 5_606_047_920_128),
        (TEXT, (), 16_738_025_472_000),
        (TEXT, ("decoder",), 11_190_796_288_000),
    ],
)
def test_step_flops_of_every_stage(counts: WorkCounts, freeze: tuple[ModelPart, ...], expected: int) -> None:
    assert step_flops(MODEL, freeze, counts) == expected


def test_resampler_frozen_behind_a_trained_tower_still_passes_the_gradient() -> None:
    forward = resampler_forward(MODEL.resampler, MODEL.tower, MODEL.decoder.hidden, RECAPTION)
    assert step_flops(MODEL, (), RECAPTION) - step_flops(MODEL, ("resampler",), RECAPTION) == forward.linear


def test_frozen_parts_before_a_trained_decoder_run_forward_only() -> None:
    tower = tower_forward(MODEL.tower, RECAPTION)
    resampler = resampler_forward(MODEL.resampler, MODEL.tower, MODEL.decoder.hidden, RECAPTION)
    saved = 2 * (tower.linear + tower.attention + resampler.linear + resampler.attention)
    assert step_flops(MODEL, (), RECAPTION) - step_flops(MODEL, ("tower", "resampler"), RECAPTION) == saved


def test_flops_of_a_sum_are_the_sum_of_flops() -> None:
    assert step_flops(MODEL, (), ALIGN + TEXT) == step_flops(MODEL, (), ALIGN) + step_flops(MODEL, (), TEXT)


def test_counts_of_a_batch_leave_out_the_padded_tail() -> None:
    batch = PackedBatch(
        tokens=torch.zeros(16, dtype=torch.long),
        labels=torch.tensor([-100] * 7 + [5, 6, 7] + [-100] * 6),
        positions=torch.zeros(16, dtype=torch.long),
        cu_seqlens=torch.tensor([0, 4, 10, 16], dtype=torch.int32),
        patches=torch.zeros(10, 588, dtype=torch.uint8),
        grids=torch.tensor([[2, 3], [2, 2]]),
        image_slots=torch.arange(2),
        visual_rows=torch.arange(2),
        group_sizes=torch.tensor([1, 1]),
        num_tokens=10,
        num_images=1,
        max_seqlen=6,
        sample_ids=("a", "b"),
    )
    assert WorkCounts.of(batch) == WorkCounts(
        samples=2,
        positions=16,
        tokens=10,
        squared_tokens=4**2 + 6**2,
        supervised_tokens=3,
        images=1,
        slices=2,
        patches=10,
        squared_patches=7**2 + 5**2,
    )


@pytest.mark.parametrize(
    ("device", "config", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", TrainConfig(), 312.0),
        ("NVIDIA H100 80GB HBM3", TrainConfig(), 989.4),
        ("NVIDIA H200", TrainConfig(), 989.4),
        ("NVIDIA H100 PCIe", TrainConfig(), None),
        ("cpu", TrainConfig(), None),
        ("NVIDIA H200", TrainConfig(precision="fp32"), None),
        ("cpu", TrainConfig(precision="fp32", peak_tflops=0.2), 0.2),
    ],
)
def test_peak_is_the_configured_one_or_the_known_one(device: str, config: TrainConfig, expected: float | None) -> None:
    assert peak_tflops(device, config) == expected


def test_convention_says_what_is_counted() -> None:
    assert CONVENTION == (
        "model FLOPs: tower + resampler + decoder + head on supervised positions; recompute not counted; 1 MAC = 2 FLOP"
    )
