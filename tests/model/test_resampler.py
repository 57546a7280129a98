"""The packed resampler conforms to the released module and equals sampling before projecting."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from sicog_mcore.config import ResamplerConfig
from sicog_mcore.model.resampler import Resampler

CONFORMANCE = Path(__file__).parents[1] / "assets" / "resampler.safetensors"
CONFORMANCE_TOLERANCE = 2e-5  # the published bound is 2e-4
SAMPLING_TOLERANCE = 1e-4  # against fp64; sampling points and scores are fp32
KV_WIDTH, WIDTH, HEADS = 12, 16, 2
GRIDS = [(24, 24), (20, 27), (25, 22), (5, 40), (40, 5), (58, 9), (9, 58), (11, 13), (2, 7)]
SHAPES = [(4, 2), (3, 2), (4, 3), (3, 3), (2, 4), (2, 3), (3, 4)]  # samples per window, (width, height)


def bilinear(image: Tensor, y: float, x: float) -> Tensor:
    """Value of [c, h, w] at a point; zero beyond the far edge, the last patch up to it."""
    _, height, width = image.shape
    if y > height or x > width:
        return image.new_zeros(image.shape[0])
    y, x = min(y, height - 1), min(x, width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = image[:, top, left] * (1 - x + left) + image[:, top, right] * (x - left)
    lower = image[:, bottom, left] * (1 - x + left) + image[:, bottom, right] * (x - left)
    return upper * (1 - y + top) + lower * (y - top)


def sample_window(image: Tensor, row: int, column: int, queries: int) -> Tensor:
    """RoIAlign of one window, sample by sample: [bins, c]."""
    _, height, width = image.shape
    bins_x, bins_y = min(SHAPES, key=lambda s: abs(math.log(width / height) - math.log(s[0] / s[1])))
    size_y, size_x = max(height / queries, 1.0) / bins_y, max(width / queries, 1.0) / bins_x
    per_y, per_x = math.ceil(size_y), math.ceil(size_x)
    bins = []
    for by in range(bins_y):
        for bx in range(bins_x):
            points = [
                bilinear(
                    image,
                    row * height / queries + size_y * (by + (i + 0.5) / per_y),
                    column * width / queries + size_x * (bx + (j + 0.5) / per_x),
                )
                for i in range(per_y)
                for j in range(per_x)
            ]
            bins.append(torch.stack(points).mean(0))
    return torch.stack(bins)


def direct(module: Resampler, features: Tensor, grid: tuple[int, int]) -> Tensor:
    """One slice the straightforward way: sample keys and values, then project them with their biases: [q, h]."""
    side, width = module.config.query_grid, module.proj.shape[0]
    x = module.ln_kv(module.kv_proj(features))
    table = module.pos_embed.T.reshape(1, width, side, side).float()
    positions = F.interpolate(table, size=grid, mode="bicubic")[0].flatten(1).T.to(x.dtype)
    query = module.ln_q(module.query) + module.pos_embed
    weights, biases = module.attn.in_proj_weight.chunk(3), module.attn.in_proj_bias.chunk(3)
    key_map, value_map = ((y.T.reshape(width, *grid)) for y in (x + positions, x))
    tokens = []
    for i in range(side**2):
        sources = query[i : i + 1], *(sample_window(m, i // side, i % side, side) for m in (key_map, value_map))
        q, k, v = (
            F.linear(s, w, b).unflatten(1, (module.config.num_heads, -1)).transpose(0, 1)
            for s, w, b in zip(sources, weights, biases, strict=True)
        )
        shares = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
        tokens.append((shares @ v).flatten())
    return module.ln_post(module.attn.out_proj(torch.stack(tokens))) @ module.proj


def build(query_grid: int, dtype: torch.dtype = torch.float64) -> Resampler:
    config = ResamplerConfig(query_grid=query_grid, num_heads=HEADS)
    module = Resampler(config, KV_WIDTH, WIDTH, dtype)
    generator = torch.Generator().manual_seed(3)
    module.reset_parameters(generator)
    with torch.no_grad():
        for parameter in module.parameters():  # biases and norms too: a released module has learned them
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def features_of(grid: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(grid[0])
    return torch.randn(grid[0] * grid[1], KV_WIDTH, dtype=torch.float64, generator=generator)


def test_conforms_to_the_released_module_in_one_packed_batch() -> None:
    data = load_file(CONFORMANCE)
    width, kv_width = data["weight.kv_proj.weight"].shape
    module = Resampler(ResamplerConfig(num_heads=width // 128), kv_width, width)
    module.load_state_dict({k.removeprefix("weight."): v for k, v in data.items() if k.startswith("weight.")})
    features = torch.cat([data[f"case{i}.features"] for i in range(3)])
    grids = torch.stack([data[f"case{i}.grid_hw"] for i in range(3)])
    expected = torch.stack([data[f"case{i}.tokens"] for i in range(3)])
    torch.testing.assert_close(module(features, grids), expected, rtol=0, atol=CONFORMANCE_TOLERANCE)


@pytest.mark.parametrize("query_grid", [12, 4])
def test_projecting_first_equals_sampling_first_on_every_grid(query_grid: int) -> None:
    grids = GRIDS if query_grid == 4 else GRIDS[3:5]
    module = build(query_grid)
    ours = module(torch.cat([features_of(grid) for grid in grids]), torch.tensor(grids))
    with torch.no_grad():
        expected = torch.stack([direct(module, features_of(grid), grid) for grid in grids])
    torch.testing.assert_close(ours, expected, rtol=0, atol=SAMPLING_TOLERANCE)


def test_gradients_equal_those_of_sampling_first() -> None:
    module, grids = build(4), [(3, 10), (6, 5)]
    inputs = [features_of(grid).requires_grad_() for grid in grids]
    wanted = [*inputs, *module.parameters()]
    weight = torch.randn(2, 16, WIDTH, dtype=torch.float64)
    ours = torch.autograd.grad((module(torch.cat(inputs), torch.tensor(grids)) * weight).sum(), wanted)
    tokens = torch.stack([direct(module, x, grid) for x, grid in zip(inputs, grids, strict=True)])
    expected = torch.autograd.grad((tokens * weight).sum(), wanted)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_a_patch_reaches_only_its_own_and_adjacent_windows() -> None:
    module, (height, width) = build(12), (20, 27)
    before, y, x = features_of((20, 27)), 11, 5
    after = before.clone()
    after[y * width + x] += 1
    grids = torch.tensor([[height, width]])
    changed = (module(before, grids) != module(after, grids))[0].any(-1).reshape(12, 12)
    own = (int(y * 12 / height), int(x * 12 / width))
    assert changed[own]
    rows, columns = changed.nonzero().T
    assert (rows - own[0]).abs().max() <= 1 and (columns - own[1]).abs().max() <= 1


def test_a_slice_does_not_depend_on_its_neighbours_in_the_batch() -> None:
    module = build(4)
    together = module(torch.cat([features_of(grid) for grid in GRIDS]), torch.tensor(GRIDS))
    alone = torch.cat([module(features_of(grid), torch.tensor([grid])) for grid in GRIDS])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_position_table_is_fixed_when_asked_and_encodes_x_before_y() -> None:
    module = Resampler(ResamplerConfig(query_grid=4, num_heads=2, train_positions=False), KV_WIDTH, WIDTH)
    module.reset_parameters()
    assert not module.pos_embed.requires_grad
    row, column = 2, 3
    entry = module.pos_embed[row * 4 + column]
    omega = 10000.0 ** (-torch.arange(4) / 4)
    expected = torch.cat([(column * omega).sin(), (column * omega).cos(), (row * omega).sin(), (row * omega).cos()])
    torch.testing.assert_close(entry, expected)


def test_first_weights_depend_on_the_generator_only() -> None:
    states = []
    for _ in range(2):
        module = build(4, torch.float32)
        module.reset_parameters(torch.Generator().manual_seed(7))
        states.append(module.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert float(states[0]["attn.out_proj.weight"].std()) == pytest.approx(0.02, rel=0.2)
    assert not states[0]["attn.in_proj_bias"].any()


def test_released_size_has_69_million_parameters() -> None:
    with torch.device("meta"):
        module = Resampler(ResamplerConfig(num_heads=28), 1024, 3584)
    assert sum(parameter.numel() for parameter in module.parameters()) == pytest.approx(68.96e6, abs=5e3)
