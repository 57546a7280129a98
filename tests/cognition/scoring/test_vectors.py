"""Each distinct text is embedded once, in parts that do not depend on who makes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sicog_mcore.cognition.scoring.vectors import OPEN_PARTS, Shard, VectorStore, distinct
from sicog_mcore.errors import RecordError
from tests.cognition.agreeing import Written

BLOCK = 4
TEXTS = [f"{i % 10},1" for i in range(30)]  # 10 distinct ones: parts of 4, 4 and 2


def store(folder: Path, embedder: Written | None = None) -> tuple[VectorStore, Written]:
    embedder = embedder or Written()
    return VectorStore(folder, embedder, BLOCK), embedder


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_duplicates_are_embedded_once(tmp_path: Path) -> None:
    vectors, written = store(tmp_path)
    assert list(vectors.fill(TEXTS)) == [4, 8, 10]
    assert written.asked == TEXTS[:10] and len(vectors) == 10
    assert (vectors.embed(["7,1", "0,1", "7,1"]) == Written().embed(["7,1", "0,1", "7,1"])).all()
    assert len(written.asked) == 10


def test_shards_make_the_same_files_as_one_process(tmp_path: Path) -> None:
    whole, _ = store(tmp_path / "whole")
    list(whole.fill(TEXTS))
    for index in (2, 0, 1, 3):
        part, written = store(tmp_path / "parts")
        list(part.fill(TEXTS, Shard(index, 4)))
        assert written.asked == TEXTS[index * BLOCK : min(10, index * BLOCK + BLOCK)]
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    merged, written = store(tmp_path / "parts")
    merged.check(TEXTS)
    assert (merged.embed(TEXTS) == whole.embed(TEXTS)).all() and written.asked == []


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    for index in (0, 2):
        list(store(tmp_path)[0].fill(TEXTS, Shard(index, 3)))
    with pytest.raises(
        RecordError, match=r"1 of 3 parts are missing: 1 \([0-9a-f]{32}\.npy\); part p is made by shard p"
    ):
        store(tmp_path)[0].check(TEXTS)


def test_finished_parts_are_not_made_again(tmp_path: Path) -> None:
    first, _ = store(tmp_path)
    next(first.fill(TEXTS))  # killed after one part
    again, written = store(tmp_path)
    assert list(again.fill(TEXTS)) == [4, 6] and written.asked == TEXTS[4:10]


def test_parts_of_other_texts_or_another_embedder_are_never_taken(tmp_path: Path) -> None:
    list(store(tmp_path)[0].fill(TEXTS))
    other = Written()
    other.name = "other"
    assert list(store(tmp_path, other)[0].fill(TEXTS)) == [4, 8, 10]
    changed = [*TEXTS[:5], "99,1", *TEXTS[6:10]]
    vectors, written = store(tmp_path)
    list(vectors.fill(changed))
    assert written.asked == changed[4:8]  # only the block that changed


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    list(store(tmp_path)[0].fill(TEXTS))
    files = sorted(tmp_path.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    files[0].write_bytes(files[0].read_bytes()[:50])
    np.save(files[1], np.zeros((3, 2), np.float32))
    vectors, _ = store(tmp_path)
    vectors.check(TEXTS)
    with pytest.raises(RecordError, match="cannot be read .* delete it and run again"):
        vectors.embed(TEXTS[:1])
    with pytest.raises(RecordError, match="expected 4 vectors; delete it and run again"):
        vectors.embed(TEXTS[4:5])


def test_few_parts_are_open_at_a_time(tmp_path: Path) -> None:
    texts = [f"{i},1" for i in range(OPEN_PARTS + 5)]
    vectors = VectorStore(tmp_path, Written(), block=1)
    list(vectors.fill(texts))
    assert (vectors.embed(texts + texts[:1]) == Written().embed(texts + texts[:1])).all()
    assert len(vectors._open) == OPEN_PARTS


def test_distinct_texts_come_in_the_order_of_their_first_place() -> None:
    assert list(distinct(["b", "a", "b", "", "\ud800", "a"], {})) == ["b", "a", "", "\ud800"]
