"""Patch rows hold the resized pixels of every slice, in order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sicog_mcore.config import SlicingConfig
from sicog_mcore.data.patches import cut_patches
from sicog_mcore.data.sample import Size
from sicog_mcore.data.slicing import SlicePlan, plan_slices

PATCH_PX = 14


def _image(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=-1).astype(np.uint8)


def _restore(patches: torch.Tensor, size: Size) -> np.ndarray:
    """Patch rows of one slice back to its pixels [height, width, 3]."""
    grid = patches.reshape(size.height, size.width, 3, PATCH_PX, PATCH_PX)
    return grid.permute(0, 3, 1, 4, 2).reshape(size.height * PATCH_PX, size.width * PATCH_PX, 3).numpy()


@pytest.mark.parametrize("size", [Size(480, 640), Size(640, 427), Size(200, 300), Size(60, 1500), Size(1, 150)])
def test_rows_are_the_slices_of_the_resized_image_then_the_overview(size: Size) -> None:
    image = _image(*size)
    plan = plan_slices(size, SlicingConfig(), PATCH_PX)
    patches = cut_patches(image, plan)
    counts = [grid.height * grid.width for grid in plan.encoded]
    assert patches.dtype == torch.uint8 and patches.shape == (sum(counts), 3 * PATCH_PX**2) and patches.is_contiguous()
    *slices, overview = [_restore(rows, grid) for rows, grid in zip(patches.split(counts), plan.encoded, strict=True)]

    def resized(height: int, width: int) -> np.ndarray:
        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))

    np.testing.assert_array_equal(overview, resized(*plan.overview))
    if slices:
        whole = resized(plan.grid.height * plan.slice.height, plan.grid.width * plan.slice.width)
        for index, pixels in enumerate(slices):
            top, left = index // plan.grid.width * plan.slice.height, index % plan.grid.width * plan.slice.width
            np.testing.assert_array_equal(pixels, whole[top : top + plan.slice.height, left : left + plan.slice.width])


def test_a_row_is_channel_major() -> None:
    image = np.zeros((14, 28, 3), np.uint8)
    image[:, :14] = (10, 20, 30)
    plan = SlicePlan(Size(14, 28), Size(14, 28), Size(0, 0), Size(0, 0), PATCH_PX)
    first, second = cut_patches(image, plan)
    assert first.reshape(3, -1).unique(dim=1).flatten().tolist() == [10, 20, 30] and not second.any()


def test_an_image_of_another_size_than_planned_is_refused() -> None:
    plan = plan_slices(Size(100, 200), SlicingConfig(), PATCH_PX)
    with pytest.raises(ValueError, match=r"\(200, 100\) px but the plan was made for \(100, 200\)"):
        cut_patches(_image(200, 100), plan)
