"""Safetensors folders are read by rows, damage is named, and a written folder appears whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sicog_mcore.checkpoint.hf import INDEX, ShardWriter, WeightFiles, read_config
from sicog_mcore.errors import CheckpointError

TENSORS = {"a": torch.arange(12.0).reshape(4, 3), "b": torch.arange(5.0), "c": torch.zeros(2, 2, dtype=torch.bfloat16)}


def write_sharded(folder: Path) -> Path:
    """Two shards: a and b in one, c in the other."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, folder / "one.safetensors")
    save_file({"c": TENSORS["c"]}, folder / "two.safetensors")
    places = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def place(folder: Path, name: str, file: str) -> None:
    """Changes one entry of the index."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))


def error_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        WeightFiles(path)
    return str(caught.value)


@pytest.mark.parametrize("name", ["", INDEX])
def test_shards_are_read_as_one_through_their_index(name: str, tmp_path: Path) -> None:
    with WeightFiles(write_sharded(tmp_path) / name) as files:
        assert {name: (e.shape, e.dtype) for name, e in files.entries.items()} == {
            "a": ((4, 3), "F32"),
            "b": ((5,), "F32"),
            "c": ((2, 2), "BF16"),
        }
        assert torch.equal(files.read("a", 0, 1, 2), TENSORS["a"][1:3])
        assert torch.equal(files.read("a", 1, 1, 1), TENSORS["a"][:, 1:2])
        assert torch.equal(files.read("b", 0, 4, 1), TENSORS["b"][4:])
        assert torch.equal(files.whole("c"), TENSORS["c"])


@pytest.mark.parametrize("file", ["model.safetensors", "anything.safetensors"])
def test_a_folder_or_a_file_of_one_shard_is_read(file: str, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / file)
    for path in (tmp_path, tmp_path / file):
        with WeightFiles(path) as files:
            assert files.entries.keys() == TENSORS.keys()


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    shard = write_sharded(tmp_path) / "one.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    assert error_of(tmp_path).startswith(f"{shard} cannot be read") and "truncated" in error_of(tmp_path)


def test_a_shard_that_the_index_names_but_is_not_there_is_named(tmp_path: Path) -> None:
    (write_sharded(tmp_path) / "two.safetensors").unlink()
    assert "files that are missing: two.safetensors (with c" in error_of(tmp_path)


def test_an_index_at_odds_with_its_shards_names_the_tensors(tmp_path: Path) -> None:
    place(write_sharded(tmp_path), "b", "two.safetensors")
    message = error_of(tmp_path)
    assert "one.safetensors" in message and f"it holds b, which {INDEX} places elsewhere" in message


@pytest.mark.parametrize("file", ["../one.safetensors", "/etc/hostname"])
def test_an_index_cannot_point_out_of_its_folder(file: str, tmp_path: Path) -> None:
    place(write_sharded(tmp_path), "b", file)
    assert "only files beside the index are read" in error_of(tmp_path)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "mm_projector.pt", "x.pth"])
def test_a_pickle_is_never_opened(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"not even a pickle")
    for path in (tmp_path, tmp_path / file):
        message = error_of(path)
        assert str(tmp_path / file) in message and "never opened" in message and "unpickle" in message


def test_what_holds_no_weights_says_what_was_expected(tmp_path: Path) -> None:
    assert "holds no weights; expected model.safetensors" in error_of(tmp_path)
    assert "does not exist" in error_of(tmp_path / "nowhere")
    for name in ("a", "b"):
        save_file(TENSORS, tmp_path / f"{name}.safetensors")
    assert f"2 .safetensors files but no {INDEX}" in error_of(tmp_path)
    (tmp_path / INDEX).write_text("{")
    assert f"{tmp_path / INDEX} cannot be read" in error_of(tmp_path)
    (tmp_path / "text.safetensors").write_text("hello, this is a text")
    assert "no safetensors file" in error_of(tmp_path / "text.safetensors")


def test_a_config_is_read_beside_a_file_too(tmp_path: Path) -> None:
    assert read_config(tmp_path) == {}
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    assert read_config(tmp_path / "model.safetensors") == read_config(tmp_path) == {"model_type": "x"}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_config(tmp_path)


def test_tensors_that_fit_are_written_as_one_file(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "out")
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    assert not (tmp_path / "out").exists()
    assert writer.finish() == 12 * 4 + 5 * 4 + 4 * 2
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in TENSORS.items())
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_shards_keep_their_bound_and_their_index_is_complete(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "out", shard_bytes=30)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    writer.finish()
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index == {
        "metadata": {"total_size": 76},
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",  # larger than the bound: alone
            "b": "model-00002-of-00002.safetensors",
            "c": "model-00002-of-00002.safetensors",
        },
    }
    with WeightFiles(tmp_path / "out") as files:
        assert all(torch.equal(files.whole(name), tensor) for name, tensor in TENSORS.items())


def test_a_folder_with_something_in_it_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    ShardWriter(tmp_path / "out").finish()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        ShardWriter(tmp_path / "out")


def test_an_abandoned_export_leaves_nothing(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "out", shard_bytes=1)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    writer.abandon()
    assert list(tmp_path.iterdir()) == []
