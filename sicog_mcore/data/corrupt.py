"""Spoils images in four ways; answers given to spoiled images are the rejected side of preference pairs.

In: uint8 [H, W, 3], the sample's id and a seed   Out: uint8 [H', W', 3], the same for the same id and seed
They mirror the steps of a chain of description: appearance (blur), attributes (colour), relations (mirror and rotation),
missing content (mask). Next: tools/make_pairs.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

BLUR_SIGMA_PX = (3.0, 5.0)
JITTER_FACTOR = (0.2, 1.8)  # of brightness, contrast and saturation: 1 +- 0.8
JITTER_HUE = 0.2  # of the colour circle, to either side
QUARTER_TURNS = (1, 3)
MASKED_SHARE = (0.25, 0.35)  # of the area
HUE_STEPS = 256

Corruption = Literal["blur", "colour", "mirror_rotation", "mask"]
Pixels: TypeAlias = NDArray[np.uint8]


class Corrupted(NamedTuple):
    """A spoiled image, and how it was spoiled."""

    pixels: Pixels
    kind: Corruption


def corrupt(pixels: Pixels, sample_id: str, seed: int, kinds: Sequence[Corruption] = get_args(Corruption)) -> Corrupted:
    """Spoils an image in one way, drawn uniformly from ``kinds``.

    Args:
        pixels: uint8 [H, W, 3].
        sample_id: with ``seed`` it decides everything that is drawn.
        seed: of the run.
        kinds: ways to choose from.
    """
    random = random_of(sample_id, seed)
    kind = kinds[int(random.integers(len(kinds)))]
    return Corrupted(CORRUPTIONS[kind](pixels, random), kind)


def random_of(sample_id: str, seed: int) -> np.random.Generator:
    """The random numbers of one sample, on any machine and in any order of samples."""
    # Hash and seed both feed the generator, so neighbours in the data set share no numbers.
    digest = xxhash.xxh3_128_intdigest(sample_id.encode("utf-8", "surrogatepass"))
    return np.random.Generator(np.random.PCG64([seed, digest]))


def blur(pixels: Pixels, random: np.random.Generator) -> Pixels:
    """Gaussian blur; appearance is lost."""
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(random.uniform(*BLUR_SIGMA_PX))))


def jitter_colour(pixels: Pixels, random: np.random.Generator) -> Pixels:
    """Brightness, contrast, saturation and hue, in random order; attributes are wrong."""
    # All numbers are drawn before the order: the same ones then belong to the same change.
    brightness, contrast, saturation = random.uniform(*JITTER_FACTOR, size=3).tolist()
    shift = round(random.uniform(-JITTER_HUE, JITTER_HUE) * HUE_STEPS)
    changes: tuple[Callable[[Image.Image], Image.Image], ...] = (
        lambda image: ImageEnhance.Brightness(image).enhance(brightness),
        lambda image: ImageEnhance.Contrast(image).enhance(contrast),
        lambda image: ImageEnhance.Color(image).enhance(saturation),
        lambda image: _turn_hue(image, shift),
    )
    image = Image.fromarray(pixels)
    for change in random.permutation(len(changes)).tolist():
        image = changes[change](image)
    return np.asarray(image)


def _turn_hue(image: Image.Image, steps: int) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = Image.fromarray(np.asarray(hue) + np.uint8(steps % HUE_STEPS))  # wraps around like the circle
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def mirror_and_rotate(pixels: Pixels, random: np.random.Generator) -> Pixels:
    """Left and right exchanged, then turned by 90 or 270 degrees, nothing cut off; relations are wrong."""
    turns = QUARTER_TURNS[int(random.integers(len(QUARTER_TURNS)))]
    return np.ascontiguousarray(np.rot90(pixels[:, ::-1], turns))


def mask_half_plane(pixels: Pixels, random: np.random.Generator) -> Pixels:
    """One side of a random straight line takes its own mean colour; content is missing."""
    height, width, _ = pixels.shape
    angle, share = random.uniform(0.0, 2 * math.pi), random.uniform(*MASKED_SHARE)
    # Pixel centres; [height, width] each.
    rows, columns = np.mgrid[:height, :width] + 0.5
    hidden = columns * math.cos(angle) + rows * math.sin(angle) <= half_plane_offset(height, width, angle, share)
    masked = pixels.copy()
    if hidden.any():  # a one-pixel image may have no centre on that side
        masked[hidden] = pixels[hidden].mean(axis=0).round().astype(np.uint8)
    return masked


def half_plane_offset(height: float, width: float, angle: float, share: float) -> float:
    """Where a line of given direction cuts off a given share of a rectangle's area.

    The rectangle is [0, width] x [0, height] with normal (cos, sin) of ``angle``. Along the normal the length of the cut
    grows linearly from a corner, is constant, and falls again; so the area is quadratic, linear, quadratic, and each piece
    is solved for its offset.

    Returns:
        offset such that ``x * cos(angle) + y * sin(angle) <= offset`` holds on ``share`` of the area.
    """
    # Projections of the two sides on the normal: the corner that the line meets first lies at the sum of the negative
    # ones.
    x, y = width * math.cos(angle), height * math.sin(angle)
    lowest = min(x, 0.0) + min(y, 0.0)
    short, long = sorted((abs(x), abs(y)))
    small = min(share, 1.0 - share)  # the other half follows by symmetry
    # The cut grows until the line reaches the second corner, at a distance of ``short``. The triangle there has the
    # share short / (2 * long) of the area.
    if 2 * long * small <= short:
        distance = math.sqrt(2 * short * long * small)  # a triangle at the corner
    else:
        distance = long * small + short / 2  # a trapezium
    return lowest + (distance if share <= 0.5 else short + long - distance)


CORRUPTIONS: Mapping[Corruption, Callable[[Pixels, np.random.Generator], Pixels]] = {
    "blur": blur,
    "colour": jitter_colour,
    "mirror_rotation": mirror_and_rotate,
    "mask": mask_half_plane,
}
