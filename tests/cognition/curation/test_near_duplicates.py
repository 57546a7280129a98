"""Near-duplicates are found exactly, by merit and not by order, and pictures that only look alike in grey are told apart."""

from __future__ import annotations

import io
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sicog_mcore.cognition.curation.near_duplicates import (
    BITS,
    EXACT,
    ImageIndex,
    ImageMark,
    distance,
    mark_any,
    mark_image,
    repeated_images,
    repeated_texts,
    shingles,
    similarity,
    words,
)
from sicog_mcore.config import DataConfig
from sicog_mcore.errors import SampleError

LIMITS = DataConfig()
DEFAULT_RADIUS = 4  # of Curation
GREY = bytes(8 * 9 * 3)


def picture(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def disc(colour: str, left: int = 40) -> bytes:
    canvas = np.full((96, 96, 3), 255, np.uint8)
    rows, columns = np.mgrid[:96, :96]
    canvas[(rows - 48) ** 2 + (columns - left) ** 2 < 24**2] = Image.new("RGB", (1, 1), colour).getpixel((0, 0))
    return encoded(Image.fromarray(canvas))


def mark(gradient: int, content: str) -> ImageMark:
    return ImageMark(content, gradient, GREY)


def test_the_gradient_of_a_ramp_is_known() -> None:
    ramp = np.repeat(np.arange(0, 90, 10, dtype=np.uint8), 10)[None, :, None].repeat(80, 0).repeat(3, 2)
    assert mark_image(encoded(Image.fromarray(ramp)), LIMITS).gradient == 2**BITS - 1
    assert mark_image(encoded(Image.fromarray(ramp[:, ::-1])), LIMITS).gradient == 0
    half = ramp.copy()
    half[40:] = 7
    assert mark_image(encoded(Image.fromarray(half)), LIMITS).gradient == (2**32 - 1) << 32


@pytest.mark.parametrize("seed", range(5))
def test_a_picture_saved_anew_or_resized_is_the_same_and_another_one_is_not(seed: int) -> None:
    own = mark_image(encoded(picture(seed)), LIMITS)
    again = mark_image(encoded(picture(seed), "JPEG", quality=60), LIMITS)
    small = mark_image(encoded(picture(seed).resize((80, 60), Image.Resampling.BICUBIC)), LIMITS)
    other = mark_image(encoded(picture(seed + 100)), LIMITS)
    assert own.content != again.content
    assert distance(own, again) <= 2 and distance(own, small) <= DEFAULT_RADIUS
    assert distance(own, other) > 8


def test_drawings_of_other_colours_are_not_the_same() -> None:
    red, teal, moved = (mark_image(disc(*shape), LIMITS) for shape in (("red",), ("teal",), ("red", 60)))
    assert red.gradient == teal.gradient
    assert distance(red, teal) > BITS
    assert distance(red, red) == 0
    assert distance(red, moved) > 4


def test_bytes_that_are_no_image_are_known_by_their_hash_alone() -> None:
    with pytest.raises(SampleError):
        mark_image(b"no image", LIMITS)
    index = ImageIndex(8)
    index.add(5, mark_any(b"no image", LIMITS))
    assert index.find(mark_any(b"no image", LIMITS)) == 5
    assert index.find(mark_any(b"no picture", LIMITS)) is None


def test_of_images_that_are_alike_the_first_stays_and_groups_do_not_meet() -> None:
    chain = [mark(0b0, "a"), mark(0b1, "b"), mark(0b11, "c"), mark(0b0, "a")]
    assert repeated_images(chain, ["q"] * 4, 1) == [None, 0, None, 0]  # c is like b, which did not stay
    assert repeated_images(chain, ["q", "r", "q", "r"], 1) == [None, None, None, 1]
    assert repeated_images(chain, ["q"] * 4, EXACT) == [None, None, None, 0]


gradients = st.lists(
    st.integers(0, 3).flatmap(lambda base: st.sets(st.integers(0, 63), max_size=5).map(lambda bits: (base, bits))),
    max_size=25,
)


@given(gradients, st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_the_index_of_images_finds_what_comparing_all_finds(spec: list[tuple[int, set[int]]], radius: int) -> None:
    marks = []
    for number, (base, bits) in enumerate(spec):
        gradient = 0x0F0F_3355_AAAA_0001 * base % 2**64
        for bit in bits:
            gradient ^= 1 << bit
        marks.append(mark(gradient, str(number)))
    kept: list[int] = []
    expected: list[int | None] = []
    for number, one in enumerate(marks):
        expected.append(next((other for other in kept if distance(one, marks[other]) <= radius), None))
        if expected[-1] is None:
            kept.append(number)
    assert repeated_images(marks, [0] * len(marks), radius) == expected


def test_words_ignore_case_width_and_punctuation_and_count_signs() -> None:
    assert words("A Red—cup, ＡＢＣ!") == ["a", "red", "cup", "abc"]
    assert words("红色 cup杯子") == ["红", "色", "cup", "杯", "子"]


def test_similarity_is_the_shared_part_of_three_word_runs() -> None:
    one, other = shingles("a b c d e", 3), shingles("a b c d x", 3)
    assert (len(one), similarity(one, other), similarity(one, one)) == (3, 2 / 4, 1.0)
    assert len(shingles("a b c d e", 6)) == 0  # too short to be compared
    assert len(shingles("a b", 1)) == 0
    assert similarity(shingles("", 1), shingles("", 1)) == 0.0


def test_of_texts_that_are_alike_the_first_stays() -> None:
    base = " ".join(f"w{i}" for i in range(30))
    texts = [base, base.upper() + ".", base.replace("w15", "x"), "completely other words " * 9, ""]
    sets = [shingles(text, 20) for text in texts]
    assert similarity(sets[0], sets[2]) == pytest.approx(25 / 31)
    assert repeated_texts(sets, 0.9) == [None, 0, None, None, None]
    assert repeated_texts(sets, 25 / 31) == [None, 0, 0, None, None]


texts = st.lists(st.lists(st.integers(0, 6), max_size=12).map(lambda codes: " ".join(map(str, codes))), max_size=14)


@given(texts, st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 2 / 3, 0.8, 1.0]))
@settings(max_examples=50, deadline=None)
def test_no_pair_of_texts_is_missed(found: list[str], threshold: float) -> None:
    sets = [shingles(text, 3) for text in found]
    kept: list[int] = []
    expected: list[int | None] = []
    for number, one in enumerate(sets):
        near = (other for other in kept if similarity(one, sets[other]) >= threshold - 1e-9)
        expected.append(next(near, None))
        if expected[-1] is None:
            kept.append(number)
    assert repeated_texts(sets, threshold) == expected
    assert all(similarity(sets[a], sets[b]) < threshold for a, b in combinations(kept, 2))
