"""One parser for every verb, made from its options dataclass, and the way back from options to words.

In: a frozen dataclass whose docstring describes its fields   Out: argparse parser, options, words   Next: verb.py
A field is a flag: ``max_tokens: int = 5`` is ``--max-tokens N``. Tuples take several words, booleans are switches, Literals
are choices, a nested dataclass adds its own fields, and flags.py says what a type cannot.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints, runtime_checkable

from docstring_parser import parse as parse_docstring

from sicog_mcore.flags import Flag, flag_of


@runtime_checkable
class CheckedOptions(Protocol):
    """Options of which several can be wrong together."""

    def mistake(self) -> str:
        """Returns what is wrong, empty if nothing is."""
        ...


@runtime_checkable
class WordedOptions(Protocol):
    """Options that are written in a way of their own."""

    def words(self) -> Sequence[str]:
        """Returns the words of the command line."""
        ...


@dataclass(frozen=True)
class OptionForm:
    """One field as the command line has it.

    Attributes:
        path: names of the nested fields that lead to it, its own last.
        hint: type of one word's value; of a tuple that of its elements, of an optional value that of the value.
        is_optional: None is a value, which is only had by leaving the flag out.
        length: words that it takes: None one, 0 one or more, else that many.
        default: MISSING where the flag is required.
    """

    path: tuple[str, ...]
    hint: Any
    is_optional: bool
    length: int | None
    default: Any
    help: str
    flag: Flag

    @property
    def dest(self) -> str:
        return ".".join(self.path)

    @property
    def name(self) -> str:
        """The long name; ``--no-x`` of a switch that turns off what is on without it."""
        if self.flag.name:
            return self.flag.name
        word = self.path[-1].replace("_", "-")
        return f"--no-{word}" if self.hint is bool and self.default is True else f"--{word}"


@cache
def option_forms(cls: type, path: tuple[str, ...] = ()) -> tuple[OptionForm, ...]:
    """Returns every field of an options dataclass in order, those of nested dataclasses in the place of their group."""
    hints = get_type_hints(cls)
    return tuple(form for item in fields(cls) for form in _forms_of(cls, item, hints[item.name], path))


def _forms_of(cls: type, item: Field[Any], hint: Any, path: tuple[str, ...]) -> Iterator[OptionForm]:
    if is_dataclass(hint) and isinstance(hint, type):
        for form in option_forms(hint, (*path, item.name)):
            yield replace(form, default=MISSING) if flag_of(item).needs_all else form
        return
    inner, is_optional = _without_none(hint)
    flag, length = flag_of(item), None
    if flag.is_repeated:
        inner = get_args(inner)[0]
    if get_origin(inner) is tuple:
        arguments = get_args(inner)
        if flag.parse is None or arguments[-1] is Ellipsis:
            length = 0 if arguments[-1] is Ellipsis else len(arguments)
            inner = arguments[0]
    default = item.default if item.default_factory is MISSING else item.default_factory()
    yield OptionForm(
        (*path, item.name), inner, is_optional, length, default, _descriptions(cls).get(item.name, ""), flag
    )


def _without_none(hint: Any) -> tuple[Any, bool]:
    """A type without its None, and whether it had one."""
    if get_origin(hint) in (Union, UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not NoneType]
        if len(kinds) == 1:
            return kinds[0], True
    return hint, False


@cache
def _descriptions(cls: type) -> Mapping[str, str]:
    """Reads the docstring's text on each field, also of several that share a line, each as one line."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        for item in parse_docstring(base.__doc__ or "").params if is_dataclass(base) else []:
            for name in item.arg_name.split(","):
                found[name.strip()] = " ".join((item.description or "").split())
    return found


def add_options(parser: argparse.ArgumentParser, cls: type) -> None:
    """Adds a flag to the parser for every field of an options dataclass."""
    groups: dict[str, argparse._MutuallyExclusiveGroup] = {}
    for form in option_forms(cls):
        place: Any = parser
        if group := form.flag.group:
            name = group.rstrip("!")
            if name not in groups:
                groups[name] = parser.add_mutually_exclusive_group(required=group.endswith("!"))
            place = groups[name]
        _add(place, form)


def _add(place: Any, form: OptionForm) -> None:
    settings: dict[str, Any] = {"help": _help(form)}
    if form.hint is bool and form.flag.parse is None:
        settings["action"] = "store_false" if form.default is True else "store_true"
        place.add_argument(*_names(form), dest=form.dest, **settings)
        return
    settings["type"] = form.flag.parse or (str if get_origin(form.hint) is Literal else form.hint)
    if choices := form.flag.choices or (get_args(form.hint) if get_origin(form.hint) is Literal else ()):
        settings["choices"] = choices
    if form.flag.metavar is not None:
        settings["metavar"] = form.flag.metavar
    if form.length is not None:
        settings["nargs"] = form.length or "+"
    if form.flag.is_repeated:
        settings["action"] = "append"
    if form.flag.is_positional:
        if form.default is not MISSING:
            settings["nargs"] = "*" if form.length == 0 else "?"
            settings["default"] = form.default
        settings.setdefault("metavar", form.path[-1])
        place.add_argument(form.dest, **settings)
        return
    if form.default is MISSING:
        settings["required"] = True
    else:  # of a flag that comes again argparse would add to the default
        settings["default"] = None if form.flag.is_repeated else form.default
    if "choices" not in settings:
        settings.setdefault("metavar", form.path[-1].upper())
    place.add_argument(*_names(form), dest=form.dest, **settings)


