"""The loop as a graph: what it reads, what it starts from, and that mistakes are found before anything runs."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from sicog_mcore.cognition.loop.loop_config import CurationConfig, LoopConfig, read_loop
from sicog_mcore.cognition.loop.loop_console import comparison_line
from sicog_mcore.cognition.loop.steps import WorkflowStep, in_order
from sicog_mcore.cognition.loop.workflow import build_steps
from sicog_mcore.cognition.step_options import CurateOptions, CurationRules, TrainingOptions
from sicog_mcore.commands.loop import step_words
from sicog_mcore.commands.parser import make_parser, options_from, to_words
from sicog_mcore.commands.registry import find_verb
from sicog_mcore.commands.train_stage import TrainingVerb
from sicog_mcore.commands.verb import Verb, VerbFamily
from sicog_mcore.errors import ConfigError
from tests.builders import TOKENIZER, write_dataset

KINDS = {"captions": ("stage0.perception", "cod"), "answers": ("stage0.reasoning", "cot")}


def loop_values(rows: Path, output: str = "runs/loop") -> dict[str, Any]:
    """A loop whose rows, labelled and not, are those of ``write_dataset``; asked for answers they have other ids."""
    images = rows.parent / "images"
    others = rows.with_name("questions.jsonl")
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    others.write_text("".join(json.dumps(row | {"id": f"q-{row['id']}"}) + "\n" for row in lines))
    benchmark = rows.with_name("benchmark.jsonl")
    answered = [{"id": row["id"], "question": "Which?", "answer": "red"} for row in lines]
    benchmark.write_text("".join(json.dumps(row) + "\n" for row in answered))
    sources = {"data.sources": [{"path": str(rows), "images": str(images)}]}
    common = {"preset": "tiny", "data.tokenizer": TOKENIZER, "train.steps": 3, "train.tensorboard": False}
    return {
        "output": output,
        "items": {"images": str(images), "captions": [str(rows)], "answers": [str(others)]},
        "stages": {
            "common": {"set": common},
            **{name: {"set": dict(sources)} for name in ("perception", "reasoning", "align", "finetune")},
        },
        "evaluation": {"benchmark": str(benchmark), "images": str(images)},
    }


def write_loop(folder: Path, values: Mapping[str, Any]) -> Path:
    path = folder / "loop.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    write_dataset(Path("data"), 4)
    return loop_values(Path("data/data.jsonl"))


def steps_of(values: Mapping[str, Any], ranks: int = 1) -> dict[str, WorkflowStep]:
    return {step.name: step for step in build_steps(read_loop(write_loop(Path(), values)), ranks)}


def problems_of(values: Mapping[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        steps_of(values)
    return [f"{problem.path}: {problem.problem}" for problem in caught.value.problems]


def option(step: WorkflowStep, name: str) -> str:
    """The word behind an option, or the value of an override."""
    words = step_words(step)
    if name in words:
        return words[words.index(name) + 1]
    return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))


def test_one_round_has_every_stage_once_and_stands_in_order(values: dict[str, Any]) -> None:
    steps = steps_of(values)
    assert list(steps) == [
        *("stage1", "baseline.stage15", "baseline.stage2", "stage0.perception", "stage0.reasoning"),
        *("evaluation", "baseline.evaluation", "baseline.evaluation_scores"),
        *("round_1.captions", "round_1.answers", "round_1.captions_scores", "round_1.answers_scores"),
        *("round_1.join", "round_1.curate", "round_1.stage15", "round_1.stage2"),
        *("round_1.evaluation", "round_1.evaluation_scores", "round_1.compare", "round_1.report"),
    ]
    assert in_order(list(steps.values())) == list(steps.values())


def test_what_a_step_reads_under_the_output_is_written_by_steps_that_it_needs(values: dict[str, Any]) -> None:
    steps = steps_of(values | {"rounds": 2})
    writers = {path: step.name for step in steps.values() for path in step.outputs}

    def reached(step: WorkflowStep) -> set[str]:
        return {name for need in step.needs for name in (need, *reached(steps[need]))}

    own = [(step, path) for step in steps.values() for path in step.inputs if path.is_relative_to("runs/loop")]
    assert len(own) > 40
    for step, path in own:
        assert writers[path] in reached(step), (step.name, path)


def test_no_step_writes_into_the_folder_of_another(values: dict[str, Any]) -> None:
    removed = [(s.name, p) for s in steps_of(values | {"rounds": 2}).values() for p in (*s.outputs, *s.leftovers)]
    assert [(a, b) for a, p in removed for b, q in removed if a != b and p.is_relative_to(q)] == []


def test_the_new_model_and_the_baseline_differ_in_the_data_of_stage_15_alone(values: dict[str, Any]) -> None:
    steps = steps_of(values)
    for stage, allowed in (("stage15", {"data.sources", "output"}), ("stage2", {"init.checkpoint", "output"})):
        ours, theirs = ({*step_words(steps[f"{name}.{stage}"])} for name in ("round_1", "baseline"))
        assert {word.partition("=")[0] for word in ours ^ theirs} == allowed
    assert (
        json.loads(option(steps["round_1.stage15"], "data.sources"))[0]["path"]
        == "runs/loop/round_1/curated/train.jsonl"
    )
    assert option(steps["round_1.stage15"], "init.resampler") == "runs/loop/stage1"  # and nothing of what generated


def test_every_step_is_a_verb_that_takes_its_options(values: dict[str, Any]) -> None:
    for step in steps_of(values | {"rounds": 2}).values():
        entry = find_verb(step.verb[0])
        assert entry is not None
        verb = entry.load()
        if isinstance(verb, TrainingVerb):
            assert (*step.verb[1:], "")[0] in verb.stages and isinstance(step.options, TrainingOptions)
            continue
        if isinstance(verb, VerbFamily):
            verb = verb.verbs[step.verb[1]]
        assert isinstance(verb, Verb)
        found = make_parser(verb.options, "", "sicog").parse_args(to_words(step.options))
        assert options_from(verb.options, found) == step.options  # whose folders need not exist yet


def test_the_loop_names_no_script() -> None:
    folder = Path(__file__).parents[3] / "sicog_mcore/cognition/loop"
    texts = {node.value for file in folder.glob("*.py") for node in strings(file)}
    assert len(texts) > 200
    assert [text for text in texts if "launch/" in text or "tools/" in text] == []


def strings(file: Path) -> Iterator[ast.Constant]:
    """Text literals of a file, docstrings too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node


