"""Measuring held-out rows during training: right numbers under every layout, and training does not notice."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from sicog_mcore.build import build_model, plan_build
from sicog_mcore.config import Experiment, SourceConfig
from sicog_mcore.errors import DataError
from sicog_mcore.parallel.topology import Topology, start_topology, stop_topology
from sicog_mcore.rollout.requests import Answer, Request, Result, Sampling
from sicog_mcore.train.held_out_check import HeldOutCheck
from sicog_mcore.train.step import NextToken, train_step
from tests.batches import random_batches
from tests.builders import tiny_experiment, write_dataset
from tests.e2e.runs import train_ranks
from tests.pairs import write_pairs
from tests.tolerances import LAYOUT_LOSS

STEPS, EVERY = 5, 2
MEASURED = [2, 4, 5]  # the last step too
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tensor": 2}),
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "PP2 interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "DP2 overlapped": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows to train on, and others: 11 of which the last has no image, and an image is damaged behind its header."""
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, 20)
    path = write_dataset(folder / "held_out", 11, seed=3)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    broken = rows[1] | {"id": "broken", "image": "none.png"}
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, broken]))
    image = folder / "held_out" / "images" / rows[1]["image"]
    image.write_bytes(image.read_bytes()[:-400])
    return folder


def experiment_in(folder: Path, output: Path, every: int = EVERY, **parallel: Any) -> Experiment:
    held_out = SourceConfig(path=str(folder / "held_out" / "data.jsonl"), images=str(folder / "held_out" / "images"))
    return tiny_experiment(
        folder,
        output=str(output),
        train={"steps": STEPS, "packs_per_step": 4, "tensorboard": False},
        data={"token_budget": 512},
        checkpoint={"every_steps": EVERY},
        held_out={"every_steps": every, "sources": (held_out,)},
        parallel=parallel,
    )


def of_held_out(metrics: list[dict[str, Any]]) -> list[tuple[int, str, int, int]]:
    """(step, loss to the last bit, tokens, rows left out) of the measured steps."""
    return [
        (line["step"], float(line["held_out_loss"]).hex(), line["held_out_tokens"], line["held_out_refused"])
        for line in metrics
        if "held_out_loss" in line
    ]


