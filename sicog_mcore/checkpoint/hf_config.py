"""Compares config.json of Hugging Face models with our sizes, field by field; an export writes what an import expects.

Shapes do not show the number of heads, the base of the rotary frequencies or an epsilon: a wrong one gives a model that
loads without an error and answers nonsense. So config.json, where there is one, must agree with the configuration.
Next: weights.py
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from types import MappingProxyType
from typing import Any

from sicog_mcore.checkpoint.hf_keys import ABSENT, DROPOUT, NESTED, PACKED, Scope, fate
from sicog_mcore.config import PATCH_CHANNELS, DecoderConfig, ModelConfig, ModelPart, ResamplerConfig, TowerConfig
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
RESAMPLER_FIELDS = (
    ("query_grid", "query_grid"),
    ("resampler_heads", "num_heads"),
    ("resampler_norm_eps", "norm_eps"),
)
# What the classes of transformers take for a field that config.json leaves out.
_DECODER_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        **{"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
        **{"intermediate_size": 22016, "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    }
)
CLASS_DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "qwen2": MappingProxyType({**_DECODER_DEFAULTS, "use_sliding_window": False}),
        "qwen3": MappingProxyType({**_DECODER_DEFAULTS, "use_sliding_window": False, "head_dim": 128}),
        "llama": MappingProxyType({**_DECODER_DEFAULTS, "intermediate_size": 11008, "vocab_size": 32000}),
        "clip": MappingProxyType(
            {
                **{"image_size": 224, "patch_size": 32, "num_hidden_layers": 12, "hidden_size": 768},
                **{"num_attention_heads": 12, "intermediate_size": 3072, "layer_norm_eps": 1e-5},
            }
        ),
    }
)
CONFIG = "config.json"
MODEL_TYPE = "sicog_uhd"  # of whole models as this project exports them
# Megatron has these numbers of Llama 3.1 built in; only the factor can be chosen.
LLAMA3_SCALING: Mapping[str, float] = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONTEXT, SCALED_CONTEXT = 32768, 131072  # tokens; nothing here depends on it, transformers wants a number


def decoder_config(decoder: DecoderConfig, dtype: str) -> dict[str, Any]:
    """Returns config.json of a decoder, in the form that transformers 4 and 5 read.

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
    """Returns config.json of CLIP's vision model, all layers of the source counted."""
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        **{theirs: vars(tower)[ours] for theirs, ours in TOWER_FIELDS},
        "hidden_act": "quick_gelu",
        "torch_dtype": dtype,
    }


@dataclass(frozen=True)
class ConfigVerdict:
    """The verdict on a configuration beside weights.

    Attributes:
        problems: why the weights would compute something else: found, expected, remedy.
        notes: lines for the user: what is not used, and what cannot be compared.
    """

    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __add__(self, other: ConfigVerdict) -> ConfigVerdict:
        return ConfigVerdict(self.problems + other.problems, self.notes + other.notes)


def judge(config: Mapping[str, Any], part: ModelPart, kinds: Mapping[str, str], model: ModelConfig) -> ConfigVerdict:
    """Compares config.json with our configuration of a part, key by key, nested configurations included.

    Args:
        config: of the folder; empty if it has none.
        kinds: for each ``model_type`` that computes the same as our part, the class whose defaults hold for it.
    """
    if not config:
        return ConfigVerdict(
            notes=(f"no {CONFIG} beside {part}: only names and shapes are compared, no heads, base or epsilon",)
        )
    top = ConfigVerdict(
        problems=tuple(_packed(config, "")), notes=tuple(_unknown(config, "", _top_scopes(config, part)))
    )
    if part == "resampler":
        return top + ConfigVerdict(tuple(_resampler(config, model)))
    name, own = nested(config, part)
    if own is None:
        return top + ConfigVerdict((f"{name}: expected one object with the sizes of the {part}",))
    prefix = f"{name}." if name else ""
    # Without a model_type the family's first kind holds: names of tensors have chosen the family already.
    kind = str(own.get("model_type", "")) or next(iter(kinds))
    if kind not in kinds:
        known = ", ".join(kinds)
        return top + ConfigVerdict((f"{prefix}model_type is {kind!r}; only {known} compute the same as our {part}",))
    inner = (
        ConfigVerdict(problems=tuple(_packed(own, prefix)), notes=tuple(_unknown(own, prefix, (part,))))
        if name
        else ConfigVerdict()
    )
    found = _with_defaults(own, kinds[kind])
    compared = _decoder(own, found, model.decoder) if part == "decoder" else _tower(own, found, model.tower)
    around = _absent(config, "", model.decoder) if name else ()
    problems = (*inner.problems, *(prefix + line for line in compared), *_absent(own, prefix, model.decoder), *around)
    notes = [
        *inner.notes,
        *_dropout(own, prefix),
        *_code(config, own, prefix, kinds[kind] if part == "decoder" else ""),
    ]
    return top + ConfigVerdict(problems, (*notes, *(_around(config, part, model) if name else ())))


