"""Named sizes. A preset is a function that returns a whole Experiment; a variant calls its parent and replaces fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from sicog_mcore.config import (
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    Experiment,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ResamplerConfig,
    SlicingConfig,
    TowerConfig,
    TrainConfig,
)

QWEN2_0_5B = DecoderConfig(
    num_layers=24,
    hidden=896,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    ffn=4864,
    vocab_size=151936,
    tie_embeddings=True,
)
QWEN2_1_5B = DecoderConfig(
    num_layers=28,
    hidden=1536,
    num_heads=12,
    num_kv_heads=2,
    head_dim=128,
    ffn=8960,
    vocab_size=151936,
    tie_embeddings=True,
)
QWEN2_7B = DecoderConfig(
    num_layers=28, hidden=3584, num_heads=28, num_kv_heads=4, head_dim=128, ffn=18944, vocab_size=152064
)
QWEN2_72B = DecoderConfig(
    num_layers=80, hidden=8192, num_heads=64, num_kv_heads=8, head_dim=128, ffn=29568, vocab_size=152064
)
SMOLLM2_135M = DecoderConfig(
    num_layers=30,
    hidden=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    ffn=1536,
    vocab_size=49152,
    rope_base=100_000,
    qkv_bias=False,
    tie_embeddings=True,
    norm_eps=1e-5,
)
LLAMA3_1_8B = DecoderConfig(
    num_layers=32,
    hidden=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    ffn=14336,
    vocab_size=128256,
    rope_base=500_000,
    rope_scaling_factor=8.0,
    qkv_bias=False,
    norm_eps=1e-5,
)


def _uhd(preset: str, decoder: DecoderConfig) -> Experiment:
    """Puts CLIP-ViT-L/14-336 and the 144-query resampler in front of a decoder, with SICOG's settings of stage 1.5."""
    model = ModelConfig(
        slicing=SlicingConfig(),
        tower=TowerConfig(),
        resampler=ResamplerConfig(num_heads=decoder.hidden // 128),
        decoder=decoder,
    )
    return Experiment(preset=preset, model=model, parallel=ParallelConfig(overlap_grad_reduce=True))


def uhd_smollm2_135m() -> Experiment:
    return _uhd("uhd_smollm2_135m", SMOLLM2_135M)


def uhd_qwen2_0_5b() -> Experiment:
    return _uhd("uhd_qwen2_0_5b", QWEN2_0_5B)


def uhd_qwen2_1_5b() -> Experiment:
    return _uhd("uhd_qwen2_1_5b", QWEN2_1_5B)


# One GPU of 80 GB holds no 7B model with its gradients and activations: two share it.
SHARED_BY_TWO = ParallelConfig(tensor=2, sequence=True, overlap_grad_reduce=True)


def uhd_qwen2_7b() -> Experiment:
    return replace(_uhd("uhd_qwen2_7b", QWEN2_7B), parallel=SHARED_BY_TWO)


def uhd_qwen2_72b() -> Experiment:
    return replace(
        _uhd("uhd_qwen2_72b", QWEN2_72B),
        parallel=ParallelConfig(tensor=8, pipeline=4, sequence=True, overlap_grad_reduce=True),
    )


def uhd_llama3_1_8b() -> Experiment:
    base = _uhd("uhd_llama3_1_8b", LLAMA3_1_8B)
    return replace(base, data=replace(base.data, template="llama3"), parallel=SHARED_BY_TWO)


def tiny() -> Experiment:
    """Runs in seconds on a CPU: four decoder layers, slices of at most 112 x 112 px area, 16 queries a slice."""
    model = ModelConfig(
        slicing=SlicingConfig(resolution_px=112),
        tower=TowerConfig(image_px=112, num_layers=3, hidden=64, num_heads=4, ffn=256),
        resampler=ResamplerConfig(query_grid=4, num_heads=4),
        decoder=DecoderConfig(
            num_layers=4, hidden=128, num_heads=4, num_kv_heads=2, head_dim=32, ffn=384, vocab_size=1024
        ),
    )
    return Experiment(
        preset="tiny",
        output="runs/tiny",
        model=model,
        data=DataConfig(token_budget=1024, slice_budget=32, window_samples=128, workers=0),
        optim=OptimConfig(lr=2e-3, min_lr_fraction=0.1, warmup_fraction=0.05),
        train=TrainConfig(steps=60, packs_per_step=4, precision="fp32", recompute_tower="none"),
        checkpoint=CheckpointConfig(every_steps=20),
    )


PRESETS: Mapping[str, Callable[[], Experiment]] = {
    preset.__name__: preset
    for preset in (
        tiny,
        uhd_smollm2_135m,
        uhd_qwen2_0_5b,
        uhd_qwen2_1_5b,
        uhd_qwen2_7b,
        uhd_qwen2_72b,
        uhd_llama3_1_8b,
    )
}
