"""Weights come back bit for bit, from every family, through a model under every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sicog_mcore.checkpoint.hf import WeightFiles
from sicog_mcore.config import ParallelConfig
from tests.checkpoint.foreign import DECODERS, experiment_for, write_clip, write_decoder, write_released
from tests.dist import Rank, run_ranks

pytestmark = pytest.mark.slow
LAYOUTS = {
    "one rank": (1, ParallelConfig()),
    "TP2": (2, ParallelConfig(tensor=2)),
    "PP2": (2, ParallelConfig(pipeline=2)),
    "TP2xPP2": (4, ParallelConfig(tensor=2, pipeline=2)),
}
SHARD_BYTES = 50_000  # several shards per model


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders clip, whole_clip, one per decoder, and the released layout in both nestings."""
    folder = tmp_path_factory.mktemp("foreign")
    write_clip(folder / "clip")
    write_clip(folder / "whole_clip", whole=True)
    for name in DECODERS:
        write_decoder(folder / name, name, shard="5GB" if name == "qwen2" else "40KB")
    for name, nested in (("released", True), ("released_flat", False)):
        write_released(folder / name, folder / "clip", folder / "qwen2", width=64, queries=16, nested=nested)
    return folder


def tensors(path: Path) -> dict[str, Tensor]:
    with WeightFiles(path) as files:
        return {name: files.whole(name).clone() for name in files.entries}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name].dtype != expected[name].dtype] == []
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def build(topology: Any, name: str, parallel: ParallelConfig, **init: str) -> Any:
    """This rank's chunks of a model that was drawn at random and then filled from ``init``."""
    from sicog_mcore.build import build_chunks, plan_build
    from sicog_mcore.checkpoint.weights import import_init
    from sicog_mcore.model.initialise import initialise

    experiment = experiment_for(name, parallel, **init)
    chunks = build_chunks(plan_build(experiment), topology)
    initialise(chunks, seed=9)
    import_init(chunks, experiment, topology)
    return chunks


def _convert_all(rank: Rank, parallel: ParallelConfig, foreign: Path, out: Path) -> None:
    from sicog_mcore.checkpoint.export import ExportOptions, export_hf

    topology = rank.start(parallel)
    sharded = ExportOptions(shard_bytes=SHARD_BYTES)
    for name in DECODERS:
        chunks = build(topology, name, parallel, decoder=str(foreign / name))
        export_hf(chunks, topology, out / name, "decoder", sharded)
    for name in ("clip", "whole_clip"):
        chunks = build(topology, "qwen2", parallel, tower=str(foreign / name))
        export_hf(chunks, topology, out / name, "tower", ExportOptions(fill_from=foreign / name))
    for name in ("released", "released_flat"):
        chunks = build(topology, "qwen2", parallel, checkpoint=str(foreign / name))
        export_hf(chunks, topology, out / name, "vlm", sharded)
    chunks = build(topology, "qwen2", parallel, checkpoint=str(out / "released"))
    export_hf(chunks, topology, out / "again", "vlm")


def as_exported(released: dict[str, Tensor]) -> dict[str, Tensor]:
    """The released layout in the names of our own, without the layers that our tower lacks."""
    names = {}
    for name in released:
        if "vision_model." in name:
            names[name] = "vision_tower.vision_model." + name.partition("vision_model.")[2]
        elif "mm_projector." in name:
            names[name] = name.replace("model.mm_projector.", "resampler.")
        else:
            names[name] = f"language_model.{name}"
    unused = ("encoder.layers.2.", "post_layernorm.")
    return {new: released[old] for old, new in names.items() if not any(part in new for part in unused)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_family_comes_back_bit_for_bit(name: str, foreign: Path, tmp_path: Path) -> None:
    world_size, parallel = LAYOUTS[name]
    run_ranks(_convert_all, world_size, parallel, foreign, tmp_path)
    for folder in (*DECODERS, "clip", "whole_clip"):
        assert_equal(tensors(tmp_path / folder), tensors(foreign / folder))
    expected = as_exported(tensors(foreign / "released"))
    for folder in ("released", "released_flat", "again"):
        assert_equal(tensors(tmp_path / folder), expected)
    assert len(list((tmp_path / "qwen3").glob("model-*.safetensors"))) > 1
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("name", DECODERS)
def test_an_exported_decoder_has_the_config_that_transformers_wrote(name: str, foreign: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    from sicog_mcore.checkpoint.hf_config import decoder_config

    (tmp_path / "config.json").write_text(json.dumps(decoder_config(DECODERS[name], "float32")))
    ours, theirs = (AutoConfig.from_pretrained(folder).to_dict() for folder in (tmp_path, foreign / name))
    free = {"max_position_embeddings", "bos_token_id", "eos_token_id", "head_dim", "_name_or_path", "attention_bias"}
    assert {key: value for key, value in ours.items() if key not in free} == {
        key: value for key, value in theirs.items() if key not in free
    }


def _fail_to_write(rank: Rank, out: Path) -> tuple[str, ...]:
    """A disk that fills up, and an occupied folder: what both ranks say."""
    from sicog_mcore.checkpoint.export import ExportOptions, export_hf
    from sicog_mcore.errors import CheckpointError

    parallel = ParallelConfig(tensor=2)
    topology = rank.start(parallel)
    chunks = build(topology, "qwen2", parallel)

    def no_space(folder: Path) -> None:
        raise OSError("No space left on device")

    messages = []
    for folder, options in ((out / "full", ExportOptions(add_files=no_space)), (out, ExportOptions())):
        try:
            export_hf(chunks, topology, folder, "decoder", options)
        except CheckpointError as error:
            messages.append(str(error))
    return tuple(messages)


def test_an_export_that_fails_on_the_writing_rank_fails_on_all_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    results = run_ranks(_fail_to_write, 2, tmp_path)
    assert results[0] == results[1]
    full, occupied = results[0]
    assert "No space left on device" in full and "exists already" in occupied
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
