"""Spoiled images: the masked area is exact, everything is decided by id and seed, shapes are what they must be."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from sicog_mcore.data.corrupt import CORRUPTIONS, MASKED_SHARE, Corruption, corrupt, half_plane_offset, random_of

AREA = 1e-6  # of the whole, absolute
HEIGHT, WIDTH = 90, 140
PICTURE = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def cut_area(height: float, width: float, angle: float, offset: float) -> float:
    """Share of a rectangle below a line: the polygon clipped corner by corner, and its shoelace sum."""
    normal = np.array([math.cos(angle), math.sin(angle)])
    corners = np.array([(0.0, 0.0), (width, 0.0), (width, height), (0.0, height)])
    kept: list[np.ndarray] = []
    for a, b in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        da, db = normal @ a - offset, normal @ b - offset
        if da <= 0:
            kept.append(a)
        if da * db < 0:
            kept.append(a + (b - a) * da / (da - db))
    x, y = np.array(kept).T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2 / (height * width)


def test_line_cuts_off_exactly_the_share_for_any_direction_and_shape() -> None:
    random = np.random.default_rng(1)
    for _ in range(2000):
        height, width, angle = random.uniform(1, 3000), random.uniform(1, 3000), random.uniform(0, 2 * math.pi)
        share = random.uniform(0.01, 0.99)
        offset = half_plane_offset(height, width, angle, share)
        assert cut_area(height, width, angle, offset) == pytest.approx(share, abs=AREA)


@pytest.mark.parametrize("quarter", range(8))
def test_line_along_an_edge_or_a_diagonal_is_exact_too(quarter: int) -> None:
    angle = quarter * math.pi / 4
    assert cut_area(50, 80, angle, half_plane_offset(50, 80, angle, 0.3)) == pytest.approx(0.3, abs=AREA)


def test_masked_pixels_are_the_share_within_a_row_of_pixels_and_have_their_mean_colour() -> None:
    gradient = np.stack(np.broadcast_arrays(*np.mgrid[:HEIGHT, :WIDTH], 7), axis=-1).astype(np.uint8)
    for seed in range(50):
        masked = CORRUPTIONS["mask"](gradient, random_of("x", seed))
        colours, counts = np.unique(masked.reshape(-1, 3), axis=0, return_counts=True)
        fill = colours[counts.argmax()]
        hidden = (masked == fill).all(-1)
        slack = math.hypot(HEIGHT, WIDTH) / (HEIGHT * WIDTH)
        assert MASKED_SHARE[0] - slack <= hidden.mean() <= MASKED_SHARE[1] + slack
        assert np.abs(gradient[hidden].mean(0) - fill).max() <= 1.0
        assert (masked[~hidden] == gradient[~hidden]).all()


def test_share_of_the_mask_is_spread_over_its_range() -> None:
    flat = np.zeros((400, 400, 3), np.uint8)
    flat[:, :, 0] = np.arange(400)[:, None] % 251
    shares = []
    for seed in range(60):
        masked = CORRUPTIONS["mask"](flat, random_of("x", seed))
        shares.append(float((masked != flat).any(-1).mean()))
    assert min(shares) < 0.27 and max(shares) > 0.33


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_id_and_seed_decide_everything(kind: Corruption) -> None:
    def spoil(sample_id: str, seed: int) -> bytes:
        return corrupt(PICTURE, sample_id, seed, [kind]).pixels.tobytes()

    before = PICTURE.copy()
    assert spoil("a", 3) == spoil("a", 3)
    assert len({spoil(sample_id, seed) for sample_id in "abcd" for seed in (1, 2)}) > 1
    assert (before == PICTURE).all()


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize(("height", "width"), [(HEIGHT, WIDTH), (1, 1), (1, 50), (33, 2)])
def test_shapes_and_types(kind: Corruption, height: int, width: int) -> None:
    pixels, used = corrupt(PICTURE[:height, :width], "s", 0, [kind])
    turned = (width, height, 3) if kind == "mirror_rotation" else (height, width, 3)
    assert (pixels.shape, pixels.dtype, used) == (turned, np.uint8, kind)


def test_mirrored_picture_is_turned_to_either_side() -> None:
    found = {CORRUPTIONS["mirror_rotation"](PICTURE, random_of("s", seed)).tobytes() for seed in range(20)}
    mirrored = PICTURE[:, ::-1]
    assert found == {np.rot90(mirrored, 1).tobytes(), np.rot90(mirrored, 3).tobytes()}


def test_blur_takes_the_noise_away_and_keeps_the_mean() -> None:
    blurred = CORRUPTIONS["blur"](PICTURE, random_of("s", 0))
    assert blurred.std() < PICTURE.std() / 5
    assert blurred.mean() == pytest.approx(PICTURE.mean(), abs=1.0)


def test_grey_has_no_colour_to_change() -> None:
    grey = np.full((4, 4, 3), 128, np.uint8)
    spoiled = CORRUPTIONS["colour"](grey, random_of("s", 0))
    assert (spoiled == spoiled[..., :1]).all()


def test_ways_are_drawn_evenly() -> None:
    small = PICTURE[:4, :4]
    drawn = Counter(corrupt(small, str(i), 0).kind for i in range(400))
    assert set(drawn) == set(CORRUPTIONS) and min(drawn.values()) > 70
