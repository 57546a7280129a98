"""The exported configuration: defaults, both halves from dictionaries, and what is derived from them."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[hf]'")

from sicog_mcore.hf.configuration_sicog import SicogConfig

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2}
TEXT = {"model_type": "llama", "hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64}


def test_dictionaries_become_the_configurations_that_they_name() -> None:
    config = SicogConfig(vision_config=dict(VISION), text_config=dict(TEXT))
    assert type(config.vision_config).__name__ == "CLIPVisionConfig" and config.vision_config.hidden_size == 32
    assert type(config.text_config).__name__ == "LlamaConfig" and config.text_config.hidden_size == 48
    assert type(SicogConfig().text_config).__name__ == "Qwen2Config"


@pytest.mark.parametrize(("layer", "used"), [(-1, 6), (-2, 5), (-7, 0)])
def test_layers_behind_the_used_hidden_state_do_not_exist(layer: int, used: int) -> None:
    assert SicogConfig(vision_config=dict(VISION), vision_feature_layer=layer).vision_layers_used == used


@pytest.mark.parametrize("tied", [True, False])
def test_the_decoder_decides_whether_embeddings_are_tied(tied: bool) -> None:
    config = SicogConfig(text_config=TEXT | {"tie_word_embeddings": tied}, tie_word_embeddings=not tied)
    assert config.tie_word_embeddings is tied


def test_what_is_written_is_read_back() -> None:
    config = SicogConfig(dict(VISION), dict(TEXT), vision_feature_layer=-3, query_grid=8, resampler_heads=4)
    again = SicogConfig(**config.to_dict())
    assert (again.query_grid, again.resampler_heads, again.vision_layers_used) == (8, 4, 4)
    assert again.vision_config.to_dict() == config.vision_config.to_dict()
    assert again.text_config.to_dict() == config.text_config.to_dict()
