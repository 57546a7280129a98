"""The sizes of all rows, found by measuring one after the other.

In: SampleIndex, Encoder   Out: RowSizes; what is wrong with bad rows stays in the SampleIndex   Next: plan.py
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sicog_mcore.data.encode import Encoder
from sicog_mcore.data.row_sizes import RowSizes
from sicog_mcore.data.sources import SampleIndex
from sicog_mcore.errors import SampleError

BLOCK_ROWS = 4096  # of a JSON or JSONL file are a shard


def measure_rows(samples: SampleIndex, encoder: Encoder) -> RowSizes:
    """Reads every row and the headers of its images once."""
    reasons: list[str] = [""]
    rows: list[Sequence[int]] = []
    for row in range(len(samples)):
        sample_id = f"row {row}"
        try:
            sample = samples.read(row)
            sample_id = sample.id
            found = encoder.measure(sample)
        except SampleError as error:
            samples.faults[row] = (sample_id, error.reason, error.detail)
            if error.reason not in reasons:
                reasons.append(error.reason)
            rows.append((0, 0, 0, reasons.index(error.reason), 0))
            continue
        rows.append((found.num_tokens, found.num_slices, found.attention, 0, found.is_truncated))
    table = np.array(rows, np.int64).reshape(-1, 5)
    return RowSizes(
        num_tokens=table[:, 0].astype(np.int32),
        num_slices=table[:, 1].astype(np.int32),
        attention=table[:, 2].copy(),
        reason=table[:, 3].astype(np.uint8),
        is_truncated=table[:, 4].astype(np.bool_),
        shards=samples.shards(BLOCK_ROWS),
        reasons=tuple(reasons),
    )
