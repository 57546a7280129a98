"""Position rows equal F.interpolate of the table, for every slice of a packed batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sicog_mcore.model.positions import grid_taps, interpolate_positions

TOLERANCE = 2e-6
GRIDS = [(24, 24), (20, 27), (5, 40), (58, 9), (1, 3), (12, 12)]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def direct(table: torch.Tensor, side: int, grid: tuple[int, int]) -> torch.Tensor:
    image = table.T.reshape(1, -1, side, side)
    return F.interpolate(image, size=grid, mode="bicubic", align_corners=False)[0].flatten(1).T


@pytest.mark.parametrize("side", [24, 12, 4, 2])
def test_all_slices_at_once_equal_interpolating_each(side: int) -> None:
    table = random(side**2, 6)
    expected = torch.cat([direct(table, side, grid) for grid in GRIDS])
    torch.testing.assert_close(interpolate_positions(table, GRIDS), expected, rtol=0, atol=TOLERANCE)


def test_native_grid_returns_the_table_exactly() -> None:
    table = random(24**2, 5)
    assert torch.equal(interpolate_positions(table, [(24, 24)]), table)


def test_gradient_reaches_the_table() -> None:
    table = random(16, 3).requires_grad_()
    weight = random(6 * 5 + 3 * 7, 3)
    (ours,) = torch.autograd.grad((interpolate_positions(table, [(6, 5), (3, 7)]) * weight).sum(), table)
    both = torch.cat([direct(table, 4, (6, 5)), direct(table, 4, (3, 7))])
    (expected,) = torch.autograd.grad((both * weight).sum(), table)
    torch.testing.assert_close(ours, expected, rtol=0, atol=10 * TOLERANCE)


def test_low_precision_tables_are_weighted_in_fp32() -> None:
    table = random(144, 8).bfloat16()
    expected = direct(table.float(), 12, (9, 31)).bfloat16()
    ours = interpolate_positions(table, [(9, 31)])
    assert ours.dtype is torch.bfloat16
    assert (ours != expected).float().mean() < 0.01  # a last bit may round the other way


def test_taps_of_a_grid_are_computed_once() -> None:
    cpu = torch.device("cpu")
    assert grid_taps(24, 17, 31, cpu)[0] is grid_taps(24, 17, 31, cpu)[0]
    assert grid_taps.cache_info().maxsize is not None