def judge_kinds(
    config: Mapping[str, Any], kinds: Mapping[ModelPart, Mapping[str, str]], parts: Collection[ModelPart]
) -> ConfigVerdict:
    """Judges config.json without a model of ours: kinds, packed weights, keys that nobody knows.

    Args:
        parts: that the weights hold.
    """
    verdict = ConfigVerdict(problems=tuple(_packed(config, "")))
    for part in parts if config else ():
        verdict += ConfigVerdict(notes=tuple(_unknown(config, "", _top_scopes(config, part))))
        if part == "resampler":
            continue
        name, own = nested(config, part)
        kind = str((own or {}).get("model_type", ""))
        if own is None or (kind and kind not in kinds[part]):
            verdict += ConfigVerdict(
                (f"{name or CONFIG} has model_type {kind!r}; expected {', '.join(kinds[part])} for {part}",)
            )
        elif name:
            verdict += ConfigVerdict(tuple(_packed(own, f"{name}.")), tuple(_unknown(own, f"{name}.", (part,))))
    return ConfigVerdict(tuple(dict.fromkeys(verdict.problems)), tuple(dict.fromkeys(verdict.notes)))


def nested(config: Mapping[str, Any], part: ModelPart) -> tuple[str, Mapping[str, Any] | None]:
    """Finds the configuration of a part inside that of a whole model, and its dotted name.

    Where none is nested, the whole configuration is returned with an empty name. None stands for a part that cannot be told:
    several objects claim to be it, or the value under its name is no object.
    """
    names = NESTED["decoder" if part == "decoder" else "tower"]
    if part == "tower" and str(config.get("model_type", "")).endswith("vision_model"):
        return "", config
    here = [name for name in names if isinstance(config.get(name), dict)]
    if not here:
        # An object that nobody knows may be the one: its sizes tell.
        here = [name for name, value in config.items() if name.isidentifier() and _has_sizes(value, part)]
    if len(here) > 1:
        return " and ".join(here), None
    if not here and (odd := [name for name in names if config.get(name) is not None]):
        return odd[0], None
    if not here:
        return "", config if part == "decoder" else {}
    (name,) = here
    value = config[name]
    if part == "tower" and isinstance(config.get("vision_config_dict"), dict):
        value = {**value, **config["vision_config_dict"]}  # as transformers joins them
    deeper, inner = nested(value, part) if part == "decoder" else ("", value)
    return (f"{name}.{deeper}" if deeper else name), inner


def _has_sizes(value: object, part: ModelPart) -> bool:
    return (
        isinstance(value, dict)
        and ("vocab_size" if part == "decoder" else "patch_size") in value
        and "num_hidden_layers" in value
    )


def _top_scopes(config: Mapping[str, Any], part: ModelPart) -> tuple[Scope, ...]:
    """Returns the kinds of keys that stand side by side at the top."""
    is_flat = part != "resampler" and nested(config, part)[1] is config
    scopes: tuple[Scope, ...] = ("decoder", "top") if part == "decoder" else ("tower", "top")
    if not is_flat:
        return ("top",)
    return scopes


def _unknown(config: Mapping[str, Any], prefix: str, scopes: Sequence[Scope]) -> Iterator[str]:
    for key, value in config.items():
        if value is not None and fate(key, scopes[0], scopes[1:]) == "unknown":
            if isinstance(value, dict) and ("num_hidden_layers" in value or "model_type" in value):
                continue  # a configuration of its own: of this part, or of another one
            yield f"{CONFIG}: {prefix + key!r} = {brief(value)} is unknown here and not used"


