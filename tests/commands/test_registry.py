"""Every verb: its script takes the same flags, its help is quick and imports no torch, and no script is left out."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from sicog_mcore.commands.front import main
from sicog_mcore.commands.registry import VERBS, VerbEntry
from sicog_mcore.commands.train_stage import TrainingVerb
from sicog_mcore.commands.verb import VerbFamily

ROOT = Path(__file__).parents[2]
FLAG = re.compile(r"(?<![\w-])--?[a-z][\w.-]*")
HELP_S = 1.0
TRIES = 5  # a machine that is busy with other things needs several
HEAVY = ("torch", "megatron", "transformers", "sklearn")
COMMANDS_OF_WEIGHTS = ("import", "export", "inspect", "unpickle")
SCRIPTS = [entry for entry in VERBS if entry.script]


def words_of_help(entry: VerbEntry) -> list[list[str]]:
    """Command lines that print the help of a verb and of all that stands below it."""
    verb = entry.load()
    if isinstance(verb, VerbFamily):
        return [["--help"], *([word, "--help"] for word in verb.verbs)]
    if isinstance(verb, TrainingVerb):
        return [[*filter(None, [word]), "--help"] for word in verb.stages]
    return [["--help"], *([word, "--help"] for word in (COMMANDS_OF_WEIGHTS if entry.name == "convert" else ()))]


def without_name(text: str) -> str:
    """A help text without what the program is called, and without its line breaks, which depend on that."""
    return re.sub(r"^usage: .*? (?=\[-h\]|--preset)", "", " ".join(text.split()))


def help_of_script(script: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [script, *words])
    runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.mark.parametrize("entry", SCRIPTS, ids=lambda entry: entry.name)
def test_a_script_and_its_verb_take_the_same_flags(
    entry: VerbEntry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in words_of_help(entry):
        with pytest.raises(SystemExit, match="0"):
            help_of_script(entry.script, words, monkeypatch)
        script = capsys.readouterr().out
        monkeypatch.setattr(sys, "argv", ["sicog"])
        with pytest.raises(SystemExit, match="0"):
            main([entry.name, *words])
        verb = capsys.readouterr().out
        assert without_name(script) == without_name(verb)
        assert len(FLAG.findall(script)) >= 2


def test_every_script_is_the_shim_of_a_verb() -> None:
    found = sorted(
        path.relative_to(ROOT).as_posix() for place in ("launch", "tools") for path in (ROOT / place).glob("*.py")
    )
    assert found == sorted(entry.script for entry in SCRIPTS)
    for script in found:
        assert len((ROOT / script).read_text(encoding="utf-8").splitlines()) <= 20, script


def test_names_are_given_once() -> None:
    assert len({entry.name for entry in VERBS}) == len(VERBS)


@pytest.mark.parametrize("entry", VERBS, ids=lambda entry: entry.name)
def test_help_is_quick_and_imports_nothing_heavy(entry: VerbEntry) -> None:
    words = [*words_of_help(entry)[0]]
    code = (
        "import os, sys\n"
        "from sicog_mcore.commands.front import main\n"
        "try:\n"
        f"    main({[entry.name, *words]!r})\n"
        "except SystemExit:\n"
        "    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], sum(os.times()[:2]), file=sys.stderr)\n"
    )
    for _ in range(TRIES):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        heavy, _, seconds = done.stderr.rpartition(" ")
        assert heavy == "[]" and entry.name in done.stdout
        if float(seconds) < HELP_S:
            return
    raise AssertionError(f"{seconds} s of processor time")
