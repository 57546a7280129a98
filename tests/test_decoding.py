"""A JSON value becomes a dataclass only if every field fits; all that does not is named by its path."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pytest

from sicog_mcore.decoding import decode, parse_json, suggest, type_words
from sicog_mcore.errors import ConfigProblem


@dataclass(frozen=True)
class Part:
    name: str
    weights: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class Whole:
    count: int
    kind: Literal["a", "b", 1]
    flag: bool = False
    note: str | None = None
    parts: tuple[Part, ...] = ()
    limits: Mapping[str, int | float | Part] | None = None
    anything: Any = None


WHOLE = Whole(
    3, "b", True, None, (Part("x", ((1.0, 2.5), ())), Part("y")), {"m": 1, "n": 0.5, "p": Part("z")}, [1, "a"]
)


def test_a_dataclass_survives_json() -> None:
    assert decode(Whole, json.loads(json.dumps(asdict(WHOLE))), complete=True) == WHOLE
    assert decode(Whole, asdict(WHOLE)) == WHOLE  # without the trip
    assert decode(Whole, {"count": 1, "kind": 1}) == Whole(1, 1)


@pytest.mark.parametrize(
    ("change", "path", "problem"),
    [
        ({"count": True}, "count", "is not a whole number"),
        ({"count": 1.0}, "count", "is not a whole number"),
        ({"kind": "c"}, "kind", "is not one of a, b, 1"),
        ({"kind": True}, "kind", "is not one of a, b, 1"),
        ({"note": 1}, "note", "is not a text or null"),
        ({"parts": "x"}, "parts", "is not a list, each entry a group of name, weights"),
        ({"parts": [{"name": "x"}, {}]}, "parts[1].name", "is missing"),
        ({"parts": [{"name": "x", "weights": [[1, "2"]]}]}, "parts[0].weights[0][1]", "is not a number"),
        ({"parts": [3]}, "parts[0]", "is no group of fields"),
        ({"flags": 1}, "flags", "no such field"),
        ({"limits": {1: 2}}, "limits", "is not a mapping of names to values or null"),
    ],
)
def test_what_does_not_fit_is_named_by_its_path(change: dict[str, object], path: str, problem: str) -> None:
    found = decode(Whole, {"count": 1, "kind": "a"} | change)
    assert isinstance(found, list) and [(one.path, one.problem) for one in found] == [(path, problem)]


def test_all_problems_are_named_at_once_below_the_path_of_the_value() -> None:
    found = decode(Whole, {"kind": 2, "odd": 1}, "run")
    assert isinstance(found, list) and {one.path for one in found} == {"run.count", "run.kind", "run.odd"}
    assert found[0] == ConfigProblem(
        "run.odd", 1, "no such field", "known here: count, kind, flag, note, parts, limits, anything"
    )


def test_what_a_program_has_written_lacks_nothing() -> None:
    found = decode(Part, {"name": "x"}, complete=True)
    assert isinstance(found, list) and [one.path for one in found] == ["weights"]


def test_a_type_that_json_has_no_value_for_is_a_mistake_of_the_program() -> None:
    with pytest.raises(TypeError, match="no value can be read as set"):
        decode(tuple[set[int], ...], [[1]])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"a": NaN}', "found NaN, expected a finite number"),
        ("[-Infinity]", "found -Infinity"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' occurs twice"),
        ('{"a": ', "Expecting value"),
    ],
)
def test_json_is_read_strictly(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        parse_json(text)
    assert parse_json('{"a": [1, null]}') == {"a": [1, None]}


def test_words_for_users() -> None:
    assert (
        suggest("cuont", ["count", "kind"]) == "did you mean count?" and suggest("x", ["a", "b"]) == "known here: a, b"
    )
    assert type_words(tuple[str, ...]) == "a list of texts" and type_words(bool) == "true or false"
