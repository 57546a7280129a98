"""Pickles of checkpoints are opened by a list of names: what is not on it is named and never called."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, Metadata, metadata

from sicog_mcore.errors import CheckpointError
from sicog_mcore.parallel.shard_files import METADATA, guarded, read_metadata, require_tensors_only


class Touch:
    """Makes a file where its pickle is opened in full."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def described(size: tuple[int, ...] = (4, 2)) -> Metadata:
    chunk = metadata.ChunkStorageMetadata(torch.Size((0,) * len(size)), torch.Size(size))
    properties = metadata.TensorProperties(dtype=torch.bfloat16)
    entry = metadata.TensorStorageMetadata(properties, torch.Size(size), [chunk])
    return Metadata({"w": entry, "rng": metadata.BytesStorageMetadata()}, planner_data={"left": "out"}, storage_data={})


def test_a_description_is_read_without_what_is_not_needed(tmp_path: Path) -> None:
    (tmp_path / METADATA).write_bytes(pickle.dumps(described()))
    found = read_metadata(tmp_path / METADATA)
    entry = found.state_dict_metadata["w"]
    assert isinstance(entry, metadata.TensorStorageMetadata)
    assert (entry.size, entry.properties.dtype) == (torch.Size((4, 2)), torch.bfloat16)
    assert list(found.state_dict_metadata) == ["w", "rng"] and found.planner_data is None


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda marker: pickle.dumps(Touch(marker)), "it names 'posix.system'"),
        (lambda marker: pickle.dumps({"w": 1}), "it is no description of a checkpoint"),
        (lambda marker: pickle.dumps(described((-1, 2))), "its entry 'w' is odd"),
        (lambda marker: pickle.dumps(described())[:-20], ""),
        (lambda marker: b"", ""),
    ],
    ids=["a call", "another thing", "a negative size", "cut", "empty"],
)
def test_what_is_no_description_is_refused_and_runs_nothing(tmp_path: Path, make: Any, said: str) -> None:
    marker = tmp_path / "ran"
    (tmp_path / METADATA).write_bytes(make(marker))
    with pytest.raises(CheckpointError, match="holds something else than a checkpoint's data") as raised:
        read_metadata(tmp_path / METADATA)
    assert said in str(raised.value) and not marker.exists()


def saved(value: Any) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def test_tensors_are_let_through_also_inside_a_larger_file(tmp_path: Path) -> None:
    tensors = saved({"w": torch.zeros(3), "b": [torch.ones(2, dtype=torch.bfloat16)]})
    (tmp_path / "whole.pt").write_bytes(tensors)
    (tmp_path / "part.distcp").write_bytes(b"x" * 100 + tensors + b"y" * 50)
    require_tensors_only(tmp_path / "whole.pt")
    require_tensors_only(tmp_path / "part.distcp", 100, len(tensors))
    with pytest.raises(CheckpointError):
        require_tensors_only(tmp_path / "part.distcp", 90, 20)
    (tmp_path / "evil.pt").write_bytes(saved({"w": torch.zeros(1), "x": Touch(tmp_path / "ran")}))
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        require_tensors_only(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_inside_the_guard_everyone_reads_what_was_read_before(tmp_path: Path) -> None:
    load, read = torch.load, FileSystemReader.read_metadata
    (tmp_path / "evil.pt").write_bytes(saved(Touch(tmp_path / "ran")))
    known = described()
    with guarded(known):
        assert FileSystemReader(tmp_path).read_metadata() is known
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (torch.load, FileSystemReader.read_metadata) == (load, read) and not (tmp_path / "ran").exists()