def test_curation_takes_every_rule_and_nothing_that_the_loop_sets(values: dict[str, Any]) -> None:
    own = {item.name for item in fields(CurationConfig)}
    assert own == {item.name for item in fields(CurationRules)} | {"tau"}
    assert own.isdisjoint({item.name for item in fields(CurateOptions)} - {"tau"})
    values["curation"] = {"min_kpt": 10, "evaluation": "photos", "seed": 3, "workers": "many"}
    assert sorted(problems_of(values)) == [
        "curation.evaluation: no such field",
        "curation.min_kpt: no such field",
        "curation.seed: no such field",
        "curation.workers: is not a whole number",
    ]


def test_options_as_words_are_refused_with_the_fields_that_took_their_place(values: dict[str, Any]) -> None:
    values["curation"] = {"options": ["--min-kept", "10"], "tau": [0.9]}
    with pytest.raises(ConfigError) as caught:
        steps_of(values)
    (problem,) = caught.value.problems
    assert problem.path == "curation.options" and problem.problem == "is now a field for each option"
    assert "image_radius: -1 for --image-radius -1" in problem.fix and "min_kept" in problem.fix


@pytest.mark.parametrize(
    ("group", "value", "problem"),
    [
        ("scoring", {"captions": "tfdif"}, "scoring.captions: is no scorer"),
        ("scoring", {"answers": "attributes"}, "scoring.answers: is no scorer"),
        ("scoring", {"captions": "sentence:nowhere"}, "scoring.captions: nowhere does not exist"),
        ("curation", {"tau": ["0.8", "cdo=0.9"]}, "round_1.curate: curation.tau: found prompt 'cdo', expected"),
        (
            "curation",
            {"min_tokens": ["few"]},
            "round_1.curate: curation.min_tokens: could not convert",
        ),
        ("curation", {"text": "gone.jsonl"}, "curation.text: is no file"),
        ("curation", {"tau": ["nan"]}, "round_1.curate: curation.tau: nan is no finite number"),
        ("generation", {"captions": {"cot": 2}}, "round_1: generation.captions: is a prompt for answers"),
    ],
)
def test_what_a_late_step_would_refuse_is_found_before_the_first(
    group: str, value: Any, problem: str, values: dict[str, Any]
) -> None:
    (found,) = problems_of(values | {group: value})
    assert found.startswith(problem)


