"""Defines the configuration of an exported model: CLIP's, the decoder's, and the values that join them.

In: config.json   Out: SicogConfig   Next: modeling_sicog.py
The files of this folder are copied into every exported model, so they need transformers and nothing of this project.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, CLIPVisionConfig, PretrainedConfig


class SicogConfig(PretrainedConfig):
    """The configuration of a model in the style of LLaVA-UHD v1: CLIP on slices, a window resampler, a language model.

    Args:
        vision_config: CLIP's; ``num_hidden_layers`` counts the layers of the source checkpoint.
        text_config: of the decoder, e.g. Qwen2Config.
        vision_feature_layer: hidden state of CLIP that is used; layers behind it do not exist here.
        query_grid: queries per side of a slice.
        resampler_heads: attention heads of the resampler.
        resampler_norm_eps: epsilon of its layer norms.
    """

    model_type = "sicog_uhd"
    sub_configs = {"vision_config": CLIPVisionConfig, "text_config": AutoConfig}

    def __init__(
        self,
        vision_config: CLIPVisionConfig | dict[str, Any] | None = None,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        vision_feature_layer: int = -2,
        query_grid: int = 12,
        resampler_heads: int = 28,
        resampler_norm_eps: float = 1e-6,
        **kwargs: Any,
    ):
        self.vision_config: Any = vision_config
        self.text_config: Any = text_config
        if not isinstance(vision_config, PretrainedConfig):
            self.vision_config = CLIPVisionConfig(**(vision_config or {}))
        if not isinstance(text_config, PretrainedConfig):
            values = {"model_type": "qwen2", **(text_config or {})}
            self.text_config = AutoConfig.for_model(values.pop("model_type"), **values)
        self.vision_feature_layer = vision_feature_layer
        self.query_grid = query_grid
        self.resampler_heads = resampler_heads
        self.resampler_norm_eps = resampler_norm_eps
        # The head belongs to the language model, and so does the decision to tie it to the table.
        super().__init__(**{**kwargs, "tie_word_embeddings": self.text_config.tie_word_embeddings})

    @property
    def vision_layers_used(self) -> int:
        """Counts CLIP's layers up to the hidden state that is used."""
        return self.vision_config.num_hidden_layers + 1 + self.vision_feature_layer