def _names(form: OptionForm) -> list[str]:
    return [form.name, form.flag.short] if form.flag.short else [form.name]


def _help(form: OptionForm) -> str:
    """The description, with the default where it says something."""
    text = form.help.replace("%", "%%").rstrip(".")
    default = form.default
    if default is MISSING or default is None or isinstance(default, bool) or default in ((), "") or "default" in text:
        return text
    words = " ".join(map(form.flag.write, default)) if isinstance(default, tuple) else form.flag.write(default)
    return f"{text} (default: {words.replace('%', '%%')})"


def options_from(cls: type, found: argparse.Namespace) -> Any:
    """Returns the options that argparse has found; what is none of theirs is left alone."""
    values = {form.path: _value(form, getattr(found, form.dest)) for form in option_forms(cls)}
    return _build(cls, values, ())


def _value(form: OptionForm, value: Any) -> Any:
    if form.flag.is_repeated:
        if value is None:
            return form.default
        return tuple(tuple(entry) if isinstance(entry, list) else entry for entry in value)
    return tuple(value) if isinstance(value, list) else value


def _build(cls: type, values: Mapping[tuple[str, ...], Any], path: tuple[str, ...]) -> Any:
    hints = get_type_hints(cls)
    arguments = {}
    for item in fields(cls):
        here, hint = (*path, item.name), hints[item.name]
        is_group = is_dataclass(hint) and isinstance(hint, type)
        arguments[item.name] = _build(hint, values, here) if is_group else values[here]
    return cls(**arguments)


def make_parser(cls: type, about: str, program: str) -> argparse.ArgumentParser:
    """Returns the parser of one options dataclass.

    Args:
        about: what the verb does; of several lines their breaks are kept.
        program: how the command is called in the usage line.
    """
    parser = argparse.ArgumentParser(prog=program, description=about, formatter_class=formatter_for(about))
    add_options(parser, cls)
    return parser


def formatter_for(about: str) -> type[argparse.HelpFormatter]:
    """Returns the formatter that keeps the lines of a text that has several."""
    return argparse.RawDescriptionHelpFormatter if "\n" in about.strip() else argparse.HelpFormatter


def read_options(cls: type, words: Sequence[str], about: str = "", program: str = "sicog") -> Any:
    """Returns the options that the words of a command line stand for.

    Raises:
        SystemExit: code 0 after ``--help``; code 2, with a message, where a word is wrong.
    """
    parser = make_parser(cls, about, program)
    options = options_from(cls, parser.parse_args(list(words)))
    refuse_mistakes(options, parser)
    return options


def refuse_mistakes(options: Any, parser: argparse.ArgumentParser) -> None:
    """Ends with code 2 where the options' own ``mistake()`` names something that no single field shows."""
    if isinstance(options, CheckedOptions) and (text := options.mistake()):
        parser.error(text)


def to_words(options: Any) -> list[str]:
    """Returns the words of which ``read_options`` makes the same options; what has its default is left out.

    Options that have a ``words()`` of their own, such as those of training, are asked for it.

    Raises:
        ValueError: no words stand for a value, such as an empty list where the default is none.
    """
    if isinstance(options, WordedOptions):
        return list(options.words())
    behind, named, dashed = list[str](), list[str](), list[str]()
    cls: Any = type(options)
    for form in option_forms(cls):
        value = options
        for name in form.path:
            value = getattr(value, name)
        if form.default is not MISSING and value == form.default and type(value) is type(form.default):
            continue
        if form.flag.is_positional:
            own_words = _element_words(form, value)
            if dashed or any(word.startswith("-") for word in own_words):
                dashed += own_words  # in order, behind a word that ends all flags
            else:
                behind += own_words
        else:
            named += _flag_words(form, value)
    return [*behind, *named, *(["--", *dashed] if dashed else [])]


def _flag_words(form: OptionForm, value: Any) -> list[str]:
    if form.hint is bool and form.flag.parse is None:
        return [form.name]
    if value is None:
        raise ValueError(f"{form.dest}: no words stand for None, for the default is {form.default!r}")
    entries = value if form.flag.is_repeated else [value]
    return [word for entry in entries for word in _entry_words(form, entry)]


def _entry_words(form: OptionForm, value: Any) -> list[str]:
    """A flag and its words; ``--flag=word`` where a word would itself be taken for a flag."""
    words = _element_words(form, value)
    if form.length is None and words[0].startswith("-"):
        return [f"{form.name}={words[0]}"]
    if not words:
        raise ValueError(f"{form.dest}: no words stand for an empty list")
    if refused := [word for word in words if word.startswith("-")]:
        raise ValueError(f"{form.dest}: {refused[0]!r} would be read as a flag; within a list it cannot be written")
    return [form.name, *words]


def _element_words(form: OptionForm, value: Any) -> list[str]:
    return [form.flag.write(entry) for entry in ([value] if form.length is None else value)]
