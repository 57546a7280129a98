"""The exported tower against CLIP as transformers has it."""

from __future__ import annotations

import pytest
import torch

LAYERS_USED = {-1: 3, -2: 2}  # of 3
FEATURES = 1e-5  # fp32, relative to the largest feature


@pytest.mark.parametrize("feature_layer", [-1, -2])
@pytest.mark.parametrize("grid", [(8, 8), (5, 12), (12, 4), (1, 3)])
def test_features_equal_clips_for_any_grid(grid: tuple[int, int], feature_layer: int) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[hf]'")
    from sicog_mcore.hf import SicogConfig
    from sicog_mcore.hf.modeling_sicog import CLIP_MEAN, CLIP_STD, SicogVisionModel

    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=64, num_attention_heads=4, intermediate_size=256, num_hidden_layers=3, image_size=112, patch_size=14
    )
    clip = transformers.CLIPVisionModel(vision).eval()
    for parameter in clip.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours = SicogVisionModel(SicogConfig(vision_config=vision, vision_feature_layer=feature_layer))
    missing, unexpected = ours.load_state_dict(clip.state_dict(), strict=False)
    unused = {f"encoder.layers.{i}" for i in range(LAYERS_USED[feature_layer], 3)} | {"post_layernorm"}
    assert missing == [] and all(name.startswith(tuple(unused)) for name in unexpected)

    (height, width), pixels = grid, torch.randint(0, 256, (2, 3, 14 * grid[0], 14 * grid[1]), dtype=torch.uint8)
    rows = pixels.reshape(2, 3, height, 14, width, 14).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    mean, std = torch.tensor((CLIP_MEAN, CLIP_STD))[:, :, None, None]
    with torch.no_grad():
        states = clip(
            (pixels / 255 - mean) / std, output_hidden_states=True, interpolate_pos_encoding=True
        ).hidden_states
        found = ours(rows, height, width)
    expected = states[feature_layer][:, 1:]
    assert (found - expected).abs().max() <= FEATURES * expected.abs().max()
