"""Finds near-duplicates of texts and of images, exactly: of items that are alike, the first stays.

In: texts, or bytes of images, best first   Out: for each None, or the number of the kept one that it repeats
Next: curated_round.py
What stays depends on the order by merit alone, never on the order of files, and everything dropped is
like something kept. Not found: a picture that was mirrored, turned or cropped, a text in other words.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image

from sicog_mcore.config import DataConfig
from sicog_mcore.data.decode import decode_image
from sicog_mcore.errors import SampleError
from sicog_mcore.files import hash_bytes

# Scripts without spaces count by the sign, all others by the word.
SIGNS = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
WORD = re.compile(rf"[{SIGNS}]|[^\W{SIGNS}]+")
SHINGLE = 3  # words
GRID = (8, 9)  # cells of the reduced image; 8 differences in each of its 8 rows
BITS = 64
EDGE = 2  # steps of 255 below which two cells count as equal, so that the noise of a flat area sets no bits
COLOUR_TOLERANCE = 12.0  # mean difference of cells, in steps of 255; else all drawings on white would be one
EXACT = -1  # a radius: only equal bytes are duplicates

Shingles = NDArray[np.uint64]


@dataclass(frozen=True)
class ImageMark:
    """The mark by which an image is recognised.

    Attributes:
        content: xxh128 of the file's bytes, in hexadecimal.
        gradient: 64 bits, whether a cell of the reduced grey image is darker than its right neighbour (dHash); None for
            bytes that cannot be decoded.
        colours: uint8 [8, 9, 3] of the reduced image, as bytes.
    """

    content: str
    gradient: int | None
    colours: bytes


def mark_image(data: bytes, limits: DataConfig) -> ImageMark:
    """The mark of an encoded image.

    Raises:
        SampleError: the image cannot be decoded; reasons of decode.py.
    """
    height, width = GRID
    image = Image.fromarray(decode_image(data, limits))
    # The mean of each cell: fine noise, which compression changes, is averaged away.
    cells = np.asarray(image.resize((width, height), Image.Resampling.BOX))
    # Luma in whole numbers, so that a machine's rounding decides no bit.
    grey = cells.astype(np.int32) @ np.array([299, 587, 114]) // 1000
    # [8, 8]: signs of differences between neighbours, which brightness and contrast hardly change.
    bits = (grey[:, 1:] - grey[:, :-1] > EDGE).ravel()
    return ImageMark(content_hash(data), int.from_bytes(np.packbits(bits).tobytes(), "big"), cells.tobytes())


def mark_any(data: bytes, limits: DataConfig) -> ImageMark:
    """The mark of an image, also of one that cannot be decoded: such a one is known by its bytes alone."""
    try:
        return mark_image(data, limits)
    except SampleError:
        return ImageMark(content_hash(data), None, b"")


def content_hash(data: bytes) -> str:
    """As in ``Generation.image_hash``."""
    return hash_bytes(data)


def distance(one: ImageMark, other: ImageMark) -> int:
    """Bits in which two images differ; more than all bits if their colours differ, or if one cannot be decoded."""
    if one.gradient is None or other.gradient is None:
        return BITS + 1
    bits = (one.gradient ^ other.gradient).bit_count()
    shades = np.frombuffer(one.colours, np.uint8).astype(np.int16) - np.frombuffer(other.colours, np.uint8)
    return bits if float(np.abs(shades).mean()) <= COLOUR_TOLERANCE else BITS + 1


class ImageIndex:
    """Images of which those close to a given one are found, without comparing it with all.

    Two hashes that differ in at most r bits agree in at least one of r + 1 parts, so only images that share a part are
    compared: about n / 2^(64 / (r + 1)) of n for each part.

    Args:
        radius: largest distance in bits, or EXACT.
    """

    def __init__(self, radius: int) -> None:
        self._radius = radius
        # r + 1 parts of the 64 bits, nearly equal in length: r differences cannot reach all of them, so one part is
        # equal.
        borders = np.linspace(0, BITS, radius + 2).astype(int).tolist() if radius >= 0 else []
        self._parts = [(low, (1 << (high - low)) - 1) for low, high in zip(borders, borders[1:], strict=False)]
        self._marks: dict[int, ImageMark] = {}
        self._same: dict[Hashable, int] = {}
        self._alike: defaultdict[Hashable, list[tuple[int, int]]] = defaultdict(list)  # number and gradient

    def add(self, number: int, mark: ImageMark, group: Hashable = None) -> None:
        """Remembers an image under a number; images of different groups never meet."""
        self._marks[number] = mark
        self._same.setdefault((group, mark.content), number)
        for key in self._keys(mark, group):
            self._alike[key].append((number, mark.gradient or 0))

    def find(self, mark: ImageMark, group: Hashable = None) -> int | None:
        """The one with equal bytes, else the first one within the radius, else None."""
        if (same := self._same.get((group, mark.content))) is not None or mark.gradient is None:
            return same
        # Bits first, from numbers in memory; colours are compared only for those few.
        near = {
            number
            for key in self._keys(mark, group)
            for number, gradient in self._alike.get(key, ())
            if (gradient ^ mark.gradient).bit_count() <= self._radius
        }
        # The smallest number is the best item, since the best are added first.
        return next((number for number in sorted(near) if distance(mark, self._marks[number]) <= self._radius), None)

    def _keys(self, mark: ImageMark, group: Hashable) -> list[Hashable]:
        if mark.gradient is None:
            return []
        return [(group, low, mark.gradient >> low & mask) for low, mask in self._parts]


def repeated_images(marks: Sequence[ImageMark], groups: Sequence[Hashable], radius: int) -> list[int | None]:
    """For each image, best first, the kept one of its group that it is like; None where it is kept itself."""
    index = ImageIndex(radius)
    repeats: list[int | None] = []
    for number, (mark, group) in enumerate(zip(marks, groups, strict=True)):
        repeats.append(index.find(mark, group))
        # Only kept ones are compared with: a chain of small differences must not drop an image that is like none of
        # them.
        if repeats[-1] is None:
            index.add(number, mark, group)
    return repeats


def words(text: str) -> list[str]:
    """The words of a text, whatever their case, width and punctuation."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def shingles(text: str, min_words: int) -> Shingles:
    """Hashes of all runs of three words, ascending; none for a text so short that it may rightly occur twice."""
    found = words(text)
    if len(found) < max(min_words, SHINGLE):
        return np.empty(0, np.uint64)
    # A set: a phrase that a text repeats counts once.
    runs = {" ".join(found[start : start + SHINGLE]) for start in range(len(found) - SHINGLE + 1)}
    return np.array(sorted(xxhash.xxh3_64_intdigest(run.encode("utf-8", "surrogatepass")) for run in runs), np.uint64)


