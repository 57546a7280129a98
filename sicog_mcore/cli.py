"""The front of the configuration: preset, then YAML files, then dotted overrides; every mistake reported at once.

In: command line arguments.  Out: a checked Experiment.  Next: launch/, where torch is imported only after this.
The fields, their types and descriptions come from config.py; jsonargparse converts each value and writes the help.
"""

from __future__ import annotations

import difflib
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache, reduce
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentError, ArgumentParser

from sicog_mcore.config import Experiment
from sicog_mcore.decoding import decode
from sicog_mcore.errors import ConfigError, ConfigProblem
from sicog_mcore.presets import PRESETS
from sicog_mcore.recipes import resolve
from sicog_mcore.validation import find_problems

COMMAND_LINE = "command line"
FALLBACK_PRESET = "tiny"  # stands in where none is named, so that the help and the other checks can go on
SCALAR_WORDS: Mapping[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
SWITCHES = ("--help", "-h", "--print_config")
# Values that are no longer taken, and what did the same: recomputing attention alone kept as much as recomputing nothing.
EARLIER: Mapping[tuple[str, str], str] = {("train.recompute_decoder", "selective"): "none"}
USAGE = "%(prog)s --preset NAME [--config FILE.yaml] [--group.field VALUE | group.field=VALUE ...] [--print_config]"


@dataclass(frozen=True)
class Field:
    """One value of the configuration: its type, its description, and whether it must be given."""

    hint: Any
    description: str
    required: bool


@dataclass(frozen=True)
class Leaf:
    """One value that a user gave: dotted path, value, and where it was written."""

    path: str
    value: Any
    where: str


def load_experiment(
    argv: list[str],
    world_size: int,
    check_inputs: Callable[[Experiment], list[ConfigProblem]] = lambda _: [],
    stage: Mapping[str, Any] = MappingProxyType({}),
    program: str = "",
) -> Experiment:
    """Reads the command line.

    Args:
        argv: arguments without the program's name.
        world_size: ranks the run was started with.
        check_inputs: looks at the files that are named; what it finds is reported together with the rest.
        stage: values, by dotted path, that a training stage puts on top of the preset; files and overrides win.
        program: what the usage line of the help calls the program; empty for the script that runs.

    Raises:
        ConfigError: anything wrong with the arguments, the files they name, or what they ask for; all of it.
        SystemExit: code 0, after ``--help`` or ``--print_config``.
    """
    problems: list[ConfigProblem] = []
    leaves = list(_read_arguments([word for word in argv if word not in SWITCHES], problems))
    name = next((leaf.value for leaf in reversed(leaves) if leaf.path == "preset"), None)
    preset = name if isinstance(name, str) and name in PRESETS else FALLBACK_PRESET
    if "--help" in argv or "-h" in argv:
        _print_help(preset, program)
    all_read = not any(problem.path == "config" for problem in problems)
    if name != preset and (all_read or name is not None):
        problem = "is missing" if name is None else "is not a preset"
        problems.append(ConfigProblem("preset", name, problem, f"use one of {', '.join(PRESETS)}"))
    values = _accept([leaf for leaf in leaves if leaf.path != "preset"], known_fields(), problems)
    experiment = _build(Experiment, _values(PRESETS[preset]()) | dict(stage) | values)
    if "--print_config" in argv and not problems:
        sys.stdout.write(yaml.safe_dump(experiment.to_dict(), sort_keys=False))
        raise SystemExit(0)
    if all_read:  # rules about values that a broken file did not get to set would only mislead
        rules = check_inputs(experiment) + (find_problems(experiment, world_size) if name == preset else [])
        reported = {_field_of(problem) for problem in problems}
        problems += [problem for problem in rules if _field_of(problem) not in reported]
    if problems:
        raise ConfigError(problems)
    return experiment


def experiment_from_dict(values: Mapping[str, Any]) -> Experiment:
    """The Experiment that ``to_dict`` was called on, also after a trip through JSON.

    Raises:
        ConfigError: a field is missing, unknown, or of the wrong type.
    """
    found = decode(Experiment, _today("", values))
    if isinstance(found, list):
        raise ConfigError(found)
    return found


def _today(path: str, value: Any) -> Any:
    """Renames a value that an earlier version saved to its name of today, and so all values of a group."""
    if isinstance(value, Mapping):
        return {name: _today(f"{path}.{name}" if path else name, one) for name, one in value.items()}
    return EARLIER.get((path, value), value) if isinstance(value, str) else value


def describe_changes(old: Experiment, new: Experiment) -> list[str]:
    """One line for every value that differs, e.g. "optim.lr: 2e-05 -> 0.0001"."""
    before, after = _values(old), _values(new)
    return [f"{path}: {before[path]} -> {after[path]}" for path in before if before[path] != after[path]]


@cache
def known_fields(cls: type = Experiment, prefix: str = "") -> Mapping[str, Field]:
    """Every field below a configuration class, by dotted path."""
    descriptions = _descriptions(cls)
    hints = get_type_hints(cls)
    known: dict[str, Field] = {}
    for item in fields(cls):
        path = f"{prefix}{item.name}"
        if is_dataclass(hints[item.name]):
            known |= known_fields(hints[item.name], f"{path}.")
        else:
            required = item.default is MISSING and item.default_factory is MISSING
            known[path] = Field(hints[item.name], descriptions[item.name], required)
    return known


@cache
def known_groups(cls: type = Experiment, prefix: str = "") -> Mapping[str, str]:
    """Description of every group of fields, by dotted path."""
    groups: dict[str, str] = {}
    for name, hint in get_type_hints(cls).items():
        if is_dataclass(hint) and isinstance(hint, type):
            groups[f"{prefix}{name}"] = _descriptions(cls)[name]
            groups.update(known_groups(hint, f"{prefix}{name}."))
    return groups


def _descriptions(cls: type) -> dict[str, str]:
    """Reads the Args of a class's docstring, each as one line."""
    documented = parse_docstring(cls.__doc__ or "").params
    return {item.arg_name: " ".join((item.description or "").split()) for item in documented}


def _read_arguments(argv: list[str], problems: list[ConfigProblem]) -> Iterator[Leaf]:
    """Files first, whatever their place, so that overrides win."""
    overrides: list[Leaf] = []
    words = deque(argv)
    while words:
        word = words.popleft()
        name, equals, value = word.removeprefix("--").partition("=")
        if not equals and word.startswith("--") and words and not words[0].startswith("--"):
            equals, value = "=", words.popleft()
        if not equals:
            problems.append(ConfigProblem(name, None, "has no value", "write group.field=VALUE or --group.field VALUE"))
        elif name == "config":
            yield from _read_file(value, problems)
        elif name in known_groups():
            overrides += _read_yaml(value, COMMAND_LINE, name, problems)
        else:
            overrides.append(Leaf(name, value, COMMAND_LINE))
    yield from overrides


def _read_file(file: str, problems: list[ConfigProblem]) -> list[Leaf]:
    try:
        with open(resolve(file), encoding="utf-8") as stream:
            return list(_read_yaml(stream.read(), file, "", problems))
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text: {error.reason} at byte {error.start}"
    problems.append(ConfigProblem("config", file, problem, "give the path of a YAML file"))
    return []


def _read_yaml(text: str, source: str, path: str, problems: list[ConfigProblem]) -> list[Leaf]:
    """Leaves of a YAML text; ``path`` is the group that the text stands for."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        where = source if source == COMMAND_LINE else f"{source}:1"
        return list(_walk(node, path, where, loader, problems)) if node else []
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        problem, fix = f"is not YAML: {error.problem}", "correct the syntax on or just before this line"
        problems.append(ConfigProblem("config" if not path else path, f"{source}{line}", problem, fix))
    except yaml.YAMLError as error:
        problems.append(ConfigProblem("config", source, f"is not YAML: {error}", "save it as plain text"))
    return []


def _walk(
    node: yaml.Node, path: str, where: str, loader: yaml.SafeLoader, problems: list[ConfigProblem]
) -> Iterator[Leaf]:
    is_group = path in known_groups() or not path
    if not is_group:
        yield Leaf(path, loader.construct_object(node, deep=True), where)
        return
    if not isinstance(node, yaml.MappingNode):
        value = loader.construct_object(node, deep=True)
        if value is not None:  # nothing under a heading, everything commented out: no values
            problem = f"is a group of fields ({where})"
            problems.append(ConfigProblem(path or "config", value, problem, "write field: value lines below it"))
        return
    loader.flatten_mapping(node)
    source = where if where == COMMAND_LINE else where.rpartition(":")[0]
    seen: set[str] = set()
    for key, child in node.value:
        name = f"{path}.{key.value}" if path else str(key.value)
        place = source if source == COMMAND_LINE else f"{source}:{key.start_mark.line + 1}"
        if name in seen:
            value = loader.construct_object(child, deep=True)
            problems.append(ConfigProblem(name, value, f"is given twice ({place})", "keep one of the two"))
        seen.add(name)
        yield from _walk(child, name, place, loader, problems)


def _accept(
    leaves: list[Leaf], known: Mapping[str, Field], problems: list[ConfigProblem], prefix: str = ""
) -> dict[str, Any]:
    """Converts what can be converted, by path; each leaf is judged alone, so that one mistake hides no other."""
    values: dict[str, Any] = {}
    for leaf in leaves:
        path = f"{prefix}{leaf.path}"
        field = known.get(leaf.path)
        if field is None:
            problem = f"no such field ({leaf.where})"
            names = known if prefix else (*known, *known_groups())
            problems.append(ConfigProblem(path, leaf.value, problem, _suggest(leaf.path, names)))
            continue
        before = len(problems)
        if element := _element_class(field.hint):
            _check_elements(leaf, path, element, problems)
        if len(problems) > before:
            continue
        try:
            values[leaf.path] = _convert(field.hint, leaf.value)
        except (ArgumentError, TypeError):
            problem = f"is not {_type_words(field.hint)} ({leaf.where})"
            problems.append(ConfigProblem(path, leaf.value, problem, f"give {_describe(field)}"))
    return values


def _check_elements(leaf: Leaf, path: str, element: type, problems: list[ConfigProblem]) -> None:
    """Judges a list of dataclasses element by element, e.g. data.sources[0].path."""
    try:
        elements = yaml.safe_load(leaf.value) if isinstance(leaf.value, str) else leaf.value
    except yaml.YAMLError:
        return  # the conversion of the whole reports it
    known = known_fields(element)
    for index, value in enumerate(elements if isinstance(elements, list | tuple) else []):
        if not isinstance(value, Mapping):
            fix = f"write {{{', '.join(known)}}}"
            problems.append(ConfigProblem(f"{path}[{index}]", value, f"is not a mapping ({leaf.where})", fix))
            continue
        _accept([Leaf(str(k), v, leaf.where) for k, v in value.items()], known, problems, f"{path}[{index}].")
        for name in [name for name, field in known.items() if field.required and name not in value]:
            fix = f"give {_describe(known[name])}"
            problems.append(ConfigProblem(f"{path}[{index}].{name}", None, f"is missing ({leaf.where})", fix))


def _convert(hint: Any, value: Any) -> Any:
    """The value as the type says: text is parsed, lists become tuples, their mappings dataclasses."""
    if value is None:
        raise TypeError("no field may be null")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    return parser.instantiate(parser.parse_object({"value": value})).value


def _element_class(hint: Any) -> type | None:
    """The dataclass that a tuple holds, or None."""
    element = get_args(hint)[0] if get_origin(hint) is tuple else None
    return element if is_dataclass(element) and isinstance(element, type) else None


def _type_words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    if element := _element_class(hint):
        return f"a list of {{{', '.join(known_fields(element))}}}"
    if get_origin(hint) is tuple:
        return f"a list of {', '.join(get_args(get_args(hint)[0]))}"
    return SCALAR_WORDS.get(hint, "a mapping of names to plain values")


def _describe(field: Field) -> str:
    return f"{_type_words(field.hint)}: {field.description.rstrip('.')}"


def _suggest(path: str, names: Iterable[str]) -> str:
    """The names a user may have meant: the same last word elsewhere, then similar spelling, then the group's fields."""
    names = list(names)
    group, _, word = path.rpartition(".")
    same_word = [name for name in names if name.rpartition(".")[2] == word]
    near = list(dict.fromkeys(same_word + difflib.get_close_matches(path, names, n=3)))[:3]
    if near:
        return f"did you mean {' or '.join(near)}?"
    siblings = [name for name in names if name.rpartition(".")[0] == group]
    return f"known here: {', '.join(siblings)}" if siblings else "--help lists every field"


def _field_of(problem: ConfigProblem) -> str:
    """The field a problem is about, whichever element of its list."""
    return problem.path.partition("[")[0]


def _values(experiment: Experiment) -> dict[str, Any]:
    """Every value, by path."""
    return {path: reduce(getattr, path.split("."), experiment) for path in known_fields()}


def _build(cls: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """The inverse of ``_values``; a field without a value keeps its default."""
    arguments = {}
    for name, hint in get_type_hints(cls).items():
        if is_dataclass(hint) and isinstance(hint, type):
            arguments[name] = _build(hint, values, f"{prefix}{name}.")
        elif f"{prefix}{name}" in values:
            arguments[name] = values[f"{prefix}{name}"]
    return cls(**arguments)


def _print_help(preset: str, program: str) -> None:
    """Every field with its description, unit, type and the preset's value; then exit 0."""
    about = (
        f"Presets: {', '.join(PRESETS)}. Files overlay the preset, overrides win over both. Defaults are {preset}'s."
    )
    parser = ArgumentParser(prog=program or None, description=about, usage=USAGE)
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file, or the name of a recipe; several are read in order"
    )
    parser.add_argument("--print_config", action="store_true", help="print the whole configuration as YAML and exit")
    defaults = _values(PRESETS[preset]())
    groups = {path: parser.add_argument_group(path, text) for path, text in known_groups().items()}
    for path, field in known_fields().items():
        section = groups.get(path.rpartition(".")[0], parser)
        section.add_argument(f"--{path}", type=field.hint, default=defaults[path], help=field.description)
    parser.parse_args(["--help"])
