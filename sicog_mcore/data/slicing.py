"""Plans the slices of an image and lays its visual tokens out in the text: arithmetic on sizes, no pixels.

In: Size of an image   Out: SlicePlan, VisualLayout   Next: patches.py, chat.py
The rule is the released LLaVA-UHD one, float for float: rounding and the order of candidates decide ties.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sicog_mcore.config import SlicingConfig
from sicog_mcore.data.sample import Size

UNSLICED = Size(0, 0)
NEWLINE = -1
COMMA = -2


@dataclass(frozen=True)
class SlicePlan:
    """The slices of one image, as the vision tower sees them.

    Attributes:
        image: size of the image (px).
        overview: size the whole image is resized to (px).
        grid: (rows, columns) of slices; Size(0, 0) for an image that is not sliced.
        slice: size of every slice (px); Size(0, 0) for an image that is not sliced.
        patch_px: side of a patch (px); divides the overview's and the slices' sides.
    """

    image: Size
    overview: Size
    grid: Size
    slice: Size
    patch_px: int

    @property
    def num_slices(self) -> int:
        """Slices without the overview."""
        return self.grid.height * self.grid.width

    @property
    def encoded(self) -> tuple[Size, ...]:
        """Size in patches of everything the tower encodes: slices row-major, overview last."""
        sizes_px = (self.slice,) * self.num_slices + (self.overview,)
        return tuple(Size(size.height // self.patch_px, size.width // self.patch_px) for size in sizes_px)


@dataclass(frozen=True)
class VisualLayout:
    """The tokens that stand for one image in the text.

    Attributes:
        rows: int64 [tokens]; >= 0: row of the image's resampler output [k * q] (slice index * q + query index);
            NEWLINE: the separator of lines; COMMA: the separator inside a row of slices, or before the overview.
    """

    rows: NDArray[np.int64]

    @property
    def num_tokens(self) -> int:
        return len(self.rows)

    @property
    def num_visual_tokens(self) -> int:
        return int((self.rows >= 0).sum())


def plan_slices(image: Size, config: SlicingConfig, patch_px: int) -> SlicePlan:
    """Decides overview, grid and slice size from the size of an image.

    Args:
        image: size of the image (px), both sides >= 1.
        config: bound on the area of a slice and on the number of slices.
        patch_px: side of a patch (px).
    """
    side = config.resolution_px
    # As many slices of side * side pixels as the image's area would fill.
    wanted = min(math.ceil(image.height * image.width / (side * side)), config.max_slices)
    if wanted <= 1:
        return SlicePlan(image, _fit(image, side, patch_px, upscale=True), UNSLICED, UNSLICED, patch_px)
    overview = _fit(image, side, patch_px, upscale=False)
    if config.overview_only:
        return SlicePlan(image, overview, UNSLICED, UNSLICED, patch_px)
    grid = _choose_grid(image, wanted, config.max_slices)
    # Whole pixels decide the slice's aspect only: the image itself is resized to the grid as one piece (patches.py).
    cell = Size(image.height // grid.height, image.width // grid.width)
    return SlicePlan(
        image=image,
        overview=overview,
        grid=grid,
        slice=_fit(cell, side, patch_px, upscale=True),
        patch_px=patch_px,
    )


def _fit(size: Size, side: int, patch_px: int, *, upscale: bool) -> Size:
    """Scales to an area of at most side * side, aspect kept, then cuts each side to whole patches (at least one)."""
    height, width = size
    if upscale or width * height > side * side:
        aspect = width / height
        # The width follows from the height that was cut to an integer: the released order, which decides the last
        # pixel.
        height = int(side / math.sqrt(aspect))
        width = int(height * aspect)
    return Size(max(patch_px, height // patch_px * patch_px), max(patch_px, width // patch_px * patch_px))


def _choose_grid(image: Size, wanted: int, max_slices: int) -> Size:
    """The grid of about ``wanted`` slices whose shape is nearest to the image's; the first of equals wins."""
    log_aspect = math.log(image.width / image.height)
    # A grid of one cell would be the overview again. The order of the candidates decides ties, for ``min`` takes the
    # first.
    candidates = [
        Size(height=count // columns, width=columns)
        for count in (wanted - 1, wanted, wanted + 1)
        if 1 < count <= max_slices
        for columns in range(1, count + 1)
        if count % columns == 0
    ]
    return min(candidates, key=lambda grid: abs(log_aspect - math.log(grid.width / grid.height)))


def lay_out(plan: SlicePlan, query_grid: int, layout: Literal["stitched", "per_slice"]) -> VisualLayout:
    """Orders an image's visual tokens and separators; an image that is not sliced has its overview's tokens only.

    Args:
        plan: slices of the image.
        query_grid: queries per side of a slice; q is the square of it.
        layout: "stitched" or "per_slice", see SlicingConfig.
    """
    return VisualLayout(_lay_out_grid(plan.grid, query_grid, layout))


@lru_cache(maxsize=1024)  # there are few grids, and many images
def _lay_out_grid(grid: Size, query_grid: int, layout: Literal["stitched", "per_slice"]) -> NDArray[np.int64]:
    queries = query_grid**2
    # The resampler's rows are slices row-major, then the overview (SlicePlan.encoded).
    rows = grid.height * grid.width * queries + np.arange(queries)  # [q], of the overview
    if grid != UNSLICED:
        write_slices = _stitch_slices if layout == "stitched" else _list_slices
        rows = np.concatenate([write_slices(grid, query_grid), rows])
    rows.flags.writeable = False
    return rows


def _stitch_slices(grid: Size, query_grid: int) -> NDArray[np.int64]:
    """All slices as one raster map, a newline after each of its rows, then one separator before the overview."""
    rows, columns = grid
    tokens = np.arange(rows * columns * query_grid**2).reshape(rows, columns, query_grid, query_grid)
    # [rows, columns, q, q] -> [rows, q, columns, q]: a line of text then crosses all slices of a row, as a line of the
    # picture does.
    raster = tokens.transpose(0, 2, 1, 3).reshape(rows * query_grid, columns * query_grid)
    lines = np.pad(raster, ((0, 0), (0, 1)), constant_values=NEWLINE)
    # The released code takes the first entry of its per-slice separators, which is a newline in a single column.
    before_overview = NEWLINE if columns == 1 else COMMA
    return np.append(lines, before_overview)


def _list_slices(grid: Size, query_grid: int) -> NDArray[np.int64]:
    """Slice after slice, each followed by its separator: a comma inside a row of slices, a newline at its end."""
    rows, columns = grid
    tokens = np.arange(rows * columns * query_grid**2).reshape(rows, columns, query_grid**2)
    listed = np.pad(tokens, ((0, 0), (0, 0), (0, 1)), constant_values=COMMA)
    listed[:, -1, -1] = NEWLINE
    return listed.ravel()
