"""Every key of config.json is compared, known to be irrelevant, or named; what would compute something else is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from sicog_mcore import presets
from sicog_mcore.checkpoint.hf_config import (
    MODEL_TYPE,
    ConfigVerdict,
    decoder_config,
    judge,
    judge_kinds,
    nested,
    tower_config,
)
from sicog_mcore.checkpoint.hf_folder import model_config
from sicog_mcore.checkpoint.hf_keys import NESTED, OTHER_PARTS, fate, reason
from sicog_mcore.checkpoint.tables import DECODER_CLASSES, RELEASED_CLASSES
from sicog_mcore.checkpoint.tables import TOWERS as TOWER_CLASSES
from sicog_mcore.config import ModelConfig, ModelPart
from tests.checkpoint.configurations import (
    BASE,
    CLIP_L_336,
    DECODERS,
    LLAMA_3_1,
    LLAVA_1_5,
    QWEN2_7B,
    QWEN3,
    QWEN3_0_6B,
    TOWERS,
    VICUNA,
    model_for,
)

QWEN = model_for(presets.QWEN2_7B)
LLAMA = model_for(presets.LLAMA3_1_8B)


def judged(config: dict[str, Any], model: ModelConfig = QWEN, part: ModelPart = "decoder") -> ConfigVerdict:
    return judge(config, part, TOWER_CLASSES if part == "tower" else DECODER_CLASSES, model)


def keys_of_part(config: Mapping[str, Any], part: ModelPart) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Every key that an import of a part has to know: at the top and in its own configuration; with its scopes."""
    name, own = nested(config, part)
    for key, value in config.items():
        yield key, value, ("top",) if name else (part, "top")
    for key, value in (own or {}).items() if name else ():
        yield key, value, (part,)


def assert_every_key_is_settled(config: Mapping[str, Any], part: ModelPart, verdict: ConfigVerdict) -> None:
    said = "\n".join((*verdict.problems, *verdict.notes))
    refused_kind = any("model_type is" in problem for problem in verdict.problems)
    for key, value, scopes in keys_of_part(config, part):
        found = fate(key, scopes[0], scopes[1:])
        known = found != "unknown" or value is None or isinstance(value, dict)
        assert known or repr(key) in said or refused_kind, f"{key} = {value!r} is silent"


@pytest.mark.parametrize("name", DECODERS)
def test_every_key_of_a_known_decoder_is_settled(name: str) -> None:
    config, decoder, problems, notes = DECODERS[name]
    verdict = judged(config, model_for(decoder))
    assert len(verdict.problems) == len(problems) and len(verdict.notes) == len(notes), verdict
    assert all(expected in found for expected, found in zip(problems, verdict.problems, strict=True))
    assert all(expected in found for expected, found in zip(notes, verdict.notes, strict=True))
    assert_every_key_is_settled(config, "decoder", verdict)


@pytest.mark.parametrize("name", TOWERS)
def test_every_key_of_a_known_tower_is_settled(name: str) -> None:
    config, problems = TOWERS[name]
    verdict = judged(config, part="tower")
    assert len(verdict.problems) == len(problems), verdict
    assert all(expected in found for expected, found in zip(problems, verdict.problems, strict=True))
    assert_every_key_is_settled(config, "tower", verdict)
    assert problems or not verdict.notes, verdict.notes


def test_a_key_is_known_for_one_reason_only_where_it_does_not_matter() -> None:
    assert (
        fate("rope_theta", "decoder")
        == fate("quantization_config", "top")
        == fate("logit_scale", "decoder")
        == "compared"
    )
    assert fate("initializer_range", "decoder") == fate("image_token_index", "top") == "irrelevant"
    assert fate("do_sample", "generation") == fate("crop_size", "preprocessor") == "irrelevant"
    assert fate("rope_theta_2", "decoder") == fate("projection_dim", "decoder") == "unknown"
    assert reason("projection_dim", "tower") == "the visual projection is not used"
    assert reason("rope_theta", "decoder") == ""


def test_an_unknown_key_is_named_with_its_value_escaped_and_cut() -> None:
    verdict = judged({**QWEN2_7B, "fancy\x1b[31m": "x\x1b[0m", "long": "y" * 500, "nothing": None})
    assert verdict.problems == ()
    assert verdict.notes[0] == "config.json: 'fancy\\x1b[31m' = 'x\\x1b[0m' is unknown here and not used"
    assert len(verdict.notes) == 2 and len(verdict.notes[1]) < 160