def test_a_metric_that_the_loop_cannot_judge_by_is_refused(values: dict[str, Any]) -> None:
    values["evaluation"]["metric"] = "attributes"
    assert problems_of(values) == ["evaluation.metric: needs a vocabulary, which a loop cannot name"]


def test_a_name_that_is_given_twice_is_refused_with_its_line(values: dict[str, Any]) -> None:
    path = write_loop(Path(), values)
    path.write_text(path.read_text() + "rounds: 2\nrounds: 3\ngeneration:\n  captions: {cod: 1, cod: 2}\n")
    with pytest.raises(ConfigError) as caught:
        read_loop(path)
    lines = path.read_text().count("\n")
    assert [(problem.path, problem.value, problem.problem) for problem in caught.value.problems] == [
        ("rounds", "3", f"is given twice, again in line {lines - 2}"),
        ("generation.captions.cod", "2", f"is given twice, again in line {lines}"),
    ]


def test_stage_0_warms_up_the_baseline_or_the_given_model(values: dict[str, Any]) -> None:
    for step, _ in KINDS.values():
        assert option(steps_of(values)[step], "init.checkpoint") == "runs/loop/baseline/stage2"
    Path("given").mkdir()
    given = steps_of(values | {"base": "given"})["stage0.perception"]
    assert option(given, "init.checkpoint") == "given" and given.needs == ()


def test_from_the_second_round_on_the_model_of_the_round_before_generates(values: dict[str, Any]) -> None:
    steps = steps_of(values | {"rounds": 3})
    for kind, (first, prompt) in KINDS.items():
        assert option(steps[f"round_1.{kind}"], "--checkpoint") == f"runs/loop/{first.replace('.', '/')}"
        assert option(steps[f"round_1.{kind}"], "--prompts") == f"{prompt}=2"
        for number in (2, 3):
            assert option(steps[f"round_{number}.{kind}"], "--checkpoint") == f"runs/loop/round_{number - 1}/stage2"
    seeds = [option(steps[f"round_{number}.captions"], "--seed") for number in (1, 2, 3)]
    assert seeds == ["42", "43", "44"]
    assert option(steps["round_3.report"], "--previous") == "runs/loop/round_1"
    assert len([name for name in steps if name.startswith("stage0")]) == 2


def test_a_loop_of_captions_alone_has_no_step_for_answers(values: dict[str, Any]) -> None:
    del values["items"]["answers"], values["stages"]["reasoning"]
    assert [name for name in steps_of(values) if "answers" in name or "reasoning" in name] == []


def test_only_what_changes_weights_counts_for_a_training_step(values: dict[str, Any]) -> None:
    before = steps_of(values)["stage1"].cache_key
    values["stages"]["common"]["set"] |= {"train.log_every": 7, "parallel.tensor": 2}
    assert steps_of(values, ranks=2)["stage1"].cache_key == before
    values["stages"]["common"]["set"] |= {"optim.lr": 0.5}
    assert steps_of(values, ranks=2)["stage1"].cache_key != before


def test_only_what_changes_records_counts_for_generation(values: dict[str, Any]) -> None:
    before = steps_of(values)["round_1.captions"].cache_key
    assert steps_of(values | {"generation": {"batch": 3}})["round_1.captions"].cache_key == before
    assert steps_of(values | {"generation": {"temperature": 0.1}})["round_1.captions"].cache_key != before


