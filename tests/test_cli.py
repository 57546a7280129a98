"""Preset, file and overrides become one Experiment; every mistake is reported at once, with place and remedy."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sicog_mcore import stages
from sicog_mcore.cli import describe_changes, experiment_from_dict, known_fields, load_experiment
from sicog_mcore.config import Experiment, SourceConfig
from sicog_mcore.data.preflight import check_inputs
from sicog_mcore.errors import ConfigError, ConfigProblem
from sicog_mcore.presets import PRESETS

START_LIMIT_S = 0.7


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """Arguments that name a data set and a tokenizer which exist."""
    for name in ("rows.json", "tokenizer.json"):
        (tmp_path / name).touch()
    sources = json.dumps([{"path": str(tmp_path / "rows.json"), "images": str(tmp_path)}])
    return ["--data.sources", sources, "--data.tokenizer", str(tmp_path / "tokenizer.json")]


def problems_of(argv: list[str], world_size: int = 1) -> dict[str, ConfigProblem]:
    with pytest.raises(ConfigError) as caught:
        load_experiment(argv, world_size)
    return {problem.path: problem for problem in caught.value.problems}


def test_overrides_win_over_the_file_which_wins_over_the_preset(tmp_path: Path, inputs: list[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("preset: tiny\noptim: {lr: 2e-5, beta1: 0.8}\nparallel.tensor: 2\ntrain:\n  # steps: 3\n")
    argv = ["optim.lr=1e-4", "--config", str(file), "--train.steps=7", "--model.tower.feature_layer", "-1", *inputs]
    experiment = load_experiment(argv, 2)
    assert (experiment.optim.lr, experiment.optim.beta1, experiment.parallel.tensor) == (1e-4, 0.8, 2)
    assert (experiment.train.steps, experiment.model.tower.feature_layer) == (7, -1)
    assert experiment.model.decoder == PRESETS["tiny"]().model.decoder


def test_lists_mappings_and_groups_can_be_given_on_the_command_line(inputs: list[str]) -> None:
    argv = ["--preset", "tiny", "--optim.freeze", "[tower]", "--parallel", "{overlap_grad_reduce: true}", *inputs]
    experiment = load_experiment([*argv, "model.decoder.mcore={deallocate_pipeline_outputs: true}"], 1)
    assert experiment.optim.freeze == ("tower",)
    assert experiment.parallel.overlap_grad_reduce
    assert experiment.model.decoder.mcore == {"deallocate_pipeline_outputs": True}
    assert isinstance(experiment.data.sources[0], SourceConfig)


def test_every_mistake_is_reported_at_once_with_its_place(tmp_path: Path, inputs: list[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "preset: tiny\nparalel:\n  tensor: 2\noptim:\n  lr: fast\n  lr: 1\ntrain: 3\ncheckpoint:\n  resume: yes\n"
    )
    argv = ["--config", str(file), "junk", "--model.decoder.head_dim", "31", "--train.attention", "magic", *inputs]
    problems = problems_of([*argv, "--output"])
    assert set(problems) == {
        *("paralel", "optim.lr", "train", "checkpoint.resume", "junk", "output"),
        *("model.decoder.head_dim", "train.attention"),
    }
    assert f"{file}:2" in problems["paralel"].problem and "did you mean parallel" in problems["paralel"].fix
    assert (
        f"{file}:9" in problems["checkpoint.resume"].problem
        and "auto, must, never" in problems["checkpoint.resume"].fix
    )
    assert "command line" in problems["train.attention"].problem and problems["train.attention"].value == "magic"


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("parallel.tensor", "two", "a whole number"),
        ("parallel.tensor", "2.5", "a whole number"),
        ("parallel.sequence", "maybe", "true or false"),
        ("optim.lr", "fast", "a number"),
        ("optim.freeze", "[towr]", "a list of tower, resampler, decoder"),
        ("train.precision", "fp8", "one of bf16, fp32"),
        ("data.sources", "a.json", "a list of {path, images}"),
        ("model.decoder.mcore", "[1]", "a mapping"),
    ],
)
def test_a_value_of_the_wrong_type_names_what_was_expected(path: str, value: str, expected: str) -> None:
    problem = problems_of(["--preset", "tiny", f"--{path}", value])[path]
    assert problem.value == value
    assert expected in problem.problem and expected in problem.fix


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("optim.learning_rat", "optim.warmup_fraction"),
        ("tensor", "parallel.tensor"),
        ("train.lr", "optim.lr"),
        ("paralell.tensor", "parallel.tensor"),
        ("data.workrs", "data.workers"),
        ("checkpoint.zzz", "checkpoint.resume"),
        ("zzz", "preset"),
    ],
)
def test_an_unknown_key_names_its_neighbours(path: str, near: str) -> None:
    assert near in problems_of(["--preset", "tiny", f"{path}=1"])[path].fix


def test_elements_of_a_list_are_blamed_by_index(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("preset: tiny\ndata:\n  sources: [{path: a, imags: b}, {images: 3}, 4]\n")
    problems = problems_of(["--config", str(file)])
    paths = {"data.sources[0].imags", "data.sources[1].images", "data.sources[1].path", "data.sources[2]"}
    assert paths == set(problems)
    assert "did you mean images?" in problems["data.sources[0].imags"].fix


@pytest.mark.parametrize(
    ("text", "words"),
    [("preset: tiny\noptim: [1\ntrain: 3\n", ":3"), ("- a\n", "group of fields"), ("a: \x07", "not YAML")],
)
def test_a_broken_file_is_one_problem_and_hides_no_other(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    problems = problems_of(["--config", str(file), "--optim.lr", "x"])
    assert set(problems) == {"config", "optim.lr"}
    assert words in str(problems["config"])


def test_a_missing_or_binary_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    assert "No such file" in problems_of(["--config", str(tmp_path / "none")])["config"].problem
    assert "UTF-8" in problems_of(["--config", str(tmp_path / "binary")])["config"].problem


@pytest.mark.parametrize("argv", [[], ["--preset", "tny"], ["preset=[tiny]"]])
def test_a_missing_or_unknown_preset_lists_the_known_ones(argv: list[str]) -> None:
    assert ", ".join(PRESETS) in problems_of(argv)["preset"].fix


def test_rules_are_checked_on_what_parses(inputs: list[str]) -> None:
    problems = problems_of(["--preset", "tiny", "--parallel.tensor", "3", "--optim.lr", "x", *inputs], 3)
    assert set(problems) == {"parallel.tensor", "optim.lr"}
    assert "does not divide 4 attention heads" in problems["parallel.tensor"].problem


@pytest.mark.parametrize("name", PRESETS)
def test_an_experiment_survives_json(name: str) -> None:
    experiment = PRESETS[name]()
    sources = (SourceConfig(path="a.json"), SourceConfig(path="b.tar", images="pictures"))
    experiment = replace(experiment, data=replace(experiment.data, sources=sources))
    assert experiment_from_dict(json.loads(json.dumps(experiment.to_dict()))) == experiment


def test_a_saved_value_that_is_no_longer_taken_means_what_it_did(inputs: list[str]) -> None:
    saved = PRESETS["tiny"]().to_dict()
    saved["train"] |= {"recompute_decoder": "selective"}
    del saved["train"]["recompute_layers"]  # as it was saved then
    assert experiment_from_dict(saved) == PRESETS["tiny"]()
    with pytest.raises(ConfigError, match="one of none, block, full"):
        load_experiment(["--preset", "tiny", "--train.recompute_decoder", "selective", *inputs], 1)


def test_a_saved_configuration_with_foreign_fields_is_refused() -> None:
    saved = PRESETS["tiny"]().to_dict()
    saved["optim"]["momentum"] = 0.9
    del saved["model"]["decoder"]["hidden"]
    with pytest.raises(ConfigError) as caught:
        experiment_from_dict(saved)
    assert {problem.path for problem in caught.value.problems} == {"optim.momentum", "model.decoder.hidden"}


def test_changes_are_described_by_path() -> None:
    old = PRESETS["tiny"]()
    new = replace(old, optim=replace(old.optim, lr=1e-4), output="elsewhere")
    assert describe_changes(old, new) == ["output: runs/tiny -> elsewhere", "optim.lr: 0.002 -> 0.0001"]
    assert describe_changes(old, old) == []


def test_the_printed_configuration_reads_back_as_the_same_experiment(
    tmp_path: Path, inputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--preset", "tiny", "--optim.eps", "1e-7", *inputs]
    with pytest.raises(SystemExit) as stopped:
        load_experiment([*argv, "--print_config"], 1)
    assert stopped.value.code == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert load_experiment(["--config", str(file)], 1) == load_experiment(argv, 1)


def test_help_describes_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        load_experiment(["--preset", "uhd_qwen2_7b", "--help"], 1)
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    words = "".join(text.split())  # argparse breaks lines at hyphens too
    for path, field in known_fields().items():
        assert f"--{path} " in text
        assert field.description and "".join(field.description.split()) in words
    assert "default:3584" in words


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=100, deadline=None)
@given(path=st.sampled_from(sorted(known_fields())), value=VALUES)
def test_no_value_whatever_leads_to_a_traceback(path: str, value: object) -> None:
    text = yaml.safe_dump(value)
    for argv in ([f"{path}={text}"], [f"--{path.partition('.')[0]}", json.dumps({path.partition(".")[2]: value})]):
        try:
            assert isinstance(load_experiment(["--preset=tiny", *argv], 1), Experiment)
        except ConfigError as error:
            assert error.problems


def test_a_configuration_is_checked_without_torch_and_at_once() -> None:
    code = (
        "import sys, time; start = time.process_time()\n"
        "from sicog_mcore.cli import load_experiment\n"
        "from sicog_mcore.errors import ConfigError\n"
        "try: load_experiment(['--preset', 'tiny', '--optim.lrr', '3'], 1)\n"
        "except ConfigError: pass\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "sys.stdout.write(str(time.process_time() - start))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert float(done.stdout) < START_LIMIT_S


EXAMPLES = Path(__file__).parents[1] / "examples"
STAGES = {
    "demo": stages.PRETRAIN,
    "stage0": stages.PERCEPTION,
    "stage1": stages.ALIGN,
    "stage15": stages.PRETRAIN,
    "stage2": stages.FINETUNE,
    "dpo": stages.DPO,
}

LOOPS = {"loop_demo.yaml"}  # read by tests/cognition/loop/test_graph.py


@pytest.mark.parametrize("example", sorted({file.name for file in EXAMPLES.glob("*.yaml")} - LOOPS))
def test_an_example_lacks_nothing_but_its_data_and_weights(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = STAGES[re.split("[_.]", example)[0]]
    monkeypatch.chdir(tmp_path)  # where no data was prepared
    ranks = 8 if "7b" in example else 2
    problems = check_inputs(load_experiment(["--config", str(EXAMPLES / example)], ranks, stage=stage))
    assert problems and all(problem.path.startswith(("data.", "init.")) for problem in problems), problems