REFUSED = {
    "linear rope": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
    "dynamic rope": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4}}, "rope_type is 'yarn'"),
    "mrope": ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "rope_type is 'mrope'"),
    "sections": ({"rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, "rope_scaling.mrope_section is [1]"),
    "factor without kind": ({"rope_scaling": {"factor": 2.0}}, "factor of 2.0 and no kind"),
    "factor is no number": (
        {"rope_scaling": {"rope_type": "llama3", "factor": "8"}},
        "factor is '8', expected a number",
    ),
    "one table per kind of layer": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
        "expected one object for all layers",
    ),
    "part of a head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "part of a head, new": (
        {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.25}},
        "partial_rotary_factor is 0.25",
    ),
    "theta inside": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_theta": None},
        "rope_parameters.rope_theta is 10000.0",
    ),
    "sliding window": ({"use_sliding_window": True}, "use_sliding_window is true"),
    "some layers slide": ({"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention'"),
    "biases": ({"attention_bias": True}, "attention_bias is True"),
    "biases of the mlp": ({"mlp_bias": True}, "mlp_bias is True"),
    "activation": ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act is 'gelu_pytorch_tanh'"),
    "other activation": ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
    "epsilon": ({"rms_norm_eps": 1e-5}, "set model.decoder.norm_eps=1e-05"),
    "head_dim": ({"head_dim": 64}, "set model.decoder.head_dim=64"),
    "soft capping": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    "soft capping of attention": ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    "scale of queries": ({"query_pre_attn_scalar": 256}, "query_pre_attn_scalar is 256"),
    "Granite's embeddings": ({"embedding_multiplier": 12.0}, "embedding_multiplier is 12.0"),
    "Granite's residuals": ({"residual_multiplier": 0.22}, "residual_multiplier is 0.22"),
    "Granite's attention": ({"attention_multiplier": 0.0078125}, "attention_multiplier is 0.0078125"),
    "scaled logits": ({"logit_scale": 0.0625}, "logit_scale is 0.0625"),
    "experts": ({"num_experts": 64}, "num_experts is 64"),
    "AWQ": (
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        "quantization_config is 'awq': packed weights",
    ),
    "FP8": ({"compression_config": {"format": "float-quantized"}}, "compression_config is"),
    "no number": ({"rope_theta": "1000000"}, "rope_theta is '1000000'"),
    "a number of layers": ({"layer_types": 28}, "layer_types is 28, expected a list"),
    "a number beyond all": ({"num_hidden_layers": 10**400}, "num_hidden_layers is 1000"),
    "not even a number": ({"rms_norm_eps": [1e-6]}, "rms_norm_eps is [1e-06]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_our_decoder_would_compute_otherwise_is_refused(name: str) -> None:
    changes, expected = REFUSED[name]
    assert any(expected in problem for problem in judged({**QWEN2_7B, **changes}).problems)


@pytest.mark.parametrize("place", ["text_config", "llm_config", "language_config", "llm", "nobodys_config"])
def test_a_nested_decoder_is_compared_as_one_at_the_top(place: str) -> None:
    good = {"model_type": "some_vlm", place: QWEN2_7B}
    assert judged(good).problems == ()
    bad = {"model_type": "some_vlm", place: {**QWEN2_7B, "rope_theta": 1e4, "num_attention_heads": 32}}
    lines = judged(bad).problems
    assert any(line.startswith(f"{place}.rope_theta is 10000,") for line in lines)
    assert any(line.startswith(f"{place}.num_attention_heads is 32,") for line in lines)


def test_a_decoder_two_levels_down_is_found() -> None:
    config = {"model_type": "qwen2_5_omni", "thinker_config": {"text_config": {**QWEN2_7B, "rope_theta": 1e4}}}
    (problem,) = judged(config).problems
    assert problem.startswith("thinker_config.text_config.rope_theta is 10000,")


def test_two_nested_decoders_or_none_are_refused() -> None:
    (problem,) = judged({"model_type": "x", "text_config": QWEN2_7B, "llm_config": QWEN2_7B}).problems
    assert "text_config and llm_config" in problem
    (problem,) = judged({"model_type": "x"}).problems
    assert "model_type is 'x'; only qwen2, qwen3, llama" in problem
    (problem,) = judged({"model_type": "x", "text_config": "Qwen/Qwen2-7B"}).problems
    assert problem.startswith("text_config: expected one object")


def test_what_config_json_leaves_out_is_the_default_of_the_class() -> None:
    bare = {key: value for key, value in QWEN2_7B.items() if key not in ("rope_theta", "rms_norm_eps")}
    (problem,) = judged(bare).problems
    assert problem.startswith(
        "rope_theta is 10000 (not in config.json: the default), model.decoder.rope_base is 1000000"
    )
    without = {key: value for key, value in QWEN3.items() if key != "head_dim"}
    assert judged(without, model_for(QWEN3_0_6B)).problems == ()  # 128, not hidden_size / num_attention_heads
    many = {key: value for key, value in LLAMA_3_1.items() if key != "num_key_value_heads"}
    assert any("num_key_value_heads is 32" in problem for problem in judged(many, LLAMA).problems)
    sparse = {**LLAVA_1_5, "text_config": {"model_type": "llama", "vocab_size": 32064}}
    assert judged(sparse, model_for(VICUNA)).problems == (
        "text_config.rms_norm_eps is 1e-06 (not in config.json: the default), model.decoder.norm_eps is 1e-05: "
        "set model.decoder.norm_eps=1e-06",
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"low_freq_factor": 2.0},
        {"high_freq_factor": 8.0},
        {"original_max_position_embeddings": 4096},
        {"factor": 32.0},
        {"attention_factor": 0.5},
    ],
)
def test_other_numbers_of_llama_3_scaling_are_refused(changes: dict[str, float]) -> None:
    scaling = LLAMA_3_1["rope_scaling"] | changes
    assert len(judged({**LLAMA_3_1, "rope_scaling": scaling}, LLAMA).problems) == 1


