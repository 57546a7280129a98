"""Numbers of rows: the first rows alone keep their shards, the last one cut."""

from __future__ import annotations

import numpy as np
import pytest

from sicog_mcore.data.row_sizes import RowSizes


def sizes(rows: int, shards: list[int]) -> RowSizes:
    numbers = np.arange(rows)
    return RowSizes(
        num_tokens=numbers.astype(np.int32),
        num_slices=(numbers + 100).astype(np.int32),
        attention=numbers.astype(np.int64) ** 2,
        reason=(numbers % 2).astype(np.uint8),
        is_truncated=numbers % 3 == 0,
        shards=np.array(shards, np.int64),
        reasons=("", "too_long"),
    )


@pytest.mark.parametrize(
    ("rows", "shards"), [(10, [0, 4, 7, 10]), (8, [0, 4, 7, 8]), (7, [0, 4, 7]), (3, [0, 3]), (0, [0])]
)
def test_the_first_rows_keep_their_numbers_and_shards(rows: int, shards: list[int]) -> None:
    first = sizes(10, [0, 4, 7, 10]).first(rows)
    assert len(first) == rows and first.shards.tolist() == shards and first.reasons == ("", "too_long")
    assert first.num_tokens.tolist() == list(range(rows)) and first.attention.tolist() == [i * i for i in range(rows)]
    assert len(first.reason) == len(first.is_truncated) == len(first.num_slices) == rows
