"""Transformer Engine's layers and Megatron's local ones write the same entries, and each loads what the other wrote."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sicog_mcore.build import Build, build_chunks, build_model, plan_build
from sicog_mcore.checkpoint.part_reader import load_parts, read_tensors
from sicog_mcore.checkpoint.store import CheckpointStore, RunState
from sicog_mcore.checkpoint.targets import PARTS, local_parameters
from sicog_mcore.config import Experiment
from sicog_mcore.errors import CheckpointError
from sicog_mcore.model.capability import AttentionChoice, LayerChoice, LayerKind
from sicog_mcore.model.vlm import VisionLanguageModel
from sicog_mcore.parallel.ddp import TrainableModel
from sicog_mcore.parallel.topology import Topology, start_topology, stop_topology
from sicog_mcore.train.reference import FrozenReference
from sicog_mcore.train.step import NextToken, train_step
from tests.batches import random_batches
from tests.builders import ASSETS, tiny_experiment
from tests.fake_te import fake_transformer_engine
from tests.tolerances import PACKED_LOSS

KINDS: tuple[LayerKind, ...] = ("te", "local")
DECODERS: dict[str, dict[str, Any]] = {
    "qwen2": {"qkv_bias": True, "tie_embeddings": False},
    "qwen3": {"qkv_bias": False, "qk_norm": True, "tie_embeddings": True},
    "llama": {"qkv_bias": False, "tie_embeddings": False},
}


@pytest.fixture(scope="module", autouse=True)
def topology() -> Iterator[Topology]:
    with fake_transformer_engine():
        yield start_topology(tiny_experiment(Path("unused")).parallel, seed=0)
        stop_topology()


def experiment_in(folder: Path, decoder: str) -> Experiment:
    return tiny_experiment(folder, data={"token_budget": 512}, model={"decoder": DECODERS[decoder]})


def plan(experiment: Experiment, kind: LayerKind) -> Build:
    attention = AttentionChoice("te" if kind == "te" else "sdpa", "the test's choice")
    return replace(plan_build(experiment), layers=LayerChoice(kind, "the test's choice"), attention=attention)


def trained(experiment: Experiment, kind: LayerKind, topology: Topology) -> TrainableModel:
    """A step on, with norms and biases that differ from each other."""
    model = build_model(plan(experiment, kind), topology)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in weights(model).values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    train_step(model, random_batches(experiment, 1), 1e-3, NextToken())
    return model


def weights(model: TrainableModel) -> dict[str, Tensor]:
    """By the names of local layers, in one order for both kinds."""
    return dict(sorted((name, parameter.data) for name, parameter in local_parameters(model.chunks)))  # type: ignore[arg-type]


def loss(model: Any, experiment: Experiment) -> float:
    with torch.no_grad():
        return float(model(random_batches(experiment, 1, seed=9)[0]).mean())


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_entries_of_a_checkpoint_are_the_committed_ones(kind: LayerKind, decoder: str, topology: Topology) -> None:
    (chunk,) = build_chunks(plan(experiment_in(Path("unused"), decoder), kind), topology)
    entries = chunk.sharded_state_dict(metadata={"dp_cp_group": topology.groups.dp_cp})
    expected = (ASSETS / "checkpoint_keys" / f"{decoder}.txt").read_text().splitlines()
    assert sorted({entry.key for entry in entries.values()}) == expected
    # Megatron finds an optimizer's state by the parameter behind each entry.
    parameters = {id(parameter) for parameter in chunk.parameters()}
    assert {id(entry.data) for entry in entries.values()} == parameters


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("writer", "reader"), [("te", "te"), ("te", "local"), ("local", "te")])
def test_a_run_goes_on_with_either_kind_of_layers(
    writer: LayerKind, reader: LayerKind, decoder: str, topology: Topology, tmp_path: Path
) -> None:
    experiment = experiment_in(tmp_path, decoder)
    source = trained(experiment, writer, topology)
    store = CheckpointStore(experiment, topology)
    folder = store.save(source, RunState(1))
    assert not [name for name, _, _ in read_tensors(folder) if "_extra_state" in name]

    resumed = build_model(plan(experiment, reader), topology)
    store.load(resumed, 1)
    (part,) = build_chunks(plan(experiment, reader), topology)
    load_parts([part], PARTS, folder, experiment, topology)
    expected = weights(source)
    for found in (weights(resumed), dict(local_parameters([part]))):
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert loss(part, experiment) == pytest.approx(loss(source.chunks[0], experiment), rel=PACKED_LOSS)
    steps = [train_step(m, random_batches(experiment, 1, seed=50), 1e-3, NextToken()) for m in (source, resumed)]
    assert steps[1].loss == pytest.approx(steps[0].loss, rel=PACKED_LOSS)
    for name, value in weights(source).items():  # moments came over too
        torch.testing.assert_close(weights(resumed)[name], value, rtol=0, atol=1e-5, msg=name)


def test_a_frozen_reference_with_transformer_engines_layers(topology: Topology, tmp_path: Path) -> None:
    experiment = experiment_in(tmp_path, "qwen3")
    model = trained(experiment, "te", topology)
    (copy,) = build_chunks(plan(experiment, "te"), topology)
    FrozenReference([copy], model)
    assert loss(copy, experiment) == loss(model.chunks[0], experiment)


def test_transformer_engines_attention_forgives_by_itself_where_we_keep_it(topology: Topology) -> None:
    """Any part of the model loads strictly without the attention's extra state, not the whole model alone."""
    (chunk,) = build_chunks(plan(experiment_in(Path("unused"), "qwen2"), "te"), topology)
    blocks = {"decoder": chunk.language_model.decoder, "tower": chunk.tower.transformer}  # type: ignore[union-attr]
    for name, block in blocks.items():
        state = block.state_dict()
        attention = [key for key in state if key.endswith("_extra_state") and "core_attention" in key]
        assert len(attention) == len(block.layers), name
        for key in attention:
            del state[key]
        assert block.load_state_dict(state, strict=True).missing_keys == [], name


