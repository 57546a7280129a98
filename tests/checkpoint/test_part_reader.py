"""Weights move between layouts and stages through our own checkpoints: whole (part_writer.py), in parts, from runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sicog_mcore.config import Experiment, ParallelConfig
from sicog_mcore.errors import CheckpointError
from tests.checkpoint.foreign import experiment_for, write_clip, write_decoder
from tests.dist import Rank, run_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def topology() -> Iterator[Any]:
    from sicog_mcore.parallel.topology import start_topology, stop_topology

    yield start_topology(ParallelConfig(), seed=0)
    stop_topology()


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    write_clip(folder / "clip")
    for name in ("qwen3", "smollm2"):
        write_decoder(folder / name, name)
    return folder


def init_of(name: str, foreign: Path) -> dict[str, str]:
    return {"tower": str(foreign / "clip"), "decoder": str(foreign / name)}


def build(experiment: Experiment, topology: Any) -> Any:
    """This rank's chunks, drawn at random and then filled from ``init``."""
    from sicog_mcore.build import build_chunks, plan_build
    from sicog_mcore.checkpoint.weights import import_init
    from sicog_mcore.model.initialise import initialise

    chunks = build_chunks(plan_build(experiment), topology)
    initialise(chunks, seed=9)
    import_init(chunks, experiment, topology)
    return chunks


def parameters(chunks: Any) -> dict[str, Tensor]:
    return {name: value.detach() for chunk in chunks for name, value in chunk.named_parameters()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def _import_and_save(rank: Rank, parallel: ParallelConfig, names: tuple[str, ...], foreign: Path, out: Path) -> None:
    from sicog_mcore.checkpoint.part_writer import save_weights

    topology = rank.start(parallel)
    for name in names:
        experiment = experiment_for(name, parallel, **init_of(name, foreign))
        save_weights(build(experiment, topology), experiment, topology, out / name)


def test_an_import_under_another_layout_fills_the_same_model(topology: Any, foreign: Path, tmp_path: Path) -> None:
    """Megatron's own resharding is the witness: what four ranks imported is what one rank imports."""
    parallel, names = ParallelConfig(tensor=2, pipeline=2), ("qwen3", "smollm2")
    run_ranks(_import_and_save, 4, parallel, names, foreign, tmp_path)
    for name in names:
        expected = build(experiment_for(name, **init_of(name, foreign)), topology)
        found = build(experiment_for(name, checkpoint=str(tmp_path / name)), topology)
        assert_equal(parameters(found), parameters(expected))


def _load_and_export(rank: Rank, checkpoint: Path, out: Path) -> None:
    from sicog_mcore.checkpoint.export import export_hf

    topology = rank.start(ParallelConfig())
    chunks = build(experiment_for("smollm2", checkpoint=str(checkpoint)), topology)
    export_hf(chunks, topology, out, "decoder")


def test_replicas_load_and_export_as_one(topology: Any, foreign: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from sicog_mcore.checkpoint.part_writer import save_weights

    experiment = experiment_for("smollm2", **init_of("smollm2", foreign))
    save_weights(build(experiment, topology), experiment, topology, tmp_path / "ours")
    run_ranks(_load_and_export, 2, tmp_path / "ours", tmp_path / "theirs")
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "theirs", foreign / "smollm2"))
    assert_equal(found, expected)


@pytest.fixture(scope="module")
def saved(topology: Any, foreign: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint of qwen3 with weights only, and its parameters."""
    from sicog_mcore.checkpoint.part_writer import save_weights

    folder = tmp_path_factory.mktemp("saved") / "v2.5"
    experiment = experiment_for("qwen3", **init_of("qwen3", foreign))
    chunks = build(experiment, topology)
    save_weights(chunks, experiment, topology, folder)
    return folder, parameters(chunks)


def test_one_part_is_loaded_and_the_others_are_left(topology: Any, saved: Any) -> None:
    random = parameters(build(experiment_for("qwen3"), topology))
    chunks = build(experiment_for("qwen3", tower=str(saved[0])), topology)
    expected = {name: (saved[1] if name.startswith("tower.") else random)[name] for name in random}
    assert_equal(parameters(chunks), expected)


def test_a_part_fits_beside_another_decoder(topology: Any, saved: Any) -> None:
    chunks = build(experiment_for("smollm2", tower=str(saved[0]), resampler=str(saved[0])), topology)
    assert torch.equal(parameters(chunks)["resampler.proj"], saved[1]["resampler.proj"])


def test_precision_may_change(topology: Any, saved: Any) -> None:
    experiment = experiment_for("qwen3", checkpoint=str(saved[0]))
    experiment = replace(experiment, train=replace(experiment.train, precision="bf16"))
    assert_equal(parameters(build(experiment, topology)), {name: x.bfloat16() for name, x in saved[1].items()})


def test_a_run_stands_for_its_newest_checkpoint(topology: Any, tmp_path: Path) -> None:
    from sicog_mcore.build import build_model, plan_build
    from sicog_mcore.checkpoint.store import CheckpointStore, RunState

    experiment = replace(experiment_for("qwen2"), output=str(tmp_path / "run"))
    model = build_model(plan_build(experiment), topology)
    model.zero_grad()
    model.optimizer_step()
    store = CheckpointStore(experiment, topology)
    for step in (1, 2):
        with torch.no_grad():
            for value in parameters(model.chunks).values():
                value += step
        newest = store.save(model, RunState(step))
    for path in (tmp_path / "run", newest):
        assert_equal(
            parameters(build(experiment_for("qwen2", checkpoint=str(path)), topology)), parameters(model.chunks)
        )


def refusal(topology: Any, experiment: Experiment) -> str:
    with pytest.raises(CheckpointError) as caught:
        build(experiment, topology)
    return str(caught.value)


def test_another_model_is_refused_with_what_differs(topology: Any, saved: Any) -> None:
    experiment = experiment_for("qwen3", checkpoint=str(saved[0]))
    decoder = replace(experiment.model.decoder, ffn=128, norm_eps=1e-5)
    message = refusal(topology, replace(experiment, model=replace(experiment.model, decoder=decoder)))
    assert "model.decoder.ffn: 96 -> 128" in message and "model.decoder.norm_eps: 1e-06 -> 1e-05" in message


def test_positions_may_be_frozen_or_trained_from_stage_to_stage(topology: Any, saved: Any) -> None:
    experiment = experiment_for("qwen3", resampler=str(saved[0]))
    resampler = replace(experiment.model.resampler, train_positions=False)
    chunks = build(replace(experiment, model=replace(experiment.model, resampler=resampler)), topology)
    assert torch.equal(parameters(chunks)["resampler.pos_embed"], saved[1]["resampler.pos_embed"])


def test_a_damaged_checkpoint_is_refused(topology: Any, foreign: Path, tmp_path: Path) -> None:
    from sicog_mcore.checkpoint.part_writer import save_weights

    experiment = experiment_for("qwen3")
    chunks = build(experiment, topology)
    save_weights(chunks, experiment, topology, tmp_path / "x")
    with pytest.raises(CheckpointError, match="exists already"):
        save_weights(chunks, experiment, topology, tmp_path / "x")
    state = json.loads((tmp_path / "x" / "state.json").read_text())
    (tmp_path / "x" / "state.json").write_text(json.dumps(state))
    assert "state.json is damaged" in refusal(topology, experiment_for("qwen3", checkpoint=str(tmp_path / "x")))


def test_a_run_without_a_checkpoint_is_refused(topology: Any, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert "has no committed checkpoint" in refusal(topology, experiment_for("qwen3", decoder=str(tmp_path)))
