"""How a field of an options dataclass is written on a command line, where its type alone does not say it.

In: arguments of dataclasses.field   Out: a field whose metadata holds a Flag   Next: commands/parser.py reads it
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field
from typing import Any

METADATA_KEY = "flag"


@dataclass(frozen=True, kw_only=True)
class Flag:
    """The command-line form of one field. A field without a Flag is written ``--its-name VALUE``.

    Attributes:
        short: a second, short name, such as ``-t``.
        name: the long name where the field's own does not do, such as ``--no-prefill`` of a field that is true without it.
        metavar: what stands for the value in the help; several words for several values.
        is_positional: the value stands without a name, in the order of the fields.
        is_repeated: the flag may come again; the field is a tuple with one entry for each time.
        parse: makes a value of one word; a ValueError or ArgumentTypeError is reported as a wrong value.
        write: the inverse of ``parse``.
        choices: words that are taken; of a Literal these are known already.
        needs_all: of a nested dataclass: its fields are required, whatever their defaults.
        group: fields of the same group exclude each other; ``group!`` demands one of them.
    """

    short: str = ""
    name: str = ""
    metavar: str | tuple[str, ...] | None = None
    is_positional: bool = False
    is_repeated: bool = False
    parse: Callable[[str], Any] | None = None
    write: Callable[[Any], str] = str
    choices: tuple[str, ...] = ()
    needs_all: bool = False
    group: str = ""


def flag(default: Any = MISSING, **form: Any) -> Any:
    """Returns a dataclass field with a command-line form of its own.

    Args:
        default: the field's default; without one the flag is required.
        form: attributes of Flag.
    """
    return field(default=default, metadata={METADATA_KEY: Flag(**form)})


def flag_of(item: Field[Any]) -> Flag:
    """Returns the command-line form that a dataclass field was given, or the plain one."""
    found = item.metadata.get(METADATA_KEY)
    return found if isinstance(found, Flag) else Flag()