def _packed(config: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key in sorted(PACKED & config.keys()):
        if config[key]:
            method = config[key].get("quant_method") if isinstance(config[key], dict) else None
            yield f"{prefix}{key} is {brief(method or config[key])}: packed weights; use the release that is not quantised"


def _absent(config: Mapping[str, Any], prefix: str, decoder: DecoderConfig) -> Iterator[str]:
    """Finds layers, scales and masks that none of our parts has."""
    for key in sorted(ABSENT.keys() & config.keys()):
        value = config[key]
        if value and value not in ABSENT[key] and not (key == "use_qk_norm" and decoder.qk_norm):
            yield f"{prefix}{key} is {brief(value)}: our model has nothing like it and cannot run these weights"


def _dropout(config: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key in sorted(DROPOUT & config.keys()):
        if config[key]:
            yield f"{CONFIG}: {prefix}{key} is {brief(config[key])}: a run drops nothing"


def _code(config: Mapping[str, Any], own: Mapping[str, Any], prefix: str, kind: str) -> Iterator[str]:
    """Reads the names of classes: they may mean another model around the decoder, or code of its own."""
    if config.get("auto_map") and config.get("model_type") != MODEL_TYPE:
        yield f"{CONFIG}: auto_map names code of its own, which is never run"
    classes = own.get("architectures") if kind else None
    for name in classes if isinstance(classes, list) else ():
        if str(name).lower() not in (f"{kind}forcausallm", f"{kind}model") and not str(name).startswith("Llava"):
            yield f"{CONFIG}: {prefix}architectures names {name!r}; it is read as a causal {kind} decoder"


def _around(config: Mapping[str, Any], part: ModelPart, model: ModelConfig) -> Iterator[str]:
    """Compares fields of a whole model around the nested configuration of a part."""
    tied = config.get("tie_word_embeddings")
    if part == "decoder" and tied is not None and bool(tied) != model.decoder.tie_embeddings:
        yield f"{CONFIG}: tie_word_embeddings is {tied!r} for the whole model; model.decoder.tie_embeddings counts"
    layer = config.get("vision_feature_layer")
    if part == "tower" and layer is not None and layer != model.tower.feature_layer:
        yield f"{CONFIG}: vision_feature_layer is {brief(layer)}, model.tower.feature_layer is {model.tower.feature_layer}"


def _resampler(config: Mapping[str, Any], model: ModelConfig) -> Iterator[str]:
    yield from _compare(config, model.resampler, RESAMPLER_FIELDS, "model.resampler")
    for name in ("vision_feature_layer", "mm_vision_select_layer"):
        if config.get(name) is not None and config[name] != model.tower.feature_layer:
            yield (
                f"{name} is {brief(config[name])}, model.tower.feature_layer is {model.tower.feature_layer}: set "
                f"model.tower.feature_layer={brief(config[name])}"
            )
    for name, ours in (("vision_feature_select_strategy", "default"), ("mm_vision_select_feature", "patch")):
        if config.get(name, ours) != ours:
            yield f"{name} is {brief(config[name])}, expected {ours!r}: our resampler sees patches only"


def _with_defaults(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Returns the values that transformers computes with: the default of the class where config.json has none."""
    found = {**CLASS_DEFAULTS[kind], **{key: value for key, value in config.items() if value is not None}}
    heads = found.get("num_attention_heads")
    # As in transformers: null means one key/value head for each query head; for Llama, so does a missing field.
    if kind == "llama" or ("num_key_value_heads" in config and config["num_key_value_heads"] is None):
        found["num_key_value_heads"] = config.get("num_key_value_heads") or heads
    if found.get("head_dim") is None and isinstance(heads, int) and heads and isinstance(found.get("hidden_size"), int):
        found["head_dim"] = found["hidden_size"] // heads
    return found


def _decoder(named: Mapping[str, Any], found: dict[str, Any], decoder: DecoderConfig) -> Iterator[str]:
    scalings = {name: named[name] for name in ("rope_scaling", "rope_parameters") if named.get(name)}
    for name, scaling in scalings.items():
        if not isinstance(scaling, dict) or any(isinstance(value, dict) for value in scaling.values()):
            yield f"{name} is {brief(scaling)}, expected one object for all layers: our decoder has one rotary table"
            return
    # Files of transformers 5 hold the base inside the object; a file with both places must agree with ours in both.
    theta = scalings.get("rope_parameters", {}).get("rope_theta")  # from transformers 5 on
    if theta is not None and "rope_theta" not in named:
        found["rope_theta"] = theta
    yield from _compare(found, decoder, DECODER_FIELDS, "model.decoder", named)
    if theta is not None and theta != decoder.rope_base and "rope_theta" in named:
        yield f"rope_parameters.rope_theta is {brief(theta)}, model.decoder.rope_base is {decoder.rope_base}"
    for name in ("hidden_act", "hidden_activation"):
        if found.get(name, "silu") not in ("silu", "swish"):
            yield f"{name} is {found[name]!r}, our decoder has 'silu': it cannot run these weights"
    for name in ("attention_bias", "mlp_bias"):
        if found.get(name):
            yield f"{name} is {brief(found[name])}: our decoder has no such biases (model.decoder.qkv_bias is Qwen2's)"
    yield from _attention(found, decoder)
    if not scalings:
        scalings = {"rope_scaling": {}}
    for name, scaling in scalings.items():
        yield from _rope(name, scaling, found, decoder)


def _attention(found: Mapping[str, Any], decoder: DecoderConfig) -> Iterator[str]:
    everything = "our decoder attends to everything before a token"
    if found.get("use_sliding_window"):
        yield f"use_sliding_window is true: {everything}"
    elif found.get("sliding_window") is not None and "use_sliding_window" not in found:
        yield f"sliding_window is {brief(found['sliding_window'])}: {everything}"
    kinds = found.get("layer_types") or ()
    if not isinstance(kinds, list | tuple):
        yield f"layer_types is {brief(kinds)}, expected a list"
    elif other := sorted({str(kind) for kind in kinds if kind != "full_attention"}):
        yield f"layer_types names {', '.join(map(repr, other))}: {everything}"
    scale = found.get("query_pre_attn_scalar")
    if scale is not None and scale != decoder.head_dim:
        yield f"query_pre_attn_scalar is {brief(scale)}: our decoder scales by model.decoder.head_dim={decoder.head_dim}"
    factor = found.get("attention_multiplier")
    if factor is not None and factor != decoder.head_dim**-0.5:
        yield f"attention_multiplier is {brief(factor)}: our decoder multiplies by {decoder.head_dim**-0.5:g}"


def _rope(name: str, scaling: Mapping[str, Any], found: Mapping[str, Any], decoder: DecoderConfig) -> Iterator[str]:
    # Two names of one key: older files of transformers have ``type``.
    kinds = [scaling[key] for key in ("rope_type", "type") if scaling.get(key) is not None]
    for kind in kinds:
        if kind not in ("default", "llama3"):
            yield f"rope_type is {kind!r}; only 'default' and 'llama3' are supported"
            return
    is_llama3 = bool(kinds) and kinds[0] == "llama3"
    factor = scaling.get("factor", 1.0)
    if isinstance(factor, bool) or not isinstance(factor, int | float):
        yield f"{name}.factor is {brief(factor)}, expected a number"
        return
    if not is_llama3 and factor != 1:
        yield f"{name} has a factor of {factor} and no kind; only 'llama3' has a factor here"
    expected = float(factor) if is_llama3 else 1.0
    if expected != decoder.rope_scaling_factor:
        yield (
            f"the rope scaling factor is {expected}, found {decoder.rope_scaling_factor} here: "
            f"set model.decoder.rope_scaling_factor={expected}"
        )
    for key, fixed in LLAMA3_SCALING.items() if is_llama3 else ():
        given = scaling.get(key, found.get(key, fixed))
        if given != fixed:
            yield f"{key} of the rope scaling is {brief(given)}; only {fixed} is supported"
    if scaling.get("partial_rotary_factor", 1) not in (1, None):
        yield f"{name}.partial_rotary_factor is {brief(scaling['partial_rotary_factor'])}: our decoder turns whole heads"
    known = {"rope_type", "type", "rope_theta", "factor", "partial_rotary_factor", *LLAMA3_SCALING}
    for key in sorted(key for key, value in scaling.items() if key not in known and value is not None):
        yield f"{name}.{key} is {brief(scaling[key])}: unknown here, so the angles may be others"


def _tower(named: Mapping[str, Any], found: Mapping[str, Any], tower: TowerConfig) -> Iterator[str]:
    if not named:
        return  # of released weights, whose config.json has no tower in it
    yield from _compare(found, tower, TOWER_FIELDS, "model.tower", named)
    if found.get("hidden_act", "quick_gelu") != "quick_gelu":
        yield f"hidden_act is {found['hidden_act']!r}, our tower has 'quick_gelu': it cannot run these weights"
    if found.get("num_channels", PATCH_CHANNELS) != PATCH_CHANNELS:
        yield f"num_channels is {brief(found['num_channels'])}, our tower takes {PATCH_CHANNELS}"


def _compare(
    config: Mapping[str, Any],
    ours: DecoderConfig | TowerConfig | ResamplerConfig,
    fields: tuple[tuple[str, str], ...],
    path: str,
    named: Mapping[str, Any] | None = None,
) -> Iterator[str]:
    """Yields one line for each field that differs.

    Args:
        named: the values that stand in config.json; all others in ``config`` are defaults.
    """
    for theirs, name in fields:
        found, here = config.get(theirs), vars(ours)[name]
        if found is not None and found != here:
            is_number = type(found) is int or (isinstance(found, float) and isfinite(found))
            value = (
                type(here)(found) if is_number or isinstance(found, bool) else brief(found)
            )  # 1e6 for a whole number
            value = found if value != found and is_number else value  # not what rounds to ours
            left_out = "" if named is None or named.get(theirs) is not None else f" (not in {CONFIG}: the default)"
            yield f"{theirs} is {value}{left_out}, {path}.{name} is {here}: set {path}.{name}={value}"


def brief(value: object, most: int = 80) -> str:
    """Shows a foreign value in a message, escaped and cut."""
    shown = repr(value)
    return shown if len(shown) <= most else f"{shown[:most]}..."


def _scaling(decoder: DecoderConfig) -> dict[str, Any]:
    return {"rope_type": "llama3", "factor": decoder.rope_scaling_factor, **LLAMA3_SCALING}