def test_values_that_turn_a_layer_off_are_accepted() -> None:
    off = {"final_logit_softcapping": None, "num_experts": 0, "residual_multiplier": 1.0, "use_qk_norm": False}
    off |= {"query_pre_attn_scalar": 128, "partial_rotary_factor": 1.0, "rope_scaling": {"rope_type": "default"}}
    assert judged({**QWEN2_7B, **off, "layer_types": ["full_attention"] * 28}) == ConfigVerdict()


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"layer_norm_eps": 1e-6}, "set model.tower.norm_eps=1e-06"),
        ({"image_size": 224}, "set model.tower.image_px=224"),
        ({"patch_size": 16}, "set model.tower.patch_px=16"),
        ({"num_attention_heads": 8}, "set model.tower.num_heads=8"),
        ({"num_channels": 4}, "num_channels is 4"),
        ({"model_type": "siglip_vision_model"}, "model_type is 'siglip_vision_model'"),
        ({"quantization_config": {"bits": 8}}, "packed weights"),
    ],
)
def test_another_tower_is_refused_nested_or_not(changes: dict[str, Any], expected: str) -> None:
    vision = {**CLIP_L_336["vision_config"], **changes}
    assert any(
        expected in problem for problem in judged({**CLIP_L_336, "vision_config": vision}, part="tower").problems
    )
    assert any(expected in problem for problem in judged({**LLAVA_1_5, "vision_config": vision}, part="tower").problems)


def test_the_second_table_of_old_clip_files_counts_as_in_transformers() -> None:
    verdict = judged({**CLIP_L_336, "vision_config_dict": {"hidden_act": "gelu"}}, part="tower")
    assert any("hidden_act is 'gelu'" in problem for problem in verdict.problems)


def test_a_tower_without_sizes_has_those_of_its_class() -> None:
    (first, *_) = judged({"model_type": "clip_vision_model"}, part="tower").problems
    assert first.startswith("image_size is 224 (not in config.json: the default)")


