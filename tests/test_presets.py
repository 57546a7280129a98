"""The presets are the published models: their parameter counts agree with an independent derivation."""

from __future__ import annotations

import pytest

from sicog_mcore.config import ResamplerConfig, SlicingConfig
from sicog_mcore.presets import PRESETS
from sicog_mcore.sizes import (
    decoder_params,
    model_params,
    most_visual_tokens,
    padded_vocab,
    resampler_params,
    tower_params,
)
from sicog_mcore.validation import find_problems

CLIP_L_336 = 303_507_456
RESAMPLER_7B = 68_963_328
DECODERS = {"uhd_qwen2_0_5b": 494_032_768, "uhd_qwen2_7b": 7_615_616_512, "uhd_qwen2_72b": 72_706_203_648}
PUBLISHED_BILLIONS = {"uhd_smollm2_135m": 0.135, "uhd_qwen2_1_5b": 1.54, "uhd_llama3_1_8b": 8.03}


@pytest.mark.parametrize(("name", "params"), DECODERS.items())
def test_qwen2_decoders_have_the_derived_parameter_counts(name: str, params: int) -> None:
    assert decoder_params(PRESETS[name]().model.decoder) == params


@pytest.mark.parametrize(("name", "billions"), PUBLISHED_BILLIONS.items())
def test_other_decoders_have_the_published_size(name: str, billions: float) -> None:
    assert decoder_params(PRESETS[name]().model.decoder) / 1e9 == pytest.approx(billions, abs=0.005)


def test_the_tower_is_clip_l_336_without_its_last_layer_and_norm() -> None:
    tower = PRESETS["uhd_qwen2_7b"]().model.tower
    assert tower_params(tower, all_layers=True) == CLIP_L_336
    assert CLIP_L_336 - tower_params(tower) == 12_596_224 + 2 * 1024


def test_the_resampler_of_the_7b_model_has_the_derived_parameter_count() -> None:
    model = PRESETS["uhd_qwen2_7b"]().model
    assert resampler_params(model.resampler, model.tower.hidden, model.decoder.hidden) == RESAMPLER_7B
    assert model_params(model) == RESAMPLER_7B + DECODERS["uhd_qwen2_7b"] + tower_params(model.tower)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_on_its_own_layout(name: str) -> None:
    experiment = PRESETS[name]()
    assert experiment.preset == name
    assert find_problems(experiment, 2 * experiment.parallel.model_size) == []


@pytest.mark.parametrize("name", PRESETS)
def test_no_preset_needs_a_padded_vocabulary(name: str) -> None:
    decoder = PRESETS[name]().model.decoder
    assert padded_vocab(decoder) == decoder.vocab_size


@pytest.mark.parametrize(("layout", "tokens"), [("stitched", 1237), ("per_slice", 1159)])
def test_most_visual_tokens_is_that_of_seven_slices(layout: str, tokens: int) -> None:
    assert most_visual_tokens(SlicingConfig(layout=layout), ResamplerConfig()) == tokens
    assert most_visual_tokens(SlicingConfig(layout=layout, max_slices=1), ResamplerConfig()) == 144
    assert most_visual_tokens(SlicingConfig(layout=layout, max_slices=10**12), ResamplerConfig()) > 10**12  # at once
