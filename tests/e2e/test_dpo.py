"""Preference training end to end: the loss of whole models, every layout, both kinds of reference, and that it learns."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sicog_mcore.config import DpoConfig, Experiment
from tests.dist import Rank, run_ranks
from tests.e2e.runs import consumed_ids, read_metrics
from tests.pairs import pair_experiment, write_pairs
from tests.tolerances import LAYOUT_GRAD_NORM, LAYOUT_LOSS, PACKED_LOSS

pytestmark = pytest.mark.slow
STEPS, PAIRS = 3, 12
LOSSES = ("sigmoid", "hinge", "ipo", "kto_pair")
REWARDS = ("reward_margin", "chosen_reward", "rejected_reward")
REWARD = 1e-4  # absolute: a reward is a small difference of two large sums
SIGMOID: dict[str, Any] = {"label_smoothing": 0.1, "sft_weight": 0.5}
RUNS: dict[str, dict[str, Any]] = {
    "precomputed": SIGMOID,
    "frozen": {"loss": "kto_pair", "beta": 0.5, "reference": "frozen"},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
    "PP2 interleaved": {"pipeline": 2, "virtual_pipeline": 2},
    "DP2": {"overlap_grad_reduce": True, "overlap_param_gather": True},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_pairs(folder, PAIRS)
    return folder


def _experiment(data: Path, output: Path, dpo: dict[str, Any], **overrides: Any) -> Experiment:
    train = {"steps": STEPS, "packs_per_step": 4, "tensorboard": False} | overrides.pop("train", {})
    return pair_experiment(
        data, output=str(output), train=train, data={"token_budget": 640}, dpo=dpo, optim={"lr": 5e-4}, **overrides
    )


def _train(rank: Rank, experiments: list[Experiment]) -> None:
    """Several runs of one layout, one after the other on the same ranks."""
    from sicog_mcore.build import plan_build
    from sicog_mcore.train.run import train

    topology = rank.start(experiments[0].parallel, experiments[0].train.seed)
    for experiment in experiments:
        train(plan_build(experiment), topology, "the test's command")


def _train_runs(
    data: Path, output: Path, runs: dict[str, dict[str, Any]], **parallel: Any
) -> dict[str, list[dict[str, Any]]]:
    experiments = [_experiment(data, output / name, dpo, parallel=parallel) for name, dpo in runs.items()]
    run_ranks(_train, 2 if parallel else 1, experiments)
    return {name: read_metrics(output / name) for name in runs}


@pytest.fixture(scope="module")
def one_rank(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    runs = RUNS | {"frozen sigmoid": SIGMOID | {"reference": "frozen"}}
    return _train_runs(data, tmp_path_factory.mktemp("one_rank"), runs)


def _column(lines: list[dict[str, Any]], name: str) -> list[float]:
    return [line[name] for line in lines]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_rank(name: str, data: Path, one_rank: Any, tmp_path: Path) -> None:
    for run, lines in _train_runs(data, tmp_path, RUNS, **LAYOUTS[name]).items():
        expected = one_rank[run]
        assert len(lines) == len(expected) == STEPS
        assert _column(lines, "loss") == pytest.approx(_column(expected, "loss"), rel=LAYOUT_LOSS), run
        assert _column(lines, "grad_norm") == pytest.approx(_column(expected, "grad_norm"), rel=LAYOUT_GRAD_NORM), run
        for reward in REWARDS:
            assert _column(lines, reward) == pytest.approx(_column(expected, reward), abs=REWARD), (run, reward)
        assert _column(lines, "samples") == _column(expected, "samples")
        assert _column(lines, "slices") == _column(expected, "slices")


def test_packing_does_not_change_the_loss(data: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 2, "samples_per_step": 6, "tensorboard": False}
    names, losses = ("sigmoid", "kto_pair"), {}
    for budget in (640, 1600):
        experiments = [
            pair_experiment(
                data,
                output=str(tmp_path / f"{name}{budget}"),
                train=settings,
                data={"token_budget": budget},
                dpo={"sft_weight": 0.5, "loss": name, "reference": "frozen"},
                optim={"lr": 5e-4},
            )
            for name in names
        ]
        run_ranks(_train, 1, experiments)
        lines = [line for name in names for line in read_metrics(tmp_path / f"{name}{budget}")]
        assert _column(lines, "samples") == [6] * 4
        losses[budget] = _column(lines, "loss"), _column(lines, "pack_fill")
    assert losses[640][0] == pytest.approx(losses[1600][0], rel=PACKED_LOSS)
    assert losses[640][1] != losses[1600][1]


def test_precomputed_reference_equals_a_frozen_one(one_rank: Any) -> None:
    precomputed, frozen = one_rank["precomputed"], one_rank["frozen sigmoid"]
    for name, tolerance in (("loss", LAYOUT_LOSS), ("grad_norm", LAYOUT_GRAD_NORM)):
        assert _column(precomputed, name) == pytest.approx(_column(frozen, name), rel=tolerance)
    assert precomputed[0]["reward_margin"] == pytest.approx(0.0, abs=REWARD)  # the model still is its reference
    assert abs(precomputed[-1]["reward_margin"]) > 100 * REWARD


def _score(rank: Rank, experiment: Experiment) -> dict[str, Any]:
    """Losses of one packed batch of four pairs, beside the same from each conversation run alone, in fp64."""
    import torch

    from sicog_mcore.build import build_model, plan_build
    from sicog_mcore.data.batch import IGNORED_LABEL, EncodedSample, PackedBatch
    from sicog_mcore.data.collate import collate
    from sicog_mcore.data.encode import Encoder
    from sicog_mcore.data.pairs import build_pair, conversations
    from sicog_mcore.data.sources import open_sources
    from sicog_mcore.train.dpo import Preferences
    from sicog_mcore.train.step import run_schedule, sum_logs

    model = build_model(plan_build(experiment), rank.start(experiment.parallel, 0))
    samples = open_sources(experiment.data.sources, experiment.data, build_pair)
    encoder, pairs = Encoder(experiment.model, experiment.data), [samples.read(row) for row in range(4)]
    chunk: Any = model.chunks[0]

    def join(encoded: list[EncodedSample]) -> PackedBatch:
        sizes = experiment.model.resampler.queries, experiment.model.tower.patch_dim
        return collate(encoded, token_budget=1024, pad_id=0, queries=sizes[0], patch_dim=sizes[1])

    def alone(encoded: EncodedSample) -> Any:
        batch = join([encoded])
        rows = (batch.labels != IGNORED_LABEL).nonzero()[:, 0]
        logits = chunk.language_model.project(chunk.hidden_states(batch), rows)[:, 0].double()
        return logits.log_softmax(-1)[torch.arange(len(rows)), batch.labels[rows]]

    with torch.no_grad():
        tokens = [
            alone(encoder.encode(replace(pair, turns=turns, answers=())))
            for pair in pairs
            for turns in conversations(pair)
        ]
    policy = torch.stack([part.sum() for part in tokens])
    reference = policy + torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 5 - 2
    batch = replace(join([encoder.encode(pair) for pair in pairs]), segment_reference=reference)

    seen: list[int] = []
    chunk.tower.register_forward_hook(lambda module, args, out: seen.append(int(args[1].shape[0])))
    found = {}
    for loss in LOSSES:
        for smoothing in (0.0, 0.2):
            for sft_weight in (0.0, 0.7):
                config = DpoConfig(loss=loss, beta=0.2, label_smoothing=smoothing, sft_weight=sft_weight)  # type: ignore[arg-type]
                seen.clear()
                batches, function = Preferences(config).prepare(model, [batch])
                logs = run_schedule(model.wrapped, model.config, model.topology, batches, function)
                total, count, *_ = sum_logs(model.topology, logs, Preferences.num_sums)
                found[loss, smoothing, sft_weight] = total / count, list(seen)
    return {
        "found": found,
        "ratios": (policy - reference).tolist(),
        "chosen_tokens": [-float(x) for part in tokens[::2] for x in part],
        "slices": [len(encoder.encode(pair).grids) for pair in pairs],
    }


def _expected(loss: str, smoothing: float, sft_weight: float, scores: dict[str, Any]) -> float:
    import torch
    from torch.nn.functional import softplus

    beta = 0.2
    chosen, rejected = torch.tensor(scores["ratios"], dtype=torch.float64).view(4, 2).T
    margin = beta * (chosen - rejected)
    losses = {
        "sigmoid": (1 - smoothing) * softplus(-margin) + smoothing * softplus(margin),
        "hinge": (1 - margin).clamp(min=0),
        "ipo": (chosen - rejected - 1 / (2 * beta)) ** 2,
        "kto_pair": 1
        - torch.sigmoid(beta * (chosen - rejected.mean().clamp(min=0))) / 2
        - torch.sigmoid(beta * (chosen.mean().clamp(min=0) - rejected)) / 2,
    }
    tokens = torch.tensor(scores["chosen_tokens"], dtype=torch.float64)
    return float(losses[loss].mean() + sft_weight * tokens.mean())


def test_loss_of_packed_pairs_equals_conversations_one_by_one_and_slices_are_encoded_once(data: Path) -> None:
    (scores,) = run_ranks(_score, 1, pair_experiment(data))
    assert scores["slices"] == [1, 1, 0, 5]
    for (loss, smoothing, sft_weight), (value, seen) in scores["found"].items():
        expected = _expected(loss, smoothing, sft_weight, scores)
        assert value == pytest.approx(expected, rel=PACKED_LOSS), (loss, smoothing, sft_weight)
        passes = 2 if loss == "kto_pair" else 1  # one more, forward only, for the drifts
        assert seen == [sum(scores["slices"])] * passes


def test_resumed_run_reads_its_reference_and_an_interrupted_pass_goes_on(data: Path, tmp_path: Path) -> None:
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    settings: dict[str, Any] = {"train": {"steps": 4}, "checkpoint": {"every_steps": 2}}
    run_ranks(_train, 1, [_experiment(data, straight, SIGMOID, **settings)])
    shutil.copytree(straight, moved)
    shutil.rmtree(moved / "checkpoints" / "step_00000004")
    scores = moved / "reference" / "log_probs.jsonl"
    whole = scores.read_text()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == PAIRS + 1
    # As a kill in the middle of the pass would leave it; a marked line shows that nothing is asked for twice.
    first = json.loads(lines[1])
    lines[1] = json.dumps(first | {"chosen": first["chosen"] + 1e-9}) + "\n"
    scores.unlink()
    scores.with_suffix(".part").write_text("".join(lines[:-1]) + lines[-1][:20])
    run_ranks(_train, 1, [_experiment(data, moved, SIGMOID, **settings)])
    assert _column(read_metrics(moved), "loss") == pytest.approx(_column(read_metrics(straight), "loss"), rel=1e-7)
    assert consumed_ids(moved) == consumed_ids(straight)
    assert sorted(scores.read_text().splitlines()) == sorted("".join([*lines[:-1], lines[-1]]).splitlines())
    assert list(scores.parent.glob("*.part")) == []


def test_preferences_of_a_small_set_are_learnt(tmp_path: Path) -> None:
    write_pairs(tmp_path, 16)
    experiment = pair_experiment(tmp_path, train={"steps": 15, "packs_per_step": 2, "tensorboard": False})
    run_ranks(_train, 1, [experiment])
    lines = read_metrics(tmp_path / "run")
    assert min(_column(lines[-3:], "preference_accuracy")) > 0.9
    assert lines[-1]["reward_margin"] > 1.0 and lines[-1]["loss"] < 0.3 < lines[0]["loss"]
