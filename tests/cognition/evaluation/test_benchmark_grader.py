"""A benchmark asked during training: the accuracy is that of generating and scoring with the checkpoint, on any layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from sicog_mcore.cognition.evaluation.benchmark import read_items, write_rows
from sicog_mcore.cognition.evaluation.benchmark_grader import BenchmarkGrader
from sicog_mcore.cognition.evaluation.judging import Judging, judge
from sicog_mcore.cognition.generation.generate import run
from sicog_mcore.cognition.generation.options import GenerationOptions
from sicog_mcore.cognition.records import Generation, read_by_id
from sicog_mcore.config import HeldOutConfig, ParallelConfig
from sicog_mcore.errors import RecordError
from sicog_mcore.parallel.topology import start_topology, stop_topology
from sicog_mcore.rollout.requests import Answer, Result, Sampling
from tests.answering import write_checkpoint
from tests.builders import tiny_experiment, write_dataset, write_image
from tests.dist import run_script
from tests.e2e.runs import LAUNCHER, read_metrics

NUM_ITEMS, MAX_NEW_TOKENS = 7, 6
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {"one rank": (1, {}), "TP2": (2, {"tensor": 2}), "DP2": (2, {})}


class Asked(NamedTuple):
    """A checkpoint, a benchmark whose references are in part its own answers, and how well it does by generate and score."""

    folder: Path
    benchmark: Path
    accuracy: float


def write_benchmark(path: Path, answers: list[str]) -> None:
    """Questions about images of other sizes, one of text only."""
    rows = []
    for number, answer in enumerate(answers):
        row: dict[str, Any] = {"id": f"q{number}", "question": f"What is number {number}?", "answer": answer}
        if number != 2:
            row["image"] = f"{number}.png"
            write_image(path.parent / "pictures" / row["image"], 60 + 30 * number, 90, seed=number)
        rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    folder = tmp_path_factory.mktemp("asked")
    write_dataset(folder, 6)
    try:
        write_checkpoint(tiny_experiment(folder), folder / "model", start_topology(ParallelConfig(), seed=0))
    finally:
        stop_topology()
    benchmark = folder / "benchmark.jsonl"
    write_benchmark(benchmark, ["nothing"] * NUM_ITEMS)
    write_rows(str(benchmark), folder / "pictures", folder / "rows")
    options = GenerationOptions(
        checkpoint=folder / "model",
        rows=(folder / "rows" / "rows.jsonl",),
        images=folder / "rows",
        prompts=(("direct", 1),),
        sampling=Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=MAX_NEW_TOKENS),
        seed=0,
        out=folder / "generated",
        batch=2,
    )
    generations = read_by_id(run(options), Generation)
    own = [generations[f"q{number}"].candidates[0].text for number in range(NUM_ITEMS)]
    write_benchmark(benchmark, [text.strip() or "-" if number % 2 else "nothing" for number, text in enumerate(own)])
    outcomes = judge(read_items(str(benchmark)), generations, "direct", Judging())
    return Asked(folder, benchmark, sum(outcome.value for outcome in outcomes) / NUM_ITEMS)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_accuracy_is_that_of_generating_and_scoring(name: str, asked: Asked, tmp_path: Path) -> None:
    assert 0 < asked.accuracy < 1
    ranks, parallel = LAYOUTS[name]
    experiment = tiny_experiment(
        asked.folder,
        output=str(tmp_path / "run"),
        train={"steps": 1, "packs_per_step": 2, "tensorboard": False},
        optim={"lr": 1e-30, "weight_decay": 0.0, "warmup_fraction": 0.0},  # leaves the weights as they were
        data={"token_budget": 512},
        init={"checkpoint": str(asked.folder / "model")},
        held_out={
            "every_steps": 1,
            "benchmark": str(asked.benchmark),
            "images": str(asked.folder / "pictures"),
            "max_new_tokens": MAX_NEW_TOKENS,
            "batch": 3,
        },
        parallel=parallel,
    )
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(experiment.to_dict()))
    printed = run_script(Path(LAUNCHER), ["--config", str(config)], ranks)
    (line,) = read_metrics(tmp_path / "run")
    assert (line["held_out_accuracy"], line["held_out_questions"]) == (asked.accuracy, NUM_ITEMS)
    assert line["held_out_loss"] is None
    assert f"accuracy {asked.accuracy:.1%} of {NUM_ITEMS} | grad norm" in printed
    asked_rows = (tmp_path / "run" / "held_out" / "rows.jsonl").read_text()
    assert [json.loads(row)["id"] for row in asked_rows.splitlines()] == [f"q{i}" for i in range(NUM_ITEMS)]


def answered(name: str, text: str) -> Result:
    return Result(name, (5,), ((Answer((1, 2), text, (-0.5, -0.1), "stop"),),))


def config_for(path: Path, **changes: Any) -> HeldOutConfig:
    config = HeldOutConfig(every_steps=1, benchmark=str(path), images=str(path.parent / "pictures"), max_new_tokens=9)
    return replace(config, **changes)


def test_every_question_counts_also_without_an_answer(tmp_path: Path) -> None:
    write_benchmark(tmp_path / "b.jsonl", ["red", "blue", "green", "12"])
    grader = BenchmarkGrader(config_for(tmp_path / "b.jsonl"), tmp_path / "asked")
    requests, sampling = grader.questions()
    assert [request.id for request in requests] == ["q0", "q1", "q2", "q3"]
    assert requests[0].prompts == ("<image>\nWhat is number 0?",) and requests[2].prompts == ("What is number 2?",)
    assert (sampling.temperature, sampling.max_new_tokens) == (0.0, 9)
    failed = Result("q2", failure="prompt_too_long", detail="")
    results = [answered("q3", "The answer is 12."), answered("q0", "red"), failed, answered("q1", "yellow")]
    assert grader.accuracy(results) == (0.5, 4)
    with_steps = BenchmarkGrader(config_for(tmp_path / "b.jsonl", prompt="cot"), tmp_path / "asked")
    assert "four numbered steps" in with_steps.questions()[0][0].prompts[0]


def test_a_benchmark_that_cannot_be_used_is_one_message(tmp_path: Path) -> None:
    write_benchmark(tmp_path / "b.jsonl", ["red", ""])
    with pytest.raises(RecordError, match="1 of 2 rows cannot be used"):
        BenchmarkGrader(config_for(tmp_path / "b.jsonl"), tmp_path / "asked")
    write_benchmark(tmp_path / "b.jsonl", ["red"])
    with pytest.raises(RecordError, match="found prompt 'nothing', expected one of cod"):
        BenchmarkGrader(config_for(tmp_path / "b.jsonl", prompt="nothing"), tmp_path / "asked")
    (tmp_path / "pictures" / "0.png").unlink()
    with pytest.raises(RecordError, match="image_missing"):
        BenchmarkGrader(config_for(tmp_path / "b.jsonl"), tmp_path / "asked")