def with_extra_states(model: VisionLanguageModel, original: Any) -> Any:
    """Wraps ``original`` so that it adds the states that versions before this one wrote beside the weights."""

    def described(prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> Any:
        state = original(prefix, sharded_offsets, metadata)
        decoder = model.language_model.sharded_state_dict(f"{prefix}language_model.", sharded_offsets, metadata)
        return state | {name: entry for name, entry in decoder.items() if "_extra_state" in name}

    return described


def test_older_checkpoints_with_extra_states_still_load(topology: Topology, tmp_path: Path) -> None:
    experiment = experiment_in(tmp_path, "qwen2")
    model, store = trained(experiment, "local", topology), CheckpointStore(experiment, topology)
    chunk: Any = model.chunks[0]
    chunk.sharded_state_dict = with_extra_states(chunk, chunk.sharded_state_dict)
    store.save(model, RunState(1))
    del chunk.sharded_state_dict
    fresh = build_model(plan(experiment, "te"), topology)
    store.load(fresh, 1)
    assert loss(fresh.chunks[0], experiment) == pytest.approx(loss(chunk, experiment), rel=PACKED_LOSS)


def test_a_checkpoint_with_other_entries_is_refused(topology: Topology, tmp_path: Path) -> None:
    experiment = experiment_in(tmp_path, "qwen2")
    model, store = trained(experiment, "local", topology), CheckpointStore(experiment, topology)
    chunk: Any = model.chunks[0]
    original = chunk.sharded_state_dict
    chunk.sharded_state_dict = lambda *a, **k: {n: e for n, e in original(*a, **k).items() if "class_emb" not in n}
    with pytest.raises(ValueError, match="not in model_sharded_state_dict"):
        store.save(model, RunState(1))
    del chunk.sharded_state_dict
    store.save(model, RunState(1))
    other = replace(
        experiment, model=replace(experiment.model, decoder=replace(experiment.model.decoder, qk_norm=True))
    )
    fresh = build_model(plan(other, "local"), topology)
    with pytest.raises(CheckpointError, match="does not hold this model and its optimizer: .+ such as language_model"):
        store.load(fresh, 1)
