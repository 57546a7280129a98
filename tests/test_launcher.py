"""Whatever goes wrong, a launcher says it once, in words a user can act on, and ends with the exit code that fits."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from sicog_mcore import launcher
from sicog_mcore.errors import DataError, MachineError, PeerError, SicogError, TrainingError
from sicog_mcore.launcher import start_command, start_training
from sicog_mcore.lock import LOCK, FolderLock
from sicog_mcore.stages import PRETRAIN
from tests.builders import TOKENIZER, write_dataset

SCRIPT = "launch/pretrain_stage15.py"
MEET = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A YAML file with which training could start; its output folder is ``run`` beside it."""
    rows = write_dataset(tmp_path, 2)
    source = {"path": str(rows), "images": str(tmp_path / "images")}
    values = {
        "preset": "tiny",
        "output": str(tmp_path / "run"),
        "data": {"tokenizer": TOKENIZER, "sources": [source]},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds for which ranks stayed silent; nobody really waits."""
    seconds: list[float] = []
    monkeypatch.setattr(launcher, "time", types.SimpleNamespace(sleep=seconds.append))
    return seconds


def _source(path: Path, images: Path) -> str:
    return json.dumps([{"path": str(path), "images": str(images)}])


# name -> arguments, ranks, and for each problem: its field and value, what is wrong, the remedy
Case = tuple[Callable[[Path], Sequence[str]], int, Sequence[tuple[str, str, str]]]
MISTAKES: dict[str, Case] = {
    "unknown key": (
        lambda folder: ["--train.stepz", "3"],
        1,
        [("train.stepz = '3'", "no such field (command line)", "did you mean train.steps")],
    ),
    "misspelt preset": (lambda folder: ["--preset", "tiyn"], 1, [("preset = 'tiyn'", "is not a preset", "tiny, uhd_")]),
    "layout": (
        lambda folder: ["--parallel.tensor", "3"],
        3,
        [("parallel.tensor = 3", "tensor=3 does not divide 4 attention heads", "use 1 or 2")],
    ),
    "number of ranks": (
        lambda folder: ["--parallel.tensor", "2"],
        3,
        [("parallel.tensor = 2", "3 ranks cannot hold whole copies", "torchrun --nproc-per-node 2, 4 or 6")],
    ),
    "missing data set": (
        lambda folder: ["--data.sources", _source(folder / "none.jsonl", folder / "images")],
        1,
        [("data.sources[0].path", "none.jsonl': does not exist", "relative paths start at")],
    ),
    "missing image folder": (
        lambda folder: ["--data.sources", _source(folder / "data.jsonl", folder / "none")],
        1,
        [("data.sources[0].images", "none': does not exist", "give the folder that image paths are relative to")],
    ),
    "image folder is a file": (
        lambda folder: ["--data.sources", _source(folder / "data.jsonl", folder / "data.jsonl")],
        1,
        [("data.sources[0].images", "is not a folder", "give the folder that image paths are relative to")],
    ),
    "missing tokenizer": (
        lambda folder: ["--data.tokenizer", str(folder / "none.json")],
        1,
        [("data.tokenizer", "none.json': holds no tokenizer", "give a Hugging Face tokenizer.json")],
    ),
    "tokenizer larger than the model": (
        lambda folder: ["--model.decoder.vocab_size", "512"],
        1,
        [("model.decoder.vocab_size = 512", "the tokenizer needs 600 tokens", "make it at least 600")],
    ),
    "output below a file": (
        lambda folder: ["--output", str(folder / "data.jsonl" / "run")],
        1,
        [("output = ", "data.jsonl is not a folder", "give a folder that can be created")],
    ),
    "several at once": (
        lambda folder: ["--train.steps", "abc", "--optim.lrr", "1", "--data.tokenizer", "", "--data.workers", "-1"],
        1,
        [
            ("train.steps = 'abc'", "is not a whole number", "optimiser steps of the whole run"),
            ("optim.lrr = '1'", "no such field", "did you mean optim.lr"),
            ("data.tokenizer = ''", "no tokenizer is named", "give a Hugging Face tokenizer.json"),
            ("data.workers = -1", "out of range", "use a finite number at least 0"),
        ],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message_and_leaves_nothing_behind(
    name: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, ranks, expected = MISTAKES[name]
    files = sorted(config.parent.iterdir())
    argv = [SCRIPT, "--config", str(config), *arguments(config.parent)]
    assert start_training(argv, {"RANK": "0", "WORLD_SIZE": str(ranks), **MEET}, PRETRAIN) == 2
    out, err = capsys.readouterr()
    title, *lines = err.splitlines()
    assert title == f"error: {len(expected)} configuration problem{'s' * (len(expected) > 1)}:" and not out
    for line, (found, problem, remedy) in zip(lines, expected, strict=True):
        assert line.startswith(f"  - {found}") and line.index(found) < line.index(problem) < line.index(remedy)
    assert sorted(config.parent.iterdir()) == files


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("preset: tiny\ntrain:\n  steps: 3\n bad: [\n", "run.yaml:4': is not YAML: "),
        ("preset: tiny\ntrian:\n  steps: 3\n", "trian = {'steps': 3}: no such field ("),
        ("- preset\n", "config = ['preset']: is a group of fields ("),
        ("\x00", "is not YAML: "),
    ],
)
def test_a_file_with_a_mistake_is_named(
    config: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str
) -> None:
    config.write_text(text)
    assert start_training([SCRIPT, "--config", str(config)], {}, PRETRAIN) == 2
    assert expected in capsys.readouterr().err


def test_no_arguments_say_what_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert start_training([SCRIPT], {}, PRETRAIN) == 2
    paths = [line.split(" = ")[0] for line in capsys.readouterr().err.splitlines()[1:]]
    assert paths == ["  - preset", "  - data.sources", "  - data.tokenizer"]


def test_an_unreadable_image_folder_is_one_message(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = config.parent / "images"
    access = os.access  # the administrator may read everything, so the answer is made up
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != images and access(path, mode))
    assert start_training([SCRIPT, "--config", str(config)], {}, PRETRAIN) == 2
    assert f"images = {str(images)!r}: cannot be read; give this user the right" in capsys.readouterr().err


def test_other_ranks_are_silent_and_let_the_first_one_speak(
    config: Path, capsys: pytest.CaptureFixture[str], waited: list[float]
) -> None:
    argv = [SCRIPT, "--config", str(config), "--parallel.tensor", "3"]
    assert start_training(argv, {"RANK": "2", "WORLD_SIZE": "3", **MEET}, PRETRAIN) == 2
    assert capsys.readouterr() == ("", "") and waited == [launcher.SPEAKER_FIRST_S]


def _trains_until(monkeypatch: pytest.MonkeyPatch, end: BaseException) -> None:
    def run(*_: object) -> None:
        raise end

    module = types.ModuleType("sicog_mcore.train.run")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize(
    ("end", "code", "said_by_first", "said_by_second"),
    [
        (DataError("too many bad samples"), 17, "error: too many bad samples\n", "error: too many bad samples\n"),
        (PeerError("another rank says why"), 17, "error: another rank says why\n", ""),
        (TrainingError("step 7: loss nan"), 17, "error: step 7: loss nan\n", ""),
        (MachineError("rank 1 is silent"), 75, "error: rank 1 is silent\n", "error: rank 1 is silent\n"),
        (SicogError("broken"), 1, "error: broken\n", ""),
        (
            KeyboardInterrupt("after step 7"),
            130,
            "interrupted after step 7; the same command resumes from the newest checkpoint\n",
            "",
        ),
    ],
)
def test_the_end_of_a_run_has_its_exit_code_and_its_speaker(
    end: BaseException,
    code: int,
    said_by_first: str,
    said_by_second: str,
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    waited: list[float],
) -> None:
    _trains_until(monkeypatch, end)
    for rank, said in enumerate((said_by_first, said_by_second)):
        environment = {"RANK": str(rank), "WORLD_SIZE": "2", **MEET}
        assert start_training([SCRIPT, "--config", str(config)], environment, PRETRAIN) == code
        assert capsys.readouterr() == ("", said)
    assert len(waited) == (said_by_second == "")


def test_a_lonely_rank_is_one_message_before_anything_heavy(
    config: Path, capsys: pytest.CaptureFixture[str], waited: list[float]
) -> None:
    argv = [SCRIPT, "--config", str(config)]
    assert start_training(argv, {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, PRETRAIN) == 2
    said = capsys.readouterr().err
    assert "RANK = None: is missing, but SLURM_NTASKS=2" in said and "RANK=0 WORLD_SIZE=1 if one process" in said
    assert start_training(argv, {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, PRETRAIN) == 2
    assert capsys.readouterr().err == "" and waited == [launcher.SPEAKER_FIRST_S]
    assert not (config.parent / "run").exists()


def test_a_second_start_is_refused_and_the_lock_goes_with_the_run(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv, folder = [SCRIPT, "--config", str(config)], config.parent / "run"
    _trains_until(monkeypatch, SicogError("broken"))
    first = FolderLock(folder, "python first.py")
    assert first.acquire() == ""
    assert start_training(argv, {}, PRETRAIN) == 2
    said = capsys.readouterr().err
    assert f"is in use by another run: process {os.getpid()} on" in said and "(python first.py)" in said
    assert (folder / LOCK).exists()
    first.release()
    assert start_training(argv, {}, PRETRAIN) == 1 and capsys.readouterr().err == "error: broken\n"
    assert not folder.exists()  # it was made for this run, and stayed empty


def test_the_environment_is_prepared_before_training_begins(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _trains_until(monkeypatch, SicogError("broken"))
    environment = {"RANK": "1", "WORLD_SIZE": "2", **MEET}
    monkeypatch.setattr(launcher, "time", types.SimpleNamespace(sleep=lambda _: None))
    assert start_training([SCRIPT, "--config", str(config), "--parallel.tensor", "2"], environment, PRETRAIN) == 1
    assert environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


def test_escape_sequences_of_data_never_reach_the_terminal(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _trains_until(monkeypatch, DataError("bad rows:\n  evil\x1b]0;PWN\x07\x1b[2J\u202e.json"))
    assert start_training([SCRIPT, "--config", str(config)], {}, PRETRAIN) == 17
    assert capsys.readouterr().err == "error: bad rows:\n  evil\\x1b]0;PWN\\x07\\x1b[2J\\u202e.json\n"


SOURCES = '[{"path": "a b.jsonl", "images": "it\'s $HOME"}]'


@pytest.mark.parametrize(
    "argv",
    [
        [SCRIPT, "--data.sources", SOURCES],
        [SCRIPT, "--data.sources=" + SOURCES.replace(", ", ",\n\t"), "--output", "run 1; echo no"],
        [SCRIPT, "--output", "esc\x1b[2J\\n'quoted'", "--data.system_prompt", ""],
        ["launch/warmup_stage0.py", "perception", "--output", "~/*"],
    ],
)
def test_the_command_that_resumes_survives_being_pasted(argv: list[str]) -> None:
    command = start_command(argv, {})
    assert command.isprintable()
    shown = command.partition(" ")[2]
    printed = subprocess.run(["bash", "-c", f"printf '%s\\0' {shown}"], capture_output=True, text=True, check=True)
    assert printed.stdout.split("\0")[:-1] == argv


def test_the_command_that_resumes_keeps_what_torchrun_was_told() -> None:
    one = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_MAX_RESTARTS": "3"}
    assert shlex.split(start_command(["a.py"], one))[1:] == ["--nproc-per-node", "4", "--max-restarts", "3", "a.py"]
    two = start_command(["a.py"], {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"})
    assert "--nnodes 2 --nproc-per-node 4 a.py  # on every node, with the --rdzv-*" in two
    assert "# on every rank, with RANK, WORLD_SIZE" in start_command(["a.py"], {"WORLD_SIZE": "8", "RANK": "1"})


RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    heavy = [name for name in ("torch", "megatron") if name in sys.modules]
    print("exit", end.code, heavy)
"""
GENERATE = (
    "launch/generate.py --checkpoint x --rows y --images z --prompts cod=1 --temperature 0 --top-p 1 --top-k 0"
    " --max-new-tokens 4 --seed 0 --batch 1 --out OUT"
)


@pytest.mark.parametrize(
    "command",
    [
        "launch/align_stage1.py --output OUT",
        "launch/warmup_stage0.py perception --output OUT",
        GENERATE,
        "launch/perplexity.py --checkpoint x --rows y --out OUT",
    ],
    ids=lambda command: command.split()[0],
)
def test_every_command_of_several_ranks_refuses_a_lonely_one(command: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    words = command.replace("OUT", str(tmp_path / "out")).split()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")]), "PMI_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *words], cwd=root, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "exit 2 []\n", done
    title, problem = done.stderr.splitlines()
    assert title == "error: 1 configuration problem:" and "RANK = None: is missing, but PMI_SIZE=2" in problem
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command",
    [
        "tools/annotate.py cot --rows y --images z --out OUT",
        "tools/annotate.py cod --endpoint http://127.0.0.1:9/v1 --model m --rows y --images z --out OUT",
        "tools/curate.py --round OUT --images z --tau 0.8",
    ],
    ids=["cot", "cod", "curate"],
)
def test_every_command_that_owns_a_folder_is_refused_a_second_time(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = FolderLock(tmp_path / "out", "python first.py")
    first.acquire()
    script, *words = command.replace("OUT", str(tmp_path / "out")).split()
    monkeypatch.setattr(sys, "argv", [script, *words])
    try:
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(Path(__file__).parents[1] / script), run_name="__main__")
        said = capsys.readouterr().err
        assert end.value.code == 2 and "is in use by another run" in said and "python first.py" in said, said
        assert [file.name for file in (tmp_path / "out").iterdir()] == [LOCK]
    finally:
        first.release()
