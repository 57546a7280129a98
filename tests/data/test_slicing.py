"""Slice plans conform to the released rule, and layouts hold every visual token exactly once."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sicog_mcore.config import SlicingConfig
from sicog_mcore.data.sample import Size
from sicog_mcore.data.slicing import COMMA, NEWLINE, lay_out, plan_slices

CONFORMANCE = json.loads((Path(__file__).parents[1] / "assets" / "slice_plans.json").read_text())
PATCH_PX = 14
QUERY_GRID = 12
LAYOUTS = ("stitched", "per_slice")

# Above this ratio of sides a slice is one patch high, and its length alone breaks the bound on the area.
MAX_ASPECT = 500

sides = st.integers(1, 6000)
images = st.builds(Size, sides, sides)
configs = st.builds(SlicingConfig, resolution_px=st.sampled_from([112, 224, 336, 448]), max_slices=st.integers(1, 30))


def _width_height(size: Size) -> list[int]:
    return [size.width, size.height]


def test_every_conformance_case_is_met_exactly() -> None:
    assert CONFORMANCE["scale_resolution"] == 336 and CONFORMANCE["patch"] == PATCH_PX
    for case in CONFORMANCE["cases"]:
        image = Size(case["height"], case["width"])
        plan = plan_slices(image, SlicingConfig(max_slices=case["max_slices"]), PATCH_PX)
        sliced = plan.num_slices > 0
        found = {
            "overview_px": _width_height(plan.overview),
            "grid_cols_rows": _width_height(plan.grid) if sliced else None,
            "slice_px": _width_height(plan.slice) if sliced else None,
            "num_slices": plan.num_slices,
            "visual_tokens_stitched": lay_out(plan, QUERY_GRID, "stitched").num_tokens,
            "visual_tokens_per_slice": lay_out(plan, QUERY_GRID, "per_slice").num_tokens,
        }
        assert found == {name: case[name] for name in found}, image


def test_conformance_covers_every_kind_of_plan() -> None:
    grids = {tuple(case["grid_cols_rows"] or ()) for case in CONFORMANCE["cases"]}
    assert len(CONFORMANCE["cases"]) >= 200 and {(), (2, 2), (3, 2), (2, 3), (7, 1), (1, 7)} <= grids


@pytest.mark.parametrize(
    ("image", "max_slices", "grid"),
    [
        (Size(1024, 1024), 7, Size(2, 3)),  # 2 columns of 3 and 3 columns of 2 differ by the rounding of log only
        (Size(2000, 2000), 9, Size(3, 3)),
        (Size(2000, 2000), 12, Size(3, 4)),
        (Size(1000, 4000), 16, Size(2, 8)),
        (Size(700, 700), 2, Size(2, 1)),
        (Size(2000, 2000), 1, Size(0, 0)),
        (Size(100, 8000), 20, Size(1, 9)),
    ],
)
def test_grid_follows_the_shape_of_the_image_for_any_number_of_slices(image: Size, max_slices: int, grid: Size) -> None:
    assert plan_slices(image, SlicingConfig(max_slices=max_slices), PATCH_PX).grid == grid


def test_small_image_is_scaled_up_and_not_sliced() -> None:
    plan = plan_slices(Size(20, 30), SlicingConfig(), PATCH_PX)
    assert plan.num_slices == 0 and plan.overview == Size(266, 406) and plan.encoded == (Size(19, 29),)


@settings(deadline=None)
@given(images, configs, st.sampled_from([14, 16, 28]))
def test_plan_keeps_its_bounds(image: Size, config: SlicingConfig, patch_px: int) -> None:
    plan = plan_slices(image, config, patch_px)
    assert plan.num_slices <= config.max_slices and plan.num_slices != 1
    assert len(plan.encoded) == plan.num_slices + 1
    assert all(min(size) >= 1 for size in plan.encoded)
    for size in (plan.overview, plan.slice):
        assert size.height % patch_px == size.width % patch_px == 0


@settings(deadline=None)
@given(images, st.integers(1, 30))
def test_no_slice_is_larger_than_the_resolution(image: Size, max_slices: int) -> None:
    plan = plan_slices(image, SlicingConfig(max_slices=max_slices), PATCH_PX)
    cell = Size(image.height // max(plan.grid.height, 1), image.width // max(plan.grid.width, 1))
    for source, size in ((image, plan.overview), (cell, plan.slice)):
        if max(source) <= MAX_ASPECT * min(source):
            assert size.height * size.width <= 336**2


@settings(deadline=None)
@given(images, st.integers(2, 30))
def test_no_other_grid_of_the_same_slice_counts_is_nearer_to_the_image(image: Size, max_slices: int) -> None:
    plan = plan_slices(image, SlicingConfig(max_slices=max_slices), PATCH_PX)
    wanted = min(math.ceil(image.height * image.width / 336**2), max_slices)
    if wanted <= 1:
        assert plan.num_slices == 0
        return

    def distance(columns: int, rows: int) -> float:
        return abs(math.log(image.width / image.height) - math.log(columns / rows))

    assert abs(plan.num_slices - wanted) <= 1
    for count in {wanted - 1, wanted, wanted + 1} - {1, max_slices + 1}:
        for columns in (c for c in range(1, count + 1) if count % c == 0):
            assert distance(plan.grid.width, plan.grid.height) <= distance(columns, count // columns)


@settings(deadline=None)
@given(images, configs, st.integers(1, 12), st.sampled_from(LAYOUTS))
def test_layout_holds_every_visual_token_once_and_the_overview_last(image, config, query_grid, layout) -> None:
    plan = plan_slices(image, config, PATCH_PX)
    rows = lay_out(plan, query_grid, layout).rows
    queries = query_grid**2
    assert sorted(rows[rows >= 0]) == list(range(len(plan.encoded) * queries))
    assert list(rows[-queries:]) == list(range(plan.num_slices * queries, (plan.num_slices + 1) * queries))
    assert lay_out(plan, query_grid, layout).num_visual_tokens == len(plan.encoded) * queries
    separators = rows[rows < 0]
    if plan.num_slices == 0:
        assert len(separators) == 0
    elif layout == "stitched":
        lines = [NEWLINE] * (plan.grid.height * query_grid)
        assert list(separators) == [*lines, NEWLINE if plan.grid.width == 1 else COMMA]
    else:
        assert list(separators) == ([COMMA] * (plan.grid.width - 1) + [NEWLINE]) * plan.grid.height


def test_stitched_layout_crosses_slices_in_raster_order() -> None:
    plan = plan_slices(Size(427, 640), SlicingConfig(), PATCH_PX)  # one row of two slices
    rows = lay_out(plan, 2, "stitched").rows
    n, c = NEWLINE, COMMA
    np.testing.assert_array_equal(rows, [0, 1, 4, 5, n, 2, 3, 6, 7, n, c, 8, 9, 10, 11])


def test_per_slice_layout_ends_rows_of_slices_with_a_newline() -> None:
    plan = plan_slices(Size(480, 640), SlicingConfig(), PATCH_PX)  # two rows of two slices
    rows = lay_out(plan, 1, "per_slice").rows
    np.testing.assert_array_equal(rows, [0, COMMA, 1, NEWLINE, 2, COMMA, 3, NEWLINE, 4])