@pytest.fixture(scope="module")
def one_rank(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    output = tmp_path_factory.mktemp("one_rank")
    return train_ranks(experiment_in(folder, output), 1), output


@pytest.mark.slow
def test_training_is_the_same_to_the_last_bit(folder: Path, one_rank: Any, tmp_path: Path) -> None:
    metrics, _ = one_rank
    plain = train_ranks(experiment_in(folder, tmp_path, every=0), 1)
    assert [(line["loss"], line["grad_norm"]) for line in metrics] == [(x["loss"], x["grad_norm"]) for x in plain]
    found = of_held_out(metrics)
    assert [step for step, *_ in found] == MEASURED and of_held_out(plain) == []
    assert {(tokens > 50, refused) for _, _, tokens, refused in found} == {(True, 2)}
    assert len({loss for _, loss, _, _ in found}) == 3  # the model learns
    for line in metrics:
        if "held_out_loss" in line:
            assert line["held_out_perplexity"] == pytest.approx(math.exp(line["held_out_loss"]), rel=1e-12)
            assert line["held_out_s"] > 0 and line["held_out_accuracy"] is None


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_measures_the_same_and_trains_as_without(
    name: str, folder: Path, one_rank: Any, tmp_path: Path
) -> None:
    ranks, parallel = LAYOUTS[name]
    measured, plain = (
        train_ranks(experiment_in(folder, tmp_path / str(every), every=every, **parallel), ranks)
        for every in (EVERY, 0)
    )
    assert [line["loss"] for line in measured] == [line["loss"] for line in plain]
    found, expected = of_held_out(measured), of_held_out(one_rank[0])
    assert [(step, *counts) for step, _, *counts in found] == [(step, *counts) for step, _, *counts in expected]
    losses = [float.fromhex(loss) for _, loss, *_ in found]
    assert losses == pytest.approx([float.fromhex(loss) for _, loss, *_ in expected], rel=LAYOUT_LOSS)


@pytest.mark.slow
def test_a_resumed_run_measures_what_the_whole_run_measured(folder: Path, one_rank: Any, tmp_path: Path) -> None:
    metrics, output = one_rank
    shutil.copytree(output, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}")
    resumed = train_ranks(experiment_in(folder, tmp_path / "run"), 1)
    assert of_held_out(resumed) == of_held_out(metrics)
    assert [line["loss"] for line in resumed] == [line["loss"] for line in metrics]


@pytest.mark.slow
def test_preference_training_measures_the_loss_of_answers(folder: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path, 8)
    held_out = experiment_in(folder, tmp_path).held_out
    experiment = tiny_experiment(
        tmp_path,
        objective="dpo",
        train={"steps": 1, "packs_per_step": 2, "tensorboard": False},
        data={"token_budget": 512},
    )
    (line,) = train_ranks(replace(experiment, held_out=held_out), 1)
    assert line["held_out_tokens"] > 50 and line["preference_accuracy"] is not None
    assert line["held_out_loss"] == pytest.approx(math.log(experiment.model.decoder.vocab_size), rel=0.1)  # untrained


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    yield start_topology(tiny_experiment(Path("unused")).parallel, seed=0)
    stop_topology()


class OneRight:
    """Asks two questions and finds one answer right."""

    def __init__(self) -> None:
        self.seen: list[Result] = []

    def questions(self) -> tuple[list[Request], Sampling]:
        requests = [Request(name, (), ("What is it?",), ((0,),)) for name in "ab"]
        return requests, Sampling(temperature=0.0, top_p=1.0, max_new_tokens=3)

    def accuracy(self, results: Any) -> tuple[float, int]:
        self.seen += results
        return 0.5, 2


def test_a_measurement_leaves_no_trace_in_the_model(folder: Path, topology: Topology, tmp_path: Path) -> None:
    experiment = experiment_in(folder, tmp_path)
    experiment = replace(experiment, held_out=replace(experiment.held_out, benchmark="questions"))
    model = build_model(plan_build(experiment), topology)
    train_step(model, random_batches(experiment, 2), 1e-3, NextToken())
    (chunk,) = model.chunks
    grader, told = OneRight(), []
    check = HeldOutCheck(experiment, model, told.append, grader)
    torch.manual_seed(5)

    def state() -> list[Any]:
        grads = [vars(p)["main_grad"].clone() for p in chunk.parameters()]  # type: ignore[attr-defined]
        weights = [p.detach().clone() for p in chunk.parameters()]  # type: ignore[attr-defined]
        tracked = [value.clone() for value in get_cuda_rng_tracker().get_states().values()]
        kept = [tensor.detach().clone() for tensor in model.optimizer_tensors()]
        numbers = [torch.tensor(random.getstate()[1]), torch.tensor(np.random.get_state()[1].astype(np.int64))]
        return [*grads, *weights, *kept, *tracked, torch.get_rng_state(), *numbers]

    before = state()
    first, second = check.measure(), check.measure()
    for a, b in zip(before, state(), strict=True):
        assert torch.equal(a, b)
    assert all(module.training for module in chunk.modules())  # type: ignore[attr-defined]
    assert all(p.grad is None for p in chunk.parameters())  # type: ignore[attr-defined]
    assert replace(first, held_out_s=0.0) == replace(second, held_out_s=0.0)
    assert (first.held_out_accuracy, first.held_out_questions) == (0.5, 2)
    assert len(grader.seen) == 4
    answers: list[Answer] = [answer for result in grader.seen for (answer,) in result.answers]
    assert [len(answer.tokens) <= 3 for answer in answers] == [True] * 4
    assert answers[:2] == answers[2:]
    # The row without image is known from the plan; the damaged image shows when it is decoded, and is spoken of once.
    (line,) = [note for note in check.notes if "cannot be used" in note]
    assert "1 rows cannot be used and are left out: 1 x image_missing; first" in line
    assert len(told) == 1 and "1 x image_" in told[0]


def test_rows_that_are_trained_on_are_named(folder: Path, topology: Topology, tmp_path: Path) -> None:
    experiment = experiment_in(folder, tmp_path)
    experiment = replace(experiment, held_out=replace(experiment.held_out, sources=experiment.data.sources))
    check = HeldOutCheck(experiment, build_model(plan_build(experiment), topology))
    assert check.notes == [f"held-out: {folder / 'data.jsonl'} is trained on too; its loss says nothing of new rows"]


def test_rows_of_which_none_is_usable_stop_the_start(folder: Path, topology: Topology, tmp_path: Path) -> None:
    row = {"id": "a", "image": "none.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]}
    row["conversations"] += [{"from": "gpt", "value": "It."}]
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n")
    experiment = experiment_in(folder, tmp_path)
    source = SourceConfig(path=str(tmp_path / "bad.jsonl"), images=str(tmp_path))
    experiment = replace(experiment, held_out=replace(experiment.held_out, sources=(source,)))
    with pytest.raises(DataError, match="held_out.sources: no row can be used\n.*1 x image_missing"):
        HeldOutCheck(experiment, build_model(plan_build(experiment), topology))
