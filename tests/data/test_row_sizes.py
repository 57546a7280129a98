from __future__ import annotations

import numpy as np

from sicog_mcore.data.row_sizes import RowSizes


def sizes_of(rows: int, shards: list[int]) -> RowSizes:
    return RowSizes(
        num_tokens=np.arange(rows, dtype=np.int32),
        num_slices=np.arange(rows, dtype=np.int32) % 3,
        attention=np.arange(rows, dtype=np.int64) ** 2,
        reason=(np.arange(rows) % 2).astype(np.uint8),
        is_truncated=np.arange(rows) % 5 == 0,
        shards=np.array(shards),
        reasons=("", "too_long"),
    )


def test_the_first_rows_keep_whole_shards_and_cut_the_last_one() -> None:
    first = sizes_of(10, [0, 4, 8, 10]).first(6)
    assert len(first) == 6 and first.shards.tolist() == [0, 4, 6] and first.reasons == ("", "too_long")
    assert first.num_tokens.tolist() == [0, 1, 2, 3, 4, 5] and first.attention.tolist() == [0, 1, 4, 9, 16, 25]
    assert first.reason.tolist() == [0, 1] * 3 and first.is_truncated.tolist() == [True, *[False] * 4, True]
    assert sizes_of(10, [0, 4, 8, 10]).first(8).shards.tolist() == [0, 4, 8]
