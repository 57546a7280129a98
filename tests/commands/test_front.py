"""The one command: it lists its verbs, finds the one that was meant, and says how it is started again."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from sicog_mcore import __version__
from sicog_mcore.commands.front import main, own_program
from sicog_mcore.commands.registry import VERBS


def test_the_overview_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for entry in VERBS:
        assert [line.split()[0] for line in lines if entry.help in line] == [entry.name]


def test_without_a_verb_it_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2 and "usage: sicog VERB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "message"), [("join-record", "did you mean join-records?"), ("xyz", "expected one of ")]
)
def test_an_unknown_verb_is_refused(word: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 2
    assert f"error: found '{word}', which is no verb; {message}" in capsys.readouterr().err


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"sicog_mcore {__version__}\n"


@pytest.mark.parametrize(
    ("word", "program"),
    [("/x/sicog_mcore/__main__.py", ("-m", "sicog_mcore")), ("/venv/bin/sicog", ("/venv/bin/sicog",))],
)
def test_it_knows_how_it_was_started(word: str, program: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [word, "join-records"])
    assert own_program() == program


def test_a_reader_that_leaves_is_no_traceback() -> None:
    command = f"{shlex.quote(sys.executable)} -m sicog_mcore recipes list | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 141)  # the whole list may fit into the pipe before head has gone
    assert done.stdout.startswith("demo ") and done.stderr == ""


def test_the_help_of_the_warm_up_needs_no_first_word(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["warmup", "--help"])
    printed = capsys.readouterr().out
    assert caught.value.code == 0 and "The first word is perception or reasoning" in printed and "--optim.lr" in printed
    assert main(["warmup"]) == 2
