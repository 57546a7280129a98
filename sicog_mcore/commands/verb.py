"""A verb joins options, the function that acts on them, and their start, from the one command as from a script.

In: words, environment   Out: exit code   Next: registry.py names them all
Modules of verbs hold a ``VERB``; what they do imports torch only inside the function that needs it, so that help is quick.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sicog_mcore.commands.parser import add_options, formatter_for, make_parser, options_from, refuse_mistakes
from sicog_mcore.errors import EXIT_CONFIG, EXIT_OK, SicogError, exit_code, printable


@dataclass(frozen=True)
class VerbCall:
    """How a verb was called.

    Attributes:
        program: the words before the verb's own: a script, or ``-m sicog_mcore VERB``.
        arguments: the verb's own words.
        environment: of the process, in which launched ranks find their place; a verb may set variables in it.
    """

    program: tuple[str, ...]
    arguments: tuple[str, ...]
    environment: MutableMapping[str, str]

    @property
    def argv(self) -> list[str]:
        """All words behind the interpreter."""
        return [*self.program, *self.arguments]

    @property
    def command(self) -> str:
        """Writes program and arguments as a shell takes them."""
        return shlex.join(self.argv)

    @property
    def usage_name(self) -> str:
        """How the usage line calls the program: ``curate.py`` of a script, ``sicog curate`` of the one command."""
        if self.program[:1] == ("-m",):
            return " ".join(("sicog", *self.program[2:]))
        return " ".join((Path(self.program[0]).name, *self.program[1:]))


class Startable(Protocol):
    """A verb that can be started; modules of verbs bind theirs to VERB."""

    def start(
        self,
        arguments: Sequence[str] | None = None,
        environment: MutableMapping[str, str] | None = None,
        program: tuple[str, ...] = (),
    ) -> int:
        """Runs the verb and returns its exit code.

        Args:
            arguments: the verb's words; None for those of this process.
            environment: None for that of this process.
            program: the words before them; empty for the script that this process runs.
        """
        ...


def make_call(
    arguments: Sequence[str] | None, environment: MutableMapping[str, str] | None, program: tuple[str, ...]
) -> VerbCall:
    """Returns the call with what is not given taken from this process."""
    words = sys.argv[1:] if arguments is None else arguments
    return VerbCall(program or (sys.argv[0],), tuple(words), os.environ if environment is None else environment)


@dataclass(frozen=True)
class Verb:
    """A verb with options of its own.

    Attributes:
        about: its help; the first line stands in lists.
        options: a frozen dataclass.
        main: does the work, prints, and returns the exit code.
        takes_abbreviations: whether the start of a flag stands for it where only one starts so.
    """

    about: str
    options: type
    main: Callable[[Any, VerbCall], int]
    takes_abbreviations: bool = True

    def start(
        self,
        arguments: Sequence[str] | None = None,
        environment: MutableMapping[str, str] | None = None,
        program: tuple[str, ...] = (),
    ) -> int:
        """Reads the options and runs; see Startable."""
        call = make_call(arguments, environment, program)
        parser = make_parser(self.options, self.about, call.usage_name)
        parser.allow_abbrev = self.takes_abbreviations
        options = options_from(self.options, parser.parse_args(list(call.arguments)))
        refuse_mistakes(options, parser)
        return self.main(options, call)


@dataclass(frozen=True)
class VerbFamily:
    """A verb that has further words below it, such as ``evaluate score``.

    Attributes:
        about: its help.
        verbs: what stands below it, by word; the ``about`` of each is one line.
    """

    about: str
    verbs: Mapping[str, Verb]

    def start(
        self,
        arguments: Sequence[str] | None = None,
        environment: MutableMapping[str, str] | None = None,
        program: tuple[str, ...] = (),
    ) -> int:
        """Finds the word, reads its options and runs; see Startable."""
        call = make_call(arguments, environment, program)
        parser = argparse.ArgumentParser(
            prog=call.usage_name, description=self.about, formatter_class=formatter_for(self.about)
        )
        below = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        parsers: dict[str, argparse.ArgumentParser] = {}
        for word, verb in self.verbs.items():
            parsers[word] = below.add_parser(
                word,
                help=verb.about.replace("%", "%%"),
                description=verb.about,
                formatter_class=formatter_for(verb.about),
            )
            add_options(parsers[word], verb.options)
        found = parser.parse_args(list(call.arguments))
        verb = self.verbs[found.command]
        options = options_from(verb.options, found)
        refuse_mistakes(options, parsers[found.command])
        return verb.main(options, call)


def reporting(name: str, work: Callable[[], str], mistakes: tuple[type[Exception], ...] = ()) -> int:
    """Does the work, prints the text it returns, or one message where it fails; returns the exit code.

    Args:
        name: stands before the message, for instance ``score``.
        mistakes: further errors of the work that are one message.
    """
    expected: tuple[type[Exception], ...] = (SicogError, OSError, *mistakes)
    try:
        text = work()
    except expected as error:
        print(printable(f"{name}: {error}"), file=sys.stderr)
        return exit_code(error)
    print(printable(text))
    return EXIT_OK


def usage_error(text: str) -> int:
    """Says what is wrong with a command line; returns the exit code."""
    print(printable(f"error: {text}"), file=sys.stderr)
    return EXIT_CONFIG
