"""The sizes of rows that are read once, without an index: what is only evaluated.

In: SampleIndex, Encoder   Out: RowSizes, and why bad rows cannot be used   Next: plan.py
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sicog_mcore.data.encode import Encoder
from sicog_mcore.data.quarantine import Rejection
from sicog_mcore.data.row_sizes import RowSizes
from sicog_mcore.data.sources import SampleIndex
from sicog_mcore.errors import SampleError


def measure_rows(samples: SampleIndex, encoder: Encoder) -> tuple[RowSizes, list[Rejection]]:
    """Reads every row and the headers of its images; all rows are one shard."""
    reasons: list[str] = [""]
    rows: list[Sequence[int]] = []
    rejected: list[Rejection] = []
    for row in range(len(samples)):
        sample_id = f"row {row}"
        try:
            sample = samples.read(row)
            sample_id = sample.id
            found = encoder.measure(sample)
        except SampleError as error:
            rejected.append(Rejection(sample_id, samples.origin(row), error.reason, error.detail, epoch=0))
            if error.reason not in reasons:
                reasons.append(error.reason)
            rows.append((0, 0, 0, reasons.index(error.reason), 0))
            continue
        rows.append((found.num_tokens, found.num_slices, found.attention, 0, found.is_truncated))
    table = np.array(rows, np.int64).reshape(-1, 5)
    sizes = RowSizes(
        num_tokens=table[:, 0].astype(np.int32),
        num_slices=table[:, 1].astype(np.int32),
        attention=table[:, 2].copy(),
        reason=table[:, 3].astype(np.uint8),
        is_truncated=table[:, 4].astype(np.bool_),
        shards=np.array([0, len(rows)], np.int64),
        reasons=tuple(reasons),
    )
    return sizes, rejected
