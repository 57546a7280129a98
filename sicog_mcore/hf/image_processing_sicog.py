"""Turns images into patch rows by the LLaVA-UHD slicing rule, and lays out their visual tokens in the text.

In: PIL images   Out: patches, grids, layouts   Next: processing_sicog.py
Pixels stay uint8; the model normalises them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import BaseImageProcessor, BatchFeature

NEWLINE, COMMA = -1, -2  # separators in a layout; all other entries are rows of the image's visual tokens
ImageSize = tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class ImageSlices:
    """The overview and the slices of one image.

    Attributes:
        overview: size the whole image is resized to (px).
        grid: (rows, columns) of slices; (0, 0) for an image that is not sliced.
        slice: size of every slice (px).
    """

    overview: ImageSize
    grid: ImageSize
    slice: ImageSize


class SicogImageProcessor(BaseImageProcessor):
    """Cuts images into slices and slices into patches.

    Args:
        patch_size: side of a patch (px).
        resolution: side of the square whose area bounds every slice (px).
        max_slices: largest number of slices of an image, the overview not counted.
        overview_only: encode the overview alone.
        layout: "stitched" writes all slices as one raster map, a newline behind each of its lines; "per_slice" one slice
            after the other. The overview comes last.
        query_grid: queries per side of a slice.
    """

    model_input_names = ["patches", "grids"]

    def __init__(
        self,
        patch_size: int = 14,
        resolution: int = 336,
        max_slices: int = 7,
        overview_only: bool = False,
        layout: Literal["stitched", "per_slice"] = "stitched",
        query_grid: int = 12,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.patch_size, self.resolution, self.max_slices = patch_size, resolution, max_slices
        self.overview_only, self.layout, self.query_grid = overview_only, layout, query_grid

    def __call__(self, images: Image.Image | Sequence[Image.Image], **kwargs: Any) -> BatchFeature:
        """Calls ``preprocess``."""
        return self.preprocess(images, **kwargs)

    def preprocess(self, images: Image.Image | Sequence[Image.Image], **_: Any) -> BatchFeature:
        """Encodes images as patch rows.

        Returns:
            patches: uint8 [p, 3 * patch_size**2] of all slices of all images, slices row-major, each image's overview last.
            grids: int64 [k, 2], (height, width) of each slice in patches.
            layouts: for each image int64 [tokens], see ``lay_out``.
            slices_per_image: for each image the number of its slices, the overview included.
        """
        images = [images] if isinstance(images, Image.Image) else list(images)
        patches: list[Tensor] = [torch.empty(0, 3 * self.patch_size**2, dtype=torch.uint8)]
        grids: list[ImageSize] = []
        layouts, counts = [], []
        for image in (to_rgb(image) for image in images):
            plan = self.plan(image.height, image.width)
            sizes_px = [plan.slice] * math.prod(plan.grid) + [plan.overview]
            grids += [(height // self.patch_size, width // self.patch_size) for height, width in sizes_px]
            if plan.grid != (0, 0):
                patches.append(self._cut(image, plan.grid, plan.slice))
            patches.append(self._cut(image, (1, 1), plan.overview))
            layouts.append(self.lay_out(plan.grid))
            counts.append(len(sizes_px))
        return BatchFeature(
            {
                "patches": torch.cat(patches),
                "grids": torch.tensor(grids, dtype=torch.int64).reshape(-1, 2),
                "layouts": layouts,
                "slices_per_image": counts,
            }
        )

    def plan(self, height: int, width: int) -> ImageSlices:
        """Plans overview, grid and slice size of an image of this size (px); rounding and order decide ties."""
        # As many slices as cover the area; one more or one less is allowed where that fits the aspect better.
        wanted = min(math.ceil(height * width / self.resolution**2), self.max_slices)
        overview = self._fit(height, width, upscale=wanted <= 1)
        if wanted <= 1 or self.overview_only:
            return ImageSlices(overview, (0, 0), (0, 0))
        grids = [
            (count // columns, columns)
            for count in (wanted - 1, wanted, wanted + 1)
            if 1 < count <= self.max_slices
            for columns in range(1, count + 1)
            if count % columns == 0
        ]
        rows, columns = min(grids, key=lambda grid: abs(math.log(width / height) - math.log(grid[1] / grid[0])))
        return ImageSlices(overview, (rows, columns), self._fit(height // rows, width // columns, upscale=True))

    def _fit(self, height: int, width: int, upscale: bool) -> ImageSize:
        """Scales to an area of at most resolution**2, aspect kept, then cuts each side to whole patches."""
        if upscale or width * height > self.resolution**2:
            aspect = width / height
            height = int(self.resolution / math.sqrt(aspect))
            width = int(height * aspect)
        patch = self.patch_size
        return max(patch, height // patch * patch), max(patch, width // patch * patch)

    def _cut(self, image: Image.Image, grid: ImageSize, cell: ImageSize) -> Tensor:
        """Resizes the image to ``grid`` cells of ``cell`` pixels; returns patch rows of all cells, channel-major."""
        (rows, columns), (height, width), patch = grid, cell, self.patch_size
        resized = image.resize((columns * width, rows * height), Image.Resampling.BICUBIC)
        # [rows, y, patch_y, columns, x, patch_x, c] -> cells in raster order, their patches in raster order, each (c, y, x).
        blocks = np.asarray(resized).reshape(rows, height // patch, patch, columns, width // patch, patch, 3)
        return torch.from_numpy(blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3 * patch**2))

    def lay_out(self, grid: ImageSize) -> Tensor:
        """Orders the visual tokens of an image: int64 [tokens], rows of its resampler output, NEWLINE or COMMA."""
        (rows, columns), side = grid, self.query_grid
        tokens = torch.arange((rows * columns + 1) * side**2)
        overview = tokens[rows * columns * side**2 :]
        if rows == 0:
            return overview
        slices = tokens[: rows * columns * side**2].reshape(rows, columns, side, side)
        if self.layout == "per_slice":
            listed = torch.nn.functional.pad(slices.flatten(2), (0, 1), value=COMMA)
            listed[:, -1, -1] = NEWLINE
            return torch.cat([listed.flatten(), overview])
        # "stitched": slices side by side share their lines, so a line runs through all columns before it ends in a newline.
        lines = torch.nn.functional.pad(slices.transpose(1, 2).reshape(rows * side, -1), (0, 1), value=NEWLINE)
        before_overview = torch.tensor([NEWLINE if columns == 1 else COMMA])  # as the released code has it
        return torch.cat([lines.flatten(), before_overview, overview])


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns an upright RGB image: deep pixels scaled to 8 bit, transparency over white."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
        values = np.asarray(upright).astype(np.float32)
        low, high = 0.0, 1.0 if upright.mode == "F" else 65535.0
        if values.min() < low or values.max() > high:  # outside of what the format promises: the image's own range
            low, high = float(values.min()), float(values.max())
        upright = Image.fromarray(np.rint((values - low) * (255.0 / (high - low or 1.0))).astype(np.uint8))
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    white = Image.new("RGBA", upright.size, "white")
    return Image.alpha_composite(white, upright.convert("RGBA")).convert("RGB")
