"""The packed tower equals a plain CLIP encoder that is run on one image at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from sicog_mcore.config import ParallelConfig, TowerConfig
from sicog_mcore.model.vision_tower import CLIP_MEAN, CLIP_STD, VisionTower, tower_transformer_config
from sicog_mcore.parallel.topology import start_topology, stop_topology

TOLERANCE = 1e-5
TOWER = TowerConfig(image_px=56, patch_px=14, num_layers=4, hidden=32, num_heads=4, ffn=64)
GRIDS = [(4, 4), (2, 7), (5, 3), (1, 1), (4, 4)]


@pytest.fixture(scope="module")
def groups() -> Iterator[ProcessGroupCollection]:
    yield start_topology(ParallelConfig(), seed=0).tower_groups
    stop_topology()


def build(groups: ProcessGroupCollection, recompute: str = "none", dtype: torch.dtype = torch.float32) -> VisionTower:
    transformer = tower_transformer_config(TOWER, dtype, recompute)  # type: ignore[arg-type]
    tower = VisionTower(TOWER, transformer, "local", "sdpa", groups)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.15
            parameter.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return tower


def slices(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (h * w, TOWER.patch_dim), generator=generator, dtype=torch.uint8) for h, w in GRIDS]


def clip_encoder(tower: VisionTower, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """CLIP's encoder written out for one image, on the tower's weights: features [h * w, c]."""
    weights = dict(tower.named_parameters())
    mean, std = (torch.tensor(x)[:, None] for x in (CLIP_MEAN, CLIP_STD))
    pixels = (patches.float().unflatten(1, (3, -1)) / 255 - mean) / std
    table = weights["position_embedding"]
    image_table = table[1:].T.reshape(1, -1, TOWER.grid, TOWER.grid)
    positions = F.interpolate(image_table, size=grid, mode="bicubic")[0].flatten(1).T
    x = pixels.flatten(1) @ weights["patch_embedding.weight"].T + positions
    x = torch.cat([(weights["class_embedding"] + table[0])[None], x])
    x = F.layer_norm(x, x.shape[1:], weights["pre_norm.weight"], weights["pre_norm.bias"], TOWER.norm_eps)
    for number in range(TOWER.layers_used):
        layer = {n.removeprefix(f"transformer.layers.{number}."): w for n, w in weights.items()}
        x = x + _attention(x, layer)
        y = F.layer_norm(
            x, x.shape[1:], layer["pre_mlp_layernorm.weight"], layer["pre_mlp_layernorm.bias"], TOWER.norm_eps
        )
        y = F.linear(y, layer["mlp.linear_fc1.weight"], layer["mlp.linear_fc1.bias"])
        x = x + F.linear(y * torch.sigmoid(1.702 * y), layer["mlp.linear_fc2.weight"], layer["mlp.linear_fc2.bias"])
    return x[1:]


def _attention(x: Tensor, layer: dict[str, Tensor]) -> Tensor:
    y = F.layer_norm(x, x.shape[1:], layer["input_layernorm.weight"], layer["input_layernorm.bias"], TOWER.norm_eps)
    qkv = F.linear(y, layer["self_attention.linear_qkv.weight"], layer["self_attention.linear_qkv.bias"])
    # Megatron keeps query, key and value of one head together.
    query, key, value = qkv.unflatten(1, (TOWER.num_heads, 3, -1)).permute(2, 1, 0, 3)
    scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    out = (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)
    return F.linear(out, layer["self_attention.linear_proj.weight"], layer["self_attention.linear_proj.bias"])


def gradients(tower: VisionTower, features: Tensor) -> dict[str, Tensor]:
    tower.zero_grad()
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    (features * weight).sum().backward()
    return {name: parameter.grad for name, parameter in tower.named_parameters() if parameter.grad is not None}


def test_packed_slices_of_any_grid_equal_clip_on_each_image(groups: ProcessGroupCollection) -> None:
    tower, images = build(groups), slices()
    ours = tower(torch.cat(images), torch.tensor(GRIDS))
    expected = torch.cat([clip_encoder(tower, image, grid) for image, grid in zip(images, GRIDS, strict=True)])
    assert expected.abs().max() > 1  # the tolerance means something
    torch.testing.assert_close(ours, expected, rtol=0, atol=TOLERANCE)


def test_gradients_equal_those_of_clip_on_each_image(groups: ProcessGroupCollection) -> None:
    tower, images = build(groups), slices()
    ours = gradients(tower, tower(torch.cat(images), torch.tensor(GRIDS)))
    features = [clip_encoder(tower, image, grid) for image, grid in zip(images, GRIDS, strict=True)]
    expected = gradients(tower, torch.cat(features))
    assert ours.keys() == expected.keys() == dict(tower.named_parameters()).keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4, msg=name)


def test_features_do_not_depend_on_the_other_slices_or_their_order(groups: ProcessGroupCollection) -> None:
    tower, images = build(groups), slices()
    alone = [tower(image, torch.tensor([grid])) for image, grid in zip(images, GRIDS, strict=True)]
    backwards = tower(torch.cat(images[::-1]), torch.tensor(GRIDS[::-1]))
    torch.testing.assert_close(backwards, torch.cat(alone[::-1]), rtol=0, atol=TOLERANCE)


def test_recompute_changes_no_gradient(groups: ProcessGroupCollection) -> None:
    patches, grids = torch.cat(slices()), torch.tensor(GRIDS)
    towers = [build(groups, recompute) for recompute in ("none", "full")]
    kept, recomputed = (gradients(tower, tower(patches, grids)) for tower in towers)
    assert kept.keys() == recomputed.keys()
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_the_layer_whose_output_is_unused_is_not_built(groups: ProcessGroupCollection) -> None:
    assert len(build(groups).transformer.layers) == TOWER.num_layers - 1


def test_replicated_weights_are_not_marked_as_sharded(groups: ProcessGroupCollection) -> None:
    marks = [vars(parameter)["tensor_model_parallel"] for parameter in build(groups).parameters()]
    assert marks == [False] * len(marks)


def test_low_precision_weights_give_low_precision_features(groups: ProcessGroupCollection) -> None:
    patches, grids = torch.cat(slices()), torch.tensor(GRIDS)
    low = build(groups, dtype=torch.bfloat16)(patches, grids)
    assert low.dtype is torch.bfloat16
    assert (low.float() - build(groups)(patches, grids)).abs().mean() < 0.05
