"""Marks images on disk, so that they are recognised: those of the items, and those that evaluation owns.

In: paths inside the folder of images; files, folders or TSV files of evaluation images   Out: ImageMark
Next: curated_round.py
An evaluation image that cannot be decoded is still known by its bytes. A source of evaluation images that has none is an
error: silence would let them into the training data.
"""

from __future__ import annotations

import base64
import csv
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sicog_mcore.cognition.curation.near_duplicates import ImageMark, mark_any, mark_image
from sicog_mcore.config import DataConfig
from sicog_mcore.data.decode import read_bytes
from sicog_mcore.data.rows import locate_image
from sicog_mcore.errors import ConfigError, ConfigProblem, SampleError

ENDINGS = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif"))
TSV = ".tsv"
TSV_IMAGE = "image"  # column of base64, as in VLMEvalKit's files
SHORTEST_IMAGE = 64  # characters; a shorter entry is the number of the row that has the image


def mark_items(paths: Iterable[str], images: Path, workers: int) -> Mapping[str, ImageMark | SampleError]:
    """The mark of every image, or the reason why it has none. Threads: Pillow decodes outside the interpreter's lock.

    Args:
        paths: as the records have them, relative to ``images``.
        workers: threads; the result does not depend on them.
    """
    root, limits = os.path.realpath(images), DataConfig()

    def mark(path: str) -> ImageMark | SampleError:
        try:
            return mark_image(read_bytes(locate_image(path, root)), limits)
        except SampleError as error:
            return error

    # An image with many questions is decoded once.
    distinct = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(distinct, pool.map(mark, distinct), strict=True))


def mark_evaluation(sources: Sequence[Path], workers: int) -> list[tuple[str, ImageMark]]:
    """Name and mark of all evaluation images.

    Raises:
        ConfigError: a source that does not exist, cannot be read, or has no image.
    """
    limits = DataConfig()
    marked: list[tuple[str, ImageMark]] = []
    with ThreadPoolExecutor(workers) as pool:
        for source in sources:
            try:
                named = list(pool.map(lambda pair: (pair[0], mark_any(pair[1], limits)), _read(source)))
            except (OSError, ValueError, csv.Error) as error:
                raise _problem(source, str(error)) from error
            if not named:
                raise _problem(source, "holds no image")
            marked += named
    return marked


def _problem(source: Path, problem: str) -> ConfigError:
    fix = f"give an image, a folder of images, or a {TSV} file with images in base64 in its column {TSV_IMAGE!r}"
    return ConfigError([ConfigProblem("--evaluation", str(source), problem, fix)])


def _read(source: Path) -> Iterator[tuple[str, bytes]]:
    if source.suffix == TSV and source.is_file():
        yield from _read_tsv(source)
        return
    files = sorted(source.rglob("*")) if source.is_dir() else [source]
    for file in files:
        # A file that was named itself is taken whatever its ending; in a folder only images are.
        if file == source or (file.suffix.lower() in ENDINGS and file.is_file()):
            yield file.name, file.read_bytes()


def _read_tsv(source: Path) -> Iterator[tuple[str, bytes]]:
    csv.field_size_limit(sys.maxsize)
    with source.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file, delimiter="\t"), 2):
            entry = row.get(TSV_IMAGE) or ""
            # The row that the number names has the image itself, so nothing is lost here.
            if len(entry) >= SHORTEST_IMAGE:
                yield f"{source.name}:{number}", base64.b64decode(entry)