def test_files_that_curation_is_told_of_are_its_inputs(values: dict[str, Any]) -> None:
    curation = {"tau": [0.9, "cot=0.8"], "text": "data/data.jsonl", "image_radius": -1}
    step = steps_of(values | {"curation": curation})["round_1.curate"]
    assert Path("data/data.jsonl") in step.inputs
    assert step.options.tau == ("0.9", "cot=0.8")
    assert step.options.rules == CurationRules(text=Path("data/data.jsonl"), image_radius=-1)


def test_all_mistakes_of_the_file_are_reported_together(values: dict[str, Any]) -> None:
    values |= {"rouns": 2, "rounds": "two", "generation": {"captions": {"cod": "many"}}, "scoring": 3}
    del values["evaluation"]["benchmark"]
    assert sorted(problems_of(values)) == [
        "evaluation.benchmark: is missing",
        "generation.captions.cod: is not a whole number",
        "rounds: is not a whole number",
        "rouns: no such field",
        "scoring: is no group of fields",
    ]


def test_all_mistakes_of_the_values_are_reported_together(values: dict[str, Any]) -> None:
    values["items"] |= {"captions": ["none.jsonl"], "images": "nowhere"}
    values |= {"rounds": 0, "base": "gone"}
    assert sorted(problems_of(values)) == [
        "base: is no folder",
        "items.captions: is no file",
        "items.images: is no folder",
        "rounds: is below 1",
    ]


def test_all_mistakes_of_the_stages_are_reported_together_and_each_once(values: dict[str, Any]) -> None:
    values["stages"]["common"]["set"] |= {"optim.lrate": 1.0}
    values["stages"]["finetune"]["set"] |= {"init.checkpoint": "x"}
    values["stages"]["perception"]["set"] = {"data.sources": [{"path": "gone.jsonl", "images": "data/images"}]}
    values["generation"] = {"captions": {"code": 2}, "temperature": -1.0}
    found = problems_of(values)
    lrate = [line for line in found if "optim.lrate" in line]
    assert len(lrate) == 1 and lrate[0].startswith("stage1, baseline.stage2, baseline.stage15")
    assert "stages.finetune: init.checkpoint: is set by the loop" in found
    assert "stage0.perception: data.sources[0].path: does not exist" in found
    assert "round_1.captions: prompts: is no prompt" in found
    assert "round_1.captions, round_1.answers: temperature: is out of range" in found


def test_ids_that_stand_for_two_items_are_found_before_anything_is_generated(values: dict[str, Any]) -> None:
    values["items"]["answers"] = values["items"]["captions"]
    assert problems_of(values) == ["items: id: 4 ids occur more than once"]


def test_results_may_not_lie_among_the_images(values: dict[str, Any]) -> None:
    assert problems_of(values | {"output": "data/images/runs"}) == ["output: lies in items.images"]


def test_a_file_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "loop.yaml"
    path.write_text("output: [")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_loop(path)


def test_the_example_is_a_loop_that_asks_two_prompts_three_times_each(monkeypatch: pytest.MonkeyPatch) -> None:
    example = Path(__file__).parents[3] / "examples/loop_demo.yaml"
    read = yaml.safe_load(example.read_text())
    assert all(list(read["generation"][kind].values()) == [3, 3] for kind in ("captions", "answers"))
    with pytest.raises(ConfigError) as caught:  # its data may not be there, nothing else is wrong
        monkeypatch.chdir(Path(__file__).parent)
        read_loop(example)
    assert {problem.problem for problem in caught.value.problems} == {"is no file", "is no folder"}


def test_the_defaults_are_a_loop_of_one_round(values: dict[str, Any]) -> None:
    config = read_loop(write_loop(Path(), values))
    assert isinstance(config, LoopConfig) and config.rounds == 1 and config.seed == 42


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.01, 0.2, "better"), (-0.2, -0.01, "worse"), (-0.1, 0.1, "no difference that this many items could show")],
)
def test_the_last_line_says_what_the_interval_allows(low: float, high: float, verdict: str) -> None:
    entry = {"metric": "exact", "before": 0.5, "after": 0.6, "difference": 0.1, "low": low, "high": high, "n": 60}
    line = comparison_line("round_1", [entry])
    assert line.startswith("round_1: exact 0.5000 -> 0.6000 against the baseline, +0.1000")
    assert line.endswith(f"60 items: {verdict}")
