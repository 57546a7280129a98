"""Looks again at images for which rows were refused: an image that was missing may have been copied meanwhile.

In: blocks of a file of rows that did not change   Out: those that must be indexed again   Next: build_index.py
Images beside a file of rows are not watched, they are too many. Those of refused rows are few, and being told of a missing
image one puts it where it belongs; the row itself stays as it is, so nothing else would tell.
"""

from __future__ import annotations

import os

import numpy as np

from sicog_mcore.config import DataConfig
from sicog_mcore.data.decode import read_stored_size
from sicog_mcore.data.index.index_store import FileBlocks
from sicog_mcore.data.index.indexed_files import BlockedFile
from sicog_mcore.data.index.row_blocks import BlockSpan
from sicog_mcore.data.rows import BuildSample
from sicog_mcore.data.sources import DataFile
from sicog_mcore.errors import SampleError

OF_FILES = frozenset(
    f"image_{what}"
    for what in (
        *("missing", "unreadable", "empty", "unidentified", "too_large", "aspect", "animated", "truncated", "corrupt"),
    )
)
MOST_ROWS = 5000  # of a file that are looked at; of more, so many that are spread evenly stand for all


def healed_blocks(file: DataFile, blocks: FileBlocks, build: BuildSample, limits: DataConfig) -> list[BlockSpan]:
    """The blocks with a row whose image is not refused any more, or for another reason.

    Args:
        file: no shard: a shard holds its images, and is another one if they are.
        blocks: all blocks of the file.
        build: gives a row its meaning.
        limits: ``max_image_px`` and ``max_aspect`` are used.
    """
    images = os.path.realpath(file.images)
    source = BlockedFile(str(file.path), images, file.name, build, blocks.spans, blocks.tables)
    suspects = _suspects(blocks)
    if not len(suspects):
        return []
    chosen = suspects
    if len(suspects) > MOST_ROWS:
        chosen = suspects[np.linspace(0, len(suspects) - 1, MOST_ROWS).astype(np.int64)]
    healed = [row for row in chosen.tolist() if _reason(source, row, limits) != _stored(source, row)]
    if healed and len(chosen) < len(suspects):
        healed = suspects.tolist()  # some were not looked at
    return [span for span in blocks.spans if any(span.first_row <= row < span.first_row + span.rows for row in healed)]


def _suspects(blocks: FileBlocks) -> np.ndarray:
    """Numbers of the rows that were refused for an image file: int64 [rows]."""
    found = [np.empty(0, np.int64)]
    for span, table in zip(blocks.spans, blocks.tables, strict=True):
        codes = [code for code, reason in enumerate(table.header.reasons) if reason in OF_FILES]
        if codes:
            found.append(span.first_row + np.flatnonzero(np.isin(table.numbers("reason"), codes)))
    return np.concatenate(found)


def _stored(source: BlockedFile, row: int) -> str:
    fault = source.fault(row)
    return fault.reason if fault else ""


def _reason(source: BlockedFile, row: int, limits: DataConfig) -> str:
    """Why a row's images cannot be used now; empty if they can."""
    try:
        for image in source.read(row).images:
            read_stored_size(image, limits)
    except SampleError as error:
        return error.reason
    return ""
