"""`sicog VERB ...`: lists the verbs, or hands the words behind a verb to it.

In: command line, environment   Out: exit code   Next: registry.py
"""

from __future__ import annotations

import difflib
import os
import signal
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import get_args

from sicog_mcore import __version__
from sicog_mcore.commands.registry import VERBS, VerbGroup, find_verb
from sicog_mcore.commands.verb import usage_error
from sicog_mcore.errors import EXIT_CONFIG, EXIT_OK

EXIT_PIPE = 128 + signal.SIGPIPE  # as a shell reports it
TITLES: Mapping[VerbGroup, str] = {
    "train": "train a model",
    "improve": "let it improve itself",
    "look": "look at data, weights and results",
    "tools": "tools",
}


def main(arguments: Sequence[str] | None = None, environment: MutableMapping[str, str] | None = None) -> int:
    """Runs one verb.

    Args:
        arguments: words behind the command's name; None for those of this process.
        environment: None for that of this process.

    Returns:
        exit code of the verb; 2 where there is none of that name; 141 where whoever reads the output has gone, as in
        ``sicog recipes list | head -1``.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _start(words, environment)
        sys.stdout.flush()  # here, where a closed pipe can still be met
    except BrokenPipeError:
        # The interpreter flushes once more at its end, and would complain of the same pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    return code


def _start(words: Sequence[str], environment: MutableMapping[str, str] | None) -> int:
    if not words or words[0] in ("--help", "-h"):
        print(overview())
        return EXIT_OK if words else EXIT_CONFIG
    if words[0] == "--version":
        print(f"sicog_mcore {__version__}")
        return EXIT_OK
    entry = find_verb(words[0])
    if entry is None:
        names = [known.name for known in VERBS]
        near = difflib.get_close_matches(words[0], names, 1)
        fix = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(names)}"
        return usage_error(f"found {words[0]!r}, which is no verb; {fix}")
    return entry.load().start(words[1:], environment, (*own_program(), entry.name))


def own_program() -> tuple[str, ...]:
    """Returns the words that start this command again: a script, or ``-m sicog_mcore``."""
    is_module = Path(sys.argv[0]).name == "__main__.py" or sys.argv[0] == "-m"
    return ("-m", "sicog_mcore") if is_module else (sys.argv[0],)


def overview() -> str:
    """Returns the help of the command: every verb by group, with one line each."""
    width = max((len(entry.name) for entry in VERBS), default=0)
    lines = ["usage: sicog VERB ...    (sicog VERB --help says what a verb takes)"]
    for group in get_args(VerbGroup):
        entries = [entry for entry in VERBS if entry.group == group]
        lines += ["", f"{TITLES[group]}:"] if entries else []
        lines += [f"  {entry.name:<{width}}  {entry.help}" for entry in entries]
    return "\n".join(lines)
