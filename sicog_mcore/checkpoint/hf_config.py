"""config.json of Hugging Face models and our sizes, field by field: what an export writes is what an import expects.

Shapes do not show the number of heads, the base of the rotary frequencies or an epsilon: a wrong one gives a model that
loads without an error and answers nonsense. So config.json, where there is one, must agree with the configuration.
Next: weights.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sicog_mcore.config import DecoderConfig, ModelConfig, Part, TowerConfig
from sicog_mcore.errors import CheckpointError

# Their name, our name.
DECODER_FIELDS = (
    ("hidden_size", "hidden"),
    ("num_hidden_layers", "num_layers"),
    ("num_attention_heads", "num_heads"),
    ("num_key_value_heads", "num_kv_heads"),
    ("head_dim", "head_dim"),
    ("intermediate_size", "ffn"),
    ("vocab_size", "vocab_size"),
    ("rms_norm_eps", "norm_eps"),
    ("rope_theta", "rope_base"),
    ("tie_word_embeddings", "tie_embeddings"),
)
TOWER_FIELDS = (
    ("image_size", "image_px"),
    ("patch_size", "patch_px"),
    ("num_hidden_layers", "num_layers"),
    ("hidden_size", "hidden"),
    ("num_attention_heads", "num_heads"),
    ("intermediate_size", "ffn"),
    ("layer_norm_eps", "norm_eps"),
)
# Megatron has these numbers of Llama 3.1 built in; only the factor can be chosen.
LLAMA3_SCALING: Mapping[str, float] = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONTEXT, SCALED_CONTEXT = 32768, 131072  # tokens; nothing here depends on it, transformers wants a number


def decoder_config(decoder: DecoderConfig, dtype: str) -> dict[str, Any]:
    """config.json of a decoder, in the form that transformers 4 and 5 read.

    Raises:
        CheckpointError: no family that transformers knows has such a decoder.
    """
    if decoder.qk_norm and decoder.qkv_bias:
        raise CheckpointError(
            "transformers has no decoder with both model.decoder.qk_norm and model.decoder.qkv_bias; turn one off"
        )
    name = "Qwen3" if decoder.qk_norm else "Qwen2" if decoder.qkv_bias else "Llama"
    scaled = decoder.rope_scaling_factor != 1.0
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": name.lower(),
        **{theirs: vars(decoder)[ours] for theirs, ours in DECODER_FIELDS},
        "rope_scaling": _scaling(decoder) if scaled else None,
        "hidden_act": "silu",
        "attention_bias": False,  # the biases of Qwen2 are part of its code
        "max_position_embeddings": SCALED_CONTEXT if scaled else CONTEXT,
        "torch_dtype": dtype,
    }


def tower_config(tower: TowerConfig, dtype: str) -> dict[str, Any]:
    """config.json of CLIP's vision model, all layers of the source counted."""
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        **{theirs: vars(tower)[ours] for theirs, ours in TOWER_FIELDS},
        "hidden_act": "quick_gelu",
        "torch_dtype": dtype,
    }


def disagreements(config: Mapping[str, Any], part: Part, model: ModelConfig) -> list[str]:
    """Where config.json and our configuration of a part differ: found, expected, remedy.

    Args:
        config: of the family that holds the part; a field it does not name is not judged.
    """
    if part == "decoder":
        return list(_decoder(config.get("text_config", config), model.decoder))
    if part == "tower":
        is_clip = config.get("model_type") == "clip_vision_model"  # else the fields at the top are not the tower's
        return list(_tower(config.get("vision_config", config if is_clip else {}), model.tower))
    return []


def _decoder(config: Mapping[str, Any], decoder: DecoderConfig) -> Iterator[str]:
    rope = config.get("rope_parameters") or {}  # from transformers 5 on
    found = {**config, **({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {})}
    yield from _compare(found, decoder, DECODER_FIELDS, "model.decoder")
    if found.get("hidden_act", "silu") != "silu":
        yield f"hidden_act is {found['hidden_act']!r}, our decoder has 'silu': it cannot run these weights"
    if found.get("use_sliding_window"):
        yield "use_sliding_window is true: our decoder attends to everything before a token"
    scaling = config.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "llama3"):
        yield f"rope_type is {kind!r}; only 'default' and 'llama3' are supported"
        return
    factor = float(scaling.get("factor", 1.0)) if kind == "llama3" else 1.0
    if factor != decoder.rope_scaling_factor:
        yield (
            f"the rope scaling factor is {factor}, found {decoder.rope_scaling_factor} here: "
            f"set model.decoder.rope_scaling_factor={factor}"
        )
    for name, fixed in LLAMA3_SCALING.items() if kind == "llama3" else ():
        if scaling.get(name, fixed) != fixed:
            yield f"{name} of the rope scaling is {scaling[name]}; only {fixed} is supported"


def _tower(config: Mapping[str, Any], tower: TowerConfig) -> Iterator[str]:
    yield from _compare(config, tower, TOWER_FIELDS, "model.tower")
    if config.get("hidden_act", "quick_gelu") != "quick_gelu":
        yield f"hidden_act is {config['hidden_act']!r}, our tower has 'quick_gelu': it cannot run these weights"


def _compare(
    config: Mapping[str, Any], ours: DecoderConfig | TowerConfig, fields: tuple[tuple[str, str], ...], path: str
) -> Iterator[str]:
    for theirs, name in fields:
        found, here = config.get(theirs), vars(ours)[name]
        if found is not None and found != here:
            value = type(here)(found) if isinstance(found, int | float) else found  # 1e6 for a whole number of ours
            yield f"{theirs} is {value}, {path}.{name} is {here}: set {path}.{name}={value}"


def _scaling(decoder: DecoderConfig) -> dict[str, Any]:
    return {"rope_type": "llama3", "factor": decoder.rope_scaling_factor, **LLAMA3_SCALING}
