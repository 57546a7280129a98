"""How a verb starts: from a script and from the one command, with words below it, and with one message where it fails."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from sicog_mcore.commands.verb import Verb, VerbCall, VerbFamily, reporting
from sicog_mcore.errors import ConfigError, ConfigProblem, DataError, MachineError


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """Options of the verb under test.

    Attributes:
        times: how often.
    """

    times: int = 2

    def mistake(self) -> str:
        return "--times must not be 13" if self.times == 13 else ""


def say(options: Repeated, call: VerbCall) -> int:
    sys.stdout.write(f"{options.times} {call.usage_name} | {call.command}\n")
    return options.times


FAMILY = VerbFamily("About.", {"again": Verb("says it again", Repeated, say)})


@pytest.mark.parametrize(
    ("program", "name"),
    [
        (("tools/say.py",), "say.py"),
        (("-m", "sicog_mcore", "say"), "sicog say"),
        (("/x/bin/sicog", "say"), "sicog say"),
    ],
)
def test_a_verb_knows_how_it_was_started(
    program: tuple[str, ...], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Verb("about", Repeated, say).start(["--times", "7"], {}, program) == 7
    assert capsys.readouterr().out == f"7 {name} | {' '.join(program)} --times 7\n"
    assert FAMILY.start(["again", "--times=3"], {}, program) == 3
    assert capsys.readouterr().out == f"3 {name} | {' '.join(program)} again --times=3\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["agan"], "invalid choice: 'agan'"),
        (["again", "--times", "x"], "argument --times: invalid int value: 'x'"),
        (["again", "--times", "13"], "error: --times must not be 13"),
        (["again", "--tims", "1"], "unrecognized arguments: --tims 1"),
    ],
)
def test_a_wrong_word_ends_with_code_2(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        FAMILY.start(words, {}, ("say.py",))
    assert end.value.code == 2 and said in capsys.readouterr().err


def failing(error: Exception) -> Callable[[], str]:
    def work() -> str:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError([ConfigProblem("a", 1, "is wrong", "take 2")]), 2),
        (DataError("nothing left"), 17),
        (MachineError("the disk is full"), 75),
        (OSError(28, "No space left on device"), 75),
        (FileNotFoundError(2, "No such file"), 2),
    ],
)
def test_a_failure_is_one_message_and_its_code(error: Exception, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert reporting("say", failing(error)) == code
    told = capsys.readouterr()
    assert told.out == "" and told.err == f"say: {error}\n"


def test_success_is_printed_without_what_steers_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert reporting("say", lambda: "done\x1b[2J") == 0 and capsys.readouterr().out == "done\\x1b[2J\n"
