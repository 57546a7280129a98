"""Perplexity is the trainer's own loss: the same mean, per sample, under another layout."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sicog_mcore.build import plan_build
from sicog_mcore.config import Experiment
from sicog_mcore.model.loss import supervised_rows
from sicog_mcore.rollout.load import load_model
from sicog_mcore.train.held_out import measure_losses, segment_sums
from tests.answering import write_checkpoint
from tests.batches import random_batches
from tests.builders import TOKENIZER, tiny_experiment, write_dataset
from tests.dist import Rank, run_ranks, run_script
from tests.e2e.runs import REPOSITORY, train_ranks
from tests.tolerances import LAYOUT_LOSS

NUM_ROWS = 9
LAUNCHER = REPOSITORY / "launch" / "perplexity.py"


def test_sums_of_segments_are_those_of_their_own_positions(tmp_path: Path) -> None:
    batch = random_batches(tiny_experiment(tmp_path), 1)[0]
    rows = supervised_rows(batch.labels)
    losses = torch.rand(len(rows))
    sums = segment_sums(batch, losses)
    borders = batch.cu_seqlens.tolist()
    assert sums.shape == (2, len(borders) - 1)
    for i, (start, stop) in enumerate(zip(borders, borders[1:], strict=False)):
        inside = (rows >= start) & (rows < stop)
        assert sums[1, i] == inside.sum()
        assert sums[0, i].item() == pytest.approx(losses[inside].double().sum().item(), rel=1e-12)
    assert sums[1, -1] == 0  # the padded tail


@pytest.mark.slow
def test_perplexity_is_the_loss_of_training(tmp_path: Path) -> None:
    write_dataset(tmp_path, NUM_ROWS)
    # One step over all rows; its learning rate leaves the weights as they were when the loss was taken.
    experiment = tiny_experiment(
        tmp_path,
        train={"steps": 1, "samples_per_step": NUM_ROWS, "tensorboard": False},
        optim={"lr": 1e-30, "weight_decay": 0.0, "warmup_fraction": 0.0},
        data={"token_budget": 512},
    )
    (metrics,) = train_ranks(experiment, 1)
    broken = {"id": "broken", "image": "none.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]}
    broken["conversations"] += [{"from": "gpt", "value": "Nothing."}]
    rows = tmp_path / "rows.jsonl"
    rows.write_text((tmp_path / "data.jsonl").read_text() + json.dumps(broken) + "\n")
    summaries, outcomes = [], []
    for tensor, ranks in ((1, 1), (2, 4)):  # the second with two replicas
        out = tmp_path / f"tensor{tensor}"
        options = ["--checkpoint", experiment.output, "--rows", str(rows), "--images", str(tmp_path / "images")]
        said = run_script(LAUNCHER, [*options, "--out", str(out), "--tensor", str(tensor)], ranks)
        assert said.count("left out: 1 x image_missing") == 1
        summaries.append(json.loads((out / "results.json").read_text()))
        outcomes.append([json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()])
    one, two = summaries
    assert one["mean"] == pytest.approx(metrics["loss"], rel=1e-6)
    assert one["perplexity"] == pytest.approx(math.exp(metrics["loss"]), rel=1e-6 * max(1, metrics["loss"]))
    assert one["tokens"] == metrics["supervised_tokens"]
    assert two["mean"] == pytest.approx(one["mean"], rel=LAYOUT_LOSS)
    assert [row["id"] for row in outcomes[0]] == [*sorted(f"s{i}" for i in range(NUM_ROWS)), "broken"]
    assert outcomes[0][-1]["weight"] == 0
    for first, second in zip(*outcomes, strict=True):
        assert (first["id"], first["weight"]) == (second["id"], second["weight"])
        assert second["value"] == pytest.approx(first["value"], rel=LAYOUT_LOSS)


def _notes(rank: Rank, experiment: Experiment, folder: Path) -> tuple[list[str], list[str]]:
    topology = rank.start(experiment.parallel)
    write_checkpoint(experiment, folder, topology)
    experiment = replace(experiment, init=replace(experiment.init, checkpoint=str(folder)))
    told: list[str] = []
    load_model(plan_build(experiment), topology, told.append)
    return told, list(measure_losses(experiment, topology).notes)


@pytest.mark.slow
def test_what_is_to_be_said_of_files_is_said_without_training_too(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, NUM_ROWS)
    row = json.loads(path.read_text().splitlines()[2])
    path.write_text(path.read_text() + json.dumps(row | {"id": "more", "colour_of_frame": "red"}) + "\n")
    tokenizer = json.loads(Path(TOKENIZER).read_text())
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer | {"truncation": cut}))
    experiment = tiny_experiment(tmp_path, data={"tokenizer": str(tmp_path / "tokenizer.json")})
    ((generation, perplexity),) = run_ranks(_notes, 1, experiment, tmp_path / "model")
    for notes in (generation, perplexity):
        assert sum("would cut every text: switched off" in line for line in notes) == 1
        assert any(line.startswith("decoder: ") for line in notes)
    assert perplexity[-1].startswith("data: key 'colour_of_frame' is not used")
