"""Stages 0, 1, 1.5, 2 and preferences in sequence on the tiny recipes, each reading what the one before wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sicog_mcore.cli import load_experiment
from sicog_mcore.config import Experiment, ModelPart
from sicog_mcore.stages import ALIGN, DPO, FINETUNE, PERCEPTION, PRETRAIN, StageDefaults
from tests.builders import TOKENIZER, write_dataset
from tests.dist import Rank, run_ranks
from tests.e2e.runs import read_metrics
from tests.pairs import write_pairs

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS, SAMPLES = 2, 6
SEQUENCE: Mapping[str, tuple[StageDefaults, str]] = {
    "stage0": (PERCEPTION, ""),
    "stage1": (ALIGN, ""),
    "stage15": (PRETRAIN, "init.resampler=stage1"),
    "stage2": (FINETUNE, "init.checkpoint=stage15"),
    "dpo": (DPO, "init.checkpoint=stage2"),
}
LAYOUTS = {"TP2": ["parallel.tensor=2", "parallel.sequence=true"], "PP2": ["parallel.pipeline=2"]}


def _recipe(name: str, folder: Path, runs: Path, overrides: list[str]) -> Experiment:
    """A recipe of examples/ as its launch script reads it, on small data and in other folders."""
    stage, init = SEQUENCE[name]
    data = folder / ("pairs" if name == "dpo" else "samples")
    sources = json.dumps([{"path": str(data / "data.jsonl"), "images": str(data / "images")}])
    arguments = [f"data.sources={sources}", f"data.tokenizer={TOKENIZER}", f"output={runs / name}", *overrides]
    if init:
        field, origin = init.split("=")
        arguments.append(f"{field}={runs / origin}")
    small = [f"train.steps={STEPS}", f"train.samples_per_step={SAMPLES}", "train.tensorboard=false"]
    config = str(EXAMPLES / f"{name}_tiny.yaml")
    return load_experiment(["--config", config, *arguments, *small, "data.token_budget=640"], 2, stage=stage)


def _weights(experiment: Experiment, rank: Rank, number: int) -> dict[str, bytes]:
    """This rank's weights after ``init``, by name: what a run starts from, or what one wrote."""
    from sicog_mcore.build import build_chunks, plan_build
    from sicog_mcore.checkpoint.weights import import_init
    from sicog_mcore.model.initialise import initialise
    from sicog_mcore.parallel.topology import stop_topology

    topology = Rank(rank.rank, rank.world_size, f"{rank.init_method}-w{number}").start(experiment.parallel)
    chunks = build_chunks(plan_build(experiment), topology)
    initialise(chunks, experiment.train.seed)
    import_init(chunks, experiment, topology)
    weights = {
        f"{i}.{name}": parameter.detach().numpy().tobytes()
        for i, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
    }
    stop_topology()
    return weights


def _run_all(rank: Rank, folder: Path, runs: Path, overrides: list[str]) -> dict[str, dict[ModelPart, set[bool]]]:
    """Runs the sequence; for each stage and part, whether its weights on this rank are what they were before."""
    from sicog_mcore.build import plan_build
    from sicog_mcore.parallel.topology import stop_topology
    from sicog_mcore.train.run import train

    unchanged: dict[str, dict[ModelPart, set[bool]]] = {}
    for number, name in enumerate(SEQUENCE):
        experiment = _recipe(name, folder, runs, overrides)
        before = _weights(experiment, rank, 2 * number)
        topology = Rank(rank.rank, rank.world_size, f"{rank.init_method}-{name}").start(experiment.parallel)
        train(plan_build(experiment), topology, "the test's command")
        stop_topology()
        written = replace(experiment, init=replace(experiment.init, checkpoint=experiment.output, resampler=""))
        after = _weights(written, rank, 2 * number + 1)
        assert before.keys() == after.keys()
        unchanged[name] = {"tower": set(), "resampler": set(), "decoder": set()}
        for key, value in before.items():
            module = key.split(".")[1]
            part: ModelPart = "decoder" if module == "language_model" else "tower" if module == "tower" else "resampler"
            unchanged[name][part].add(value == after[key])
    return unchanged


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_stage_starts_from_what_the_one_before_wrote(layout: str, tmp_path: Path) -> None:
    write_dataset(tmp_path / "samples", 16)
    write_pairs(tmp_path / "pairs", 8)
    results: list[dict[str, dict[str, Any]]] = run_ranks(_run_all, 2, tmp_path, tmp_path / "runs", LAYOUTS[layout])
    for name in SEQUENCE:
        metrics = read_metrics(tmp_path / "runs" / name)
        assert [line["step"] for line in metrics] == [1, 2]
        assert all(line["samples"] == SAMPLES for line in metrics[:2] if name != "dpo")
        if name == "stage1":
            assert all(line["slices"] == line["images"] for line in metrics)  # overviews only
        for part in ("tower", "resampler", "decoder"):
            unchanged = set().union(*(result[name][part] for result in results))
            frozen = name == "stage1" and part != "resampler"
            # Biases of keys and rows of unused tokens may get no gradient; a frozen part keeps every bit.
            assert unchanged == {True} if frozen else False in unchanged, (name, part, unchanged)
