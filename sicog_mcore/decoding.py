"""Reads JSON and YAML values as dataclasses, strictly: each value must have the annotated type, and every mistake is named.

In: text, or a value that a parser returned   Out: an instance, or ConfigProblems by dotted path   Next: cognition/records.py
The one typed decoder: a wrong field that is let through is found far from its cause.
"""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from sicog_mcore.errors import ConfigProblem

SAME_WORD = 0.6  # how alike two names are, by difflib, if one may be a slip for the other
SCALAR_WORDS: Mapping[Any, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "a path",
    type(None): "null",
}

T = TypeVar("T")


def parse_json(text: str | bytes) -> Any:
    """Parses strict JSON: no NaN or Infinity, and no object with a name that occurs twice.

    Raises:
        ValueError: it is something else, or not UTF-8.
    """
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)


def decode(kind: type[T], value: Any, path: str = "", complete: bool = False) -> T | list[ConfigProblem]:
    """Reads a JSON or YAML value as the annotated type: dataclass, tuple[X, ...], Mapping[str, X], Literal, union, scalar.

    Args:
        path: dotted path of the value in its document, for the problems; empty for the document itself.
        complete: fields with a default must be there too, as in what a program has written.

    Returns:
        the instance; or, where anything does not fit, all problems and nothing else.
    """
    problems: list[ConfigProblem] = []
    found = _decode(kind, value, path, complete, problems)
    return problems or found


def _decode(kind: Any, value: Any, path: str, complete: bool, problems: list[ConfigProblem]) -> Any:
    """The value as its type; where it does not fit, a problem is noted and what is returned is of no use."""
    if kind is float:  # the most frequent by far, in matrices of scores
        if type(value) in (float, int):
            return float(value)
    elif kind is Any:  # a class too, so it comes first
        return value
    elif isinstance(kind, type):
        if is_dataclass(kind):
            return _decode_fields(kind, value, path, complete, problems)
        if type(value) is kind:
            return value
        if kind is Path and type(value) is str:
            return Path(value)
    elif (origin := get_origin(kind)) is tuple:
        if isinstance(value, list | tuple):
            element = get_args(kind)[0]
            return tuple(_decode(element, one, f"{path}[{i}]", complete, problems) for i, one in enumerate(value))
    elif origin is Literal:
        # 1 == True: the types must be equal too.
        if any(value == allowed and type(value) is type(allowed) for allowed in get_args(kind)):
            return value
    elif origin in (Union, types.UnionType):
        for member in get_args(kind):
            tried: list[ConfigProblem] = []
            found = _decode(member, value, path, complete, tried)
            if not tried:
                return found
    elif origin in (Mapping, dict):
        if isinstance(value, dict) and all(isinstance(name, str) for name in value):
            member = get_args(kind)[1]
            return {name: _decode(member, one, f"{path}.{name}", complete, problems) for name, one in value.items()}
    else:
        raise TypeError(f"{path}: no value can be read as {kind}; use one of the types that decode() names")
    problems.append(ConfigProblem(path, value, f"is not {type_words(kind)}", f"give {type_words(kind)}"))
    return None


def _decode_fields(kind: Any, value: Any, path: str, complete: bool, problems: list[ConfigProblem]) -> Any:
    if not isinstance(value, dict):
        problems.append(ConfigProblem(path or "config", value, "is no group of fields", "write field: value lines"))
        return None
    before, hints, optional = len(problems), _hints(kind), _optional(kind)
    prefix = f"{path}." if path else ""
    for name in [name for name in value if name not in hints]:
        problem = ConfigProblem(f"{prefix}{name}", value[name], "no such field", suggest(str(name), list(hints)))
        problems.append(problem)
    arguments = {}
    for name, hint in hints.items():
        if name in value:
            arguments[name] = _decode(hint, value[name], f"{prefix}{name}", complete, problems)
        elif complete or name not in optional:
            problems.append(ConfigProblem(f"{prefix}{name}", None, "is missing", f"give {type_words(hint)}"))
    return kind(**arguments) if len(problems) == before else None


@cache
def _hints(kind: type) -> dict[str, Any]:
    """Types of the fields of a dataclass, in their order."""
    hints = get_type_hints(kind)
    return {item.name: hints[item.name] for item in fields(kind)}


@cache
def _optional(kind: type) -> frozenset[str]:
    """Names of the fields of a dataclass that have a default."""
    owned = fields(kind)
    return frozenset(item.name for item in owned if item.default is not MISSING or item.default_factory is not MISSING)


def suggest(name: str, known: Sequence[str]) -> str:
    """Suggests the name that a user may have meant by an unknown one, or all the names there are."""
    near = difflib.get_close_matches(name, known, 1, SAME_WORD)
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"


def type_words(kind: Any) -> str:
    """A type in words, as they follow "is not" and "give"."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(type_words, arguments))
    if origin is tuple:
        words = {str: "texts", int: "whole numbers", float: "numbers"}.get(arguments[0])
        return f"a list of {words}" if words else f"a list, each entry {type_words(arguments[0])}"
    if origin in (Mapping, dict):
        return "a mapping of names to values"
    if isinstance(kind, type) and is_dataclass(kind):
        return f"a group of {', '.join(item.name for item in fields(kind))}"
    return SCALAR_WORDS.get(kind, str(kind))


def _refuse_constant(name: str) -> Any:
    """Every comparison with NaN is false: what carries one would pass any threshold."""
    raise ValueError(f"found {name}, expected a finite number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names occur once; JSON's reader would take the last value without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found
