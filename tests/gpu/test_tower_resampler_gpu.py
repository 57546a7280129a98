"""Tower and resampler compute on the GPU what they compute on the CPU, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from safetensors.torch import load_file
from torch import Tensor

from sicog_mcore.config import ParallelConfig, ResamplerConfig, TowerConfig
from sicog_mcore.model.resampler import Resampler
from sicog_mcore.model.vision_tower import VisionTower, tower_transformer_config
from sicog_mcore.parallel.topology import start_topology, stop_topology

pytestmark = pytest.mark.gpu
CONFORMANCE = Path(__file__).parents[1] / "assets" / "resampler.safetensors"
CONFORMANCE_TOLERANCE = 2e-4  # the published bound, fp32
DEVICE_TOLERANCE = 1e-4  # fp32 on two devices: the order of sums differs
LOW_PRECISION_MEAN_ERROR = 0.05  # bf16 against fp32, of features of about unit size
TOWER = TowerConfig(image_px=112, num_layers=5, hidden=128, num_heads=2, ffn=512)
GRIDS = torch.tensor([(8, 8), (5, 12), (1, 1), (13, 4), (8, 8)])


@pytest.fixture(scope="module")
def groups() -> Iterator[ProcessGroupCollection]:
    yield start_topology(ParallelConfig(), seed=0).tower_groups
    stop_topology()


def build_tower(groups: ProcessGroupCollection, device: str, dtype: torch.dtype = torch.float32) -> VisionTower:
    """The same random weights wherever it is built."""
    tower = VisionTower(TOWER, tower_transformer_config(TOWER, dtype, "none"), "local", "sdpa", groups)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return tower.to(device)


def random_patches() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (int(GRIDS.prod(-1).sum()), TOWER.patch_dim), generator=generator, dtype=torch.uint8)


def with_gradients(module: torch.nn.Module, out: Tensor) -> dict[str, Tensor]:
    """Output and parameter gradients, on the CPU in fp32."""
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weight.to(out)).sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {name: x.detach().float().cpu() for name, x in {"output": out, **grads}.items()}


def assert_close(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(ours[name], value, rtol=0, atol=DEVICE_TOLERANCE * scale, msg=name)


def test_tower_on_the_gpu_equals_the_cpu(groups: ProcessGroupCollection) -> None:
    patches = random_patches()
    towers = {device: build_tower(groups, device) for device in ("cuda", "cpu")}
    ours, expected = (with_gradients(tower, tower(patches.to(d), GRIDS)) for d, tower in towers.items())
    assert expected["output"].abs().max() > 1  # the tolerance means something
    assert_close(ours, expected)


def test_tower_in_low_precision_is_near(groups: ProcessGroupCollection) -> None:
    patches = random_patches().cuda()
    with torch.no_grad():
        low = build_tower(groups, "cuda", torch.bfloat16)(patches, GRIDS)
        expected = build_tower(groups, "cuda")(patches, GRIDS)
    assert low.dtype is torch.bfloat16
    assert (low.float() - expected).abs().mean() < LOW_PRECISION_MEAN_ERROR * expected.abs().mean()


def test_resampler_on_the_gpu_conforms_to_the_released_module() -> None:
    data = load_file(CONFORMANCE)
    width, kv_width = data["weight.kv_proj.weight"].shape
    module = Resampler(ResamplerConfig(num_heads=width // 128), kv_width, width)
    module.load_state_dict({k.removeprefix("weight."): v for k, v in data.items() if k.startswith("weight.")})
    features = torch.cat([data[f"case{i}.features"] for i in range(3)])
    grids = torch.stack([data[f"case{i}.grid_hw"] for i in range(3)])
    expected = torch.stack([data[f"case{i}.tokens"] for i in range(3)])
    with torch.no_grad():
        tokens = module.cuda()(features.cuda(), grids)
        low = module.to(torch.bfloat16)(features.cuda().to(torch.bfloat16), grids)
    torch.testing.assert_close(tokens.cpu(), expected, rtol=0, atol=CONFORMANCE_TOLERANCE)
    assert (low.float().cpu() - expected).abs().mean() < LOW_PRECISION_MEAN_ERROR * expected.abs().mean()


def test_gradients_of_the_resampler_on_the_gpu_equal_the_cpu() -> None:
    features = torch.randn(int(GRIDS.prod(-1).sum()), 32, generator=torch.Generator().manual_seed(3))
    results = []
    for device in ("cuda", "cpu"):
        module = Resampler(ResamplerConfig(query_grid=4, num_heads=4), 32, 64)
        module.reset_parameters(torch.Generator().manual_seed(4))
        module.to(device)
        results.append(with_gradients(module, module(features.to(device), GRIDS)))
    assert_close(*results)
