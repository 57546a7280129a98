"""Small random models of other projects on disk, written by transformers, and the experiments that fit them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sicog_mcore import presets
from sicog_mcore.config import DecoderConfig, Experiment, InitConfig, ParallelConfig

VOCAB = 300  # not a multiple of 128: our tables have padding that no file has
BASE = DecoderConfig(
    num_layers=2, hidden=64, num_heads=4, num_kv_heads=2, head_dim=16, ffn=96, vocab_size=VOCAB, rope_base=10_000
)
LLAMA = replace(BASE, qkv_bias=False, norm_eps=1e-5, rope_base=500_000)
DECODERS: Mapping[str, DecoderConfig] = {
    "qwen2": BASE,
    "qwen2_tied": replace(BASE, tie_embeddings=True),
    "qwen3": replace(BASE, qkv_bias=False, qk_norm=True, head_dim=32),
    "llama3": replace(LLAMA, rope_scaling_factor=8.0),
    "smollm2": replace(LLAMA, tie_embeddings=True, rope_base=100_000),
}
TOWER = presets.tiny().model.tower  # 3 layers, of which 2 are used


def experiment_for(name: str, parallel: ParallelConfig | None = None, **init: str) -> Experiment:
    """The tiny preset with one of DECODERS."""
    base = presets.tiny()
    model = replace(base.model, decoder=DECODERS[name])
    return replace(base, model=model, parallel=parallel or ParallelConfig(), init=InitConfig(**init))


def write_decoder(folder: Path, name: str, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
    """A causal language model of transformers with the sizes of one of DECODERS."""
    import transformers

    decoder = DECODERS[name]
    sizes: dict[str, Any] = {
        "hidden_size": decoder.hidden,
        "intermediate_size": decoder.ffn,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "vocab_size": decoder.vocab_size,
        "rms_norm_eps": decoder.norm_eps,
        "tie_word_embeddings": decoder.tie_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(decoder.rope_base)},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if decoder.qk_norm:
        config: Any = transformers.Qwen3Config(**sizes, head_dim=decoder.head_dim)
    elif decoder.qkv_bias:
        config = transformers.Qwen2Config(**sizes)
    else:
        config = transformers.LlamaConfig(**sizes)
        if decoder.rope_scaling_factor != 1:
            config.max_position_embeddings = 131072
            config.rope_parameters = {
                "rope_type": "llama3",
                "rope_theta": float(decoder.rope_base),
                "factor": decoder.rope_scaling_factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
    model = transformers.AutoModelForCausalLM.from_config(config)
    _randomise(model)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def write_clip(folder: Path, whole: bool = False) -> Path:
    """CLIP's vision model, or all of CLIP, whose names have another prefix."""
    import transformers

    sizes = {
        "hidden_size": TOWER.hidden,
        "intermediate_size": TOWER.ffn,
        "num_hidden_layers": TOWER.num_layers,
        "num_attention_heads": TOWER.num_heads,
        "image_size": TOWER.image_px,
        "patch_size": TOWER.patch_px,
    }
    if whole:
        text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        ids = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        model: Any = transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text | ids, vision_config=sizes, projection_dim=16)
        )
    else:
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes))
    _randomise(model)
    model.save_pretrained(folder)
    return folder


def write_released(folder: Path, clip: Path, decoder: Path, width: int, queries: int, nested: bool = True) -> Path:
    """A checkpoint in the layout of released SICOG weights, from a CLIP, a decoder and a random resampler."""
    inner = "vision_tower." if nested else ""
    weights = load_file(decoder / "model.safetensors")
    for name, tensor in load_file(clip / "model.safetensors").items():
        weights[f"model.vision_tower.{inner}vision_model.{name}"] = tensor
    weights |= {f"model.mm_projector.{name}": tensor for name, tensor in random_resampler(width, queries).items()}
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    config = (decoder / "config.json").read_text().replace('"qwen2"', '"llava_qwen"')
    (folder / "config.json").write_text(config)
    return folder


def random_resampler(width: int, queries: int) -> dict[str, torch.Tensor]:
    """Weights of a released resampler behind TOWER."""
    generator = torch.Generator().manual_seed(5)
    shapes = {
        "query": (queries, width),
        "pos_embed": (queries, width),
        "proj": (width, width),
        "kv_proj.weight": (width, TOWER.hidden),
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        **{f"{norm}.{kind}": (width,) for norm in ("ln_q", "ln_kv", "ln_post") for kind in ("weight", "bias")},
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _randomise(model: torch.nn.Module) -> None:
    """No weight keeps a value, like the ones of a norm, that a mistake could leave as it is."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.1 * torch.randn(parameter.shape, generator=generator))