def test_a_resampler_is_compared_where_its_numbers_are_named() -> None:
    ours = model_config(QWEN, "bfloat16")
    assert judged(ours, part="resampler") == ConfigVerdict()
    for changes, expected in (
        ({"resampler_heads": 32}, "set model.resampler.num_heads=32"),
        ({"query_grid": 8}, "set model.resampler.query_grid=8"),
        ({"resampler_norm_eps": 1e-5}, "set model.resampler.norm_eps=1e-05"),
        ({"vision_feature_layer": -1}, "set model.tower.feature_layer=-1"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
    ):
        assert any(expected in problem for problem in judged({**ours, **changes}, part="resampler").problems)


def test_chance_and_foreign_heads_are_said() -> None:
    verdict = judged({**QWEN2_7B, "attention_dropout": 0.1, "architectures": ["Qwen2ForSequenceClassification"]})
    assert verdict.problems == () and len(verdict.notes) == 2
    assert "attention_dropout is 0.1: a run drops nothing" in verdict.notes[0]
    assert "'Qwen2ForSequenceClassification'" in verdict.notes[1]


def test_without_config_json_the_user_is_told_what_is_not_compared() -> None:
    (note,) = judged({}).notes
    assert "no config.json" in note and "no heads, base or epsilon" in note


def test_released_weights_are_judged_by_the_class_inside_their_kind() -> None:
    flat = {**QWEN2_7B, "model_type": "llava_qwen", "architectures": ["LlavaQwenForCausalLM"], "mm_hidden_size": 1024}
    assert judge(flat, "decoder", RELEASED_CLASSES, QWEN) == ConfigVerdict()
    (problem,) = judge({**flat, "model_type": "llava_mistral"}, "decoder", RELEASED_CLASSES, QWEN).problems
    assert "model_type is 'llava_mistral'" in problem


@pytest.mark.parametrize("decoder", [presets.QWEN2_7B, presets.LLAMA3_1_8B, presets.SMOLLM2_135M, QWEN3_0_6B])
def test_what_an_export_writes_is_read_without_a_word(decoder: Any) -> None:
    model = model_for(decoder)
    ids = {"eos_token_id": [1, 2], "pad_token_id": 2}
    assert judged(decoder_config(decoder, "bfloat16") | ids, model) == ConfigVerdict()
    assert judged(tower_config(model.tower, "float32"), model, "tower") == ConfigVerdict()
    whole = model_config(model, "bfloat16") | ids
    assert whole["model_type"] == MODEL_TYPE
    for part in ("tower", "resampler", "decoder"):
        assert judged(whole, model, part) == ConfigVerdict()  # type: ignore[arg-type]
    assert judged(whole, replace(model, tower=replace(model.tower, feature_layer=-3)), "resampler").problems


def test_kinds_are_judged_without_a_model_too() -> None:
    kinds: Any = {"decoder": DECODER_CLASSES, "tower": TOWER_CLASSES}
    config, *_ = DECODERS["PaliGemma"]
    lines = judge_kinds(config, kinds, ["tower", "decoder"]).problems
    assert len(lines) == 2 and "'siglip_vision_model'" in lines[0] and "'gemma'" in lines[1]
    assert judge_kinds(LLAVA_1_5, kinds, ["tower", "decoder"]) == ConfigVerdict()


@pytest.mark.slow
def test_every_key_that_transformers_writes_itself_is_known() -> None:
    """Whatever the version at hand puts into the configurations of the models that we read."""
    import transformers

    for name, part in (("Qwen2", "decoder"), ("Qwen3", "decoder"), ("Llama", "decoder"), ("CLIPVision", "tower")):
        config = getattr(transformers, f"{name}Config")().to_dict()
        assert [key for key in config if fate(key, part, ("top",)) == "unknown"] == []
    for name in ("CLIP", "Llava", "LlavaNext"):
        config = getattr(transformers, f"{name}Config")().to_dict()
        assert [key for key in config if fate(key, "top") == "unknown"] == []
        assert [key for key in config["vision_config"] if fate(key, "tower") == "unknown"] == []
    assert [key for key in transformers.GenerationConfig().to_dict() if fate(key, "generation") == "unknown"] == []
    assert [key for key in BASE if fate(key, "tower") == "unknown"] == []


def test_names_of_nested_configurations_are_of_one_part() -> None:
    assert not {*NESTED["decoder"]} & {*NESTED["tower"]} and not {*NESTED["decoder"], *NESTED["tower"]} & OTHER_PARTS
