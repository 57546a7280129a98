"""Cuts the pixels of an image into the patch rows of its slices.

In: uint8 image, SlicePlan   Out: uint8 patch rows [p, 3 * patch_px**2]   Next: encode.py
Patches stay uint8 until they are on the training device; rescaling and normalisation happen in the vision tower.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sicog_mcore.data.sample import Size
from sicog_mcore.data.slicing import SlicePlan

WHOLE = Size(1, 1)


def cut_patches(image: NDArray[np.uint8], plan: SlicePlan) -> torch.Tensor:
    """Resizes an image (bicubic) and cuts it into patches; nothing is padded.

    Args:
        image: uint8 [height, width, 3], RGB, of the size the plan was made for.
        plan: slices of this image.

    Returns:
        uint8 [p, 3 * patch_px**2]: slices row-major, then the overview; patches of a slice row-major; a row is
        channel-major (c, y, x). ``plan.encoded`` has the size of each slice in patches.
    """
    if image.shape[:2] != plan.image:
        raise ValueError(f"image is {image.shape[:2]} px but the plan was made for {tuple(plan.image)}; plan it again")
    source = Image.fromarray(image)
    overview = _cut(source, WHOLE, plan.overview, plan.patch_px)
    if plan.num_slices == 0:
        return torch.from_numpy(overview)
    slices = _cut(source, plan.grid, plan.slice, plan.patch_px)
    return torch.from_numpy(np.concatenate([slices, overview]))


def _cut(source: Image.Image, grid: Size, cell: Size, patch_px: int) -> NDArray[np.uint8]:
    """Resizes the whole image to ``grid`` cells of ``cell`` pixels and cuts every cell into patch rows."""
    # Resized as one picture and then cut: every slice is the same scale, and none has an edge that the picture has not.
    resized = source.resize((grid.width * cell.width, grid.height * cell.height), Image.Resampling.BICUBIC)
    down, across = cell.height // patch_px, cell.width // patch_px
    blocks = np.asarray(resized).reshape(grid.height, down, patch_px, grid.width, across, patch_px, 3)
    by_slice = blocks.transpose(0, 3, 1, 4, 6, 2, 5)  # [rows, columns, down, across, c, y, x]
    return np.ascontiguousarray(by_slice).reshape(-1, 3 * patch_px**2)