def similarity(one: Shingles, other: Shingles) -> float:
    """Shared part of the shingles of both (Jaccard); 0 for texts without any."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / max(len(one) + len(other) - shared, 1)


def repeated_texts(texts: Sequence[Shingles], threshold: float) -> list[int | None]:
    """For each text, best first, the first kept one whose similarity reaches the threshold; None where it is kept itself.

    Two sets of such a similarity t share one of the n - ceil(t * n) + 1 rarest shingles of each, so only texts that do
    are compared: nothing is missed, and a phrase that all texts share costs nothing.

    Args:
        threshold: above 0, at most 1.
    """
    rarest = _by_rarity(texts)
    holders: defaultdict[int, list[int]] = defaultdict(list)
    repeats: list[int | None] = []
    for number, text in enumerate(texts):
        # Jaccard >= t needs t * n shared shingles at least. Were none of the rarest n - ceil(t * n) + 1 of one text
        # among those of the other, too few would be left to share. The small term keeps ceil from rounding up an exact
        # product.
        prefix = rarest[number][: len(text) - math.ceil(threshold * len(text) - 1e-9) + 1].tolist()
        near = sorted({holder for shingle in prefix for holder in holders.get(shingle, ())})
        found = next((holder for holder in near if similarity(text, texts[holder]) >= threshold - 1e-9), None)
        repeats.append(found)
        if found is None:
            for shingle in prefix:
                holders[shingle].append(number)
    return repeats


def _by_rarity(texts: Sequence[Shingles]) -> list[Shingles]:
    """The shingles of each text, those in the fewest texts first."""
    # One order of all shingles, rarest first and then by hash: prefixes can be compared only if all texts are sorted
    # alike.
    known, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *texts]), return_counts=True)
    return [text[np.lexsort((text, counts[np.searchsorted(known, text)]))] for text in texts]
