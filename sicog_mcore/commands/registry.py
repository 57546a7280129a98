"""All verbs by name: which module holds each, and one line of help. A module is imported when its verb is called.

In: name of a verb   Out: the module's VERB   Next: front.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Literal, cast

from sicog_mcore.commands.verb import Startable

VerbGroup = Literal["train", "improve", "look", "tools"]


@dataclass(frozen=True)
class VerbEntry:
    """One verb of the command.

    Attributes:
        module: file below sicog_mcore/commands that holds ``VERB``.
        script: the file of launch/ or tools/ that does the same, empty where there is none.
    """

    name: str
    module: str
    group: VerbGroup
    help: str
    script: str = ""

    def load(self) -> Startable:
        """Imports the verb's module and returns its VERB."""
        module = import_module(f"sicog_mcore.commands.{self.module}")
        return cast(Startable, module.VERB)


VERBS: Sequence[VerbEntry] = (
    VerbEntry(
        "join-records", "join_records", "improve", "make one round of several generation runs", "tools/join_records.py"
    ),
)


def find_verb(name: str) -> VerbEntry | None:
    """Returns the verb of that name, None if there is none."""
    return next((entry for entry in VERBS if entry.name == name), None)
