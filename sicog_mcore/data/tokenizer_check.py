"""Checks that a tokenizer writes the text it is given, the same each time; settings that change it are off or refused.

In: the content of a tokenizer.json; an engine that encodes and decodes   Out: notes for the user   Next: tokenizer.py
A model learns the text that its tokenizer writes: a file that cuts, draws at random, lowers letters or drops spaces would
teach another text than the data holds, without an error anywhere.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

from sicog_mcore.errors import EXIT_CONFIG, SicogError

CONTROL_TOKEN = re.compile(r"(<\|\w+\|>)")
# Samples of text by kind; every one must come back as it was.
SAMPLES: Mapping[str, str] = {
    "the space between words": "two words",
    "a space in front": " word",
    "white space": "two\n\n  words \t\n",
    "capitals": "The Red CIRCLE of NASA",
    "digits and marks": "0x0A, 3.14! (a+b)*c = $5 ; 'don't' \"so\" <b>it's n't . , ?</b> `a` #1 @x [y] {z} a_b~^|\\/%&:-",
    "accents": "na\u00efve caf\u00e9 \u00dcber \u00f1 \u00e5",
    "other letters": "Привет Ελλάδα שלום नमस्ते ไทย 한국어",
    "Chinese and Japanese": "图中有一个红色的圆形。日本語のテスト",
    "full-width forms": "Ａ１２（ｂ），？",  # noqa: RUF001  (what is asked for)
    "signs with a meaning": "x\u00b2 \u00bd \u2122 \u2460 \ufb01 10\u212b H\u2082O \u2026",
    "emoji": "\U0001f642\U0001f44d\U0001f3fd \u2764\ufe0f",
}
JOINED = (("two", "words"), ("a\n", "b"), ("yes", "."))  # texts that are encoded one by one and stand side by side
REPEATS = 4  # a tokenizer that draws gives another answer within these, on a long text
FILE_KEYS = frozenset(
    "version truncation padding added_tokens normalizer pre_tokenizer post_processor decoder model".split()
)
MODEL_KEYS = frozenset(
    # BPE; WordPiece and WordLevel; Unigram
    "type dropout unk_token continuing_subword_prefix end_of_word_suffix fuse_unk byte_fallback ignore_merges vocab merges "
    "max_input_chars_per_word unk_id alpha nbest_size".split()
)
TOKEN_KEYS = frozenset("id content single_word lstrip rstrip normalized special".split())
RANDOM = ("dropout", "alpha", "nbest_size")  # of a model: another encoding of the same text each time


class TokenizerError(SicogError, ValueError):
    """A tokenizer cannot be read, or would teach a model another text than it is given."""

    exit_code = EXIT_CONFIG


class TokenizerEngine(Protocol):
    """The methods that a tokenizer must have to be judged."""

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text."""

    def decode(self, ids: Iterable[int], skip_controls: bool = True) -> str:
        """Text of ids."""


def read_content(text: str, where: str) -> dict[str, Any]:
    """Parses the object that a tokenizer.json holds.

    Raises:
        TokenizerError: it is no JSON object, or it names a thing twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise TokenizerError(f"{where} names {twice!r} twice; save the tokenizer again")
        return found

    try:
        content = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"{where} is no JSON ({error}); copy it again") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise TokenizerError(f"{where} is no tokenizer.json: it holds no model; copy it again")
    return content


def settle(content: dict[str, Any], where: str) -> list[str]:
    """Switches off what would cut, pad or draw, in place; returns a line for each, and one for each key nobody knows.

    Raises:
        TokenizerError: ids mean two tokens at once.
    """
    notes: list[str] = []
    for name, effect in (("truncation", "cut every text"), ("padding", "fill up every text")):
        if content.get(name) is not None:
            notes.append(f"{where}: {name} {_short(content[name])} would {effect}: switched off")
            content[name] = None
    model = content["model"]
    drawn = {name: model[name] for name in RANDOM if model.get(name)}
    if drawn:
        notes.append(f"{where}: model {_short(drawn)} would write the same text differently each time: switched off")
        model.update(dict.fromkeys(drawn))
    added = content.get("added_tokens") or []
    _require_one_meaning(model, added, where)
    plain = [token for token in added if CONTROL_TOKEN.fullmatch(token["content"]) and not token.get("special")]
    if plain:
        names = _listed(token["content"] for token in plain)
        notes.append(f"{where}: {names} not marked as special, so that data could write a turn: taken as special")
        for token in plain:
            token["special"] = True
    # transformers would take white space beside such a token away; here it is written by its id, and nothing is taken.
    eager = [
        token["content"] for token in added if token.get("special") and (token.get("lstrip") or token.get("rstrip"))
    ]
    if eager:
        notes.append(
            f"{where}: lstrip or rstrip of {_listed(eager)} eats white space beside it in transformers; here templates "
            "write it by id and the white space stays"
        )
    unknown = [("", key, value) for key, value in content.items() if key not in FILE_KEYS]
    unknown += [("model.", key, value) for key, value in model.items() if key not in MODEL_KEYS]
    unknown += [("added_tokens.", key, token[key]) for token in added for key in token if key not in TOKEN_KEYS]
    seen = {scope + key: value for scope, key, value in unknown}
    return notes + [f"{where}: {key!r} = {_short(value)} is unknown here and not used" for key, value in seen.items()]


def _require_one_meaning(model: Mapping[str, Any], added: Sequence[Any], where: str) -> None:
    remedy = "two texts would be one to the model; save the tokenizer again"
    if not all(isinstance(t, dict) and isinstance(t.get("content"), str) and type(t.get("id")) is int for t in added):
        raise TokenizerError(f"{where}: added_tokens must have a content and an id each; save the tokenizer again")
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score, numbered by their place
        if not all(isinstance(entry, list) and entry and isinstance(entry[0], str) for entry in vocabulary):
            raise TokenizerError(f"{where}: the vocabulary holds other things than tokens; save the tokenizer again")
        vocabulary = {entry[0]: i for i, entry in enumerate(vocabulary)}
    if not isinstance(vocabulary, dict):
        return
    if not all(type(number) is int for number in vocabulary.values()):
        raise TokenizerError(f"{where}: the vocabulary has ids that are no numbers; save the tokenizer again")
    # Ids and texts must be one to one, in both directions.
    by_id: dict[int, str] = {}
    for token, number in [*vocabulary.items(), *((token["content"], token["id"]) for token in added)]:
        if by_id.setdefault(number, token) != token:
            raise TokenizerError(f"{where}: id {number} is {by_id[number]!r} and {token!r}: {remedy}")
    for token in added:
        number = vocabulary.get(token["content"], token["id"])
        if number != token["id"]:
            raise TokenizerError(f"{where}: {token['content']!r} has the ids {number} and {token['id']}: {remedy}")


def patterns(content: Mapping[str, Any], where: str) -> tuple[list[str], list[str]]:
    """Texts that the normalizer and the pre_tokenizer of a file look for, as samples; and notes on what is no plain text."""
    literals: list[str] = []
    notes: list[str] = []

    def visit(node: object, part: str) -> None:
        if isinstance(node, dict):
            pattern = node.get("pattern")
            if isinstance(pattern, dict) and isinstance(pattern.get("String"), str):
                literals.append(pattern["String"])
            elif pattern is not None and node.get("type") == "Replace":
                notes.append(
                    f"{where}: {part} replaces {_short(pattern)} by {_short(node.get('content'))} in every text"
                )
            if isinstance(node.get("delimiter"), str):
                literals.append(node["delimiter"])
            for value in node.values():
                visit(value, part)
        elif isinstance(node, list):
            for value in node:
                visit(value, part)

    for part in ("normalizer", "pre_tokenizer"):
        visit(content.get(part), part)
    return literals, notes


def judge_text(
    engine: TokenizerEngine,
    where: str,
    unknown_id: int | None = None,
    normalise: Callable[[str], str] = lambda text: text,
    more: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """Asks a tokenizer to write samples of text; returns notes on what it writes otherwise but not wrongly.

    Composed and decomposed letters (NFC) are the same text. Letters that have no token are the vocabulary's limit: noted.

    Args:
        unknown_id: what stands for text without a token.
        normalise: what the tokenizer does to a text before it is cut into tokens.
        more: further samples by kind, of this tokenizer's own words.

    Raises:
        TokenizerError: the text comes back as another one, or not always the same.
    """
    # Asked first, reported last unless it is a space: a tokenizer that puts one between texts also fails samples below,
    # and this message names the cause.
    apart = _joined_otherwise(engine, unknown_id, [*JOINED, *(tuple(text.split()[:2]) for text in more.values())])
    for pair, found in apart:
        if found.replace(" ", "") == "".join(pair) and " " in found:
            raise TokenizerError(
                f"{where} writes {pair[0]!r} and {pair[1]!r} side by side as {found!r}: it puts a space where none is; give "
                'its SentencePiece .model instead, or set "add_prefix_space": false, "prepend_scheme": "never", and take '
                "out Prepend and Strip"
            )
    samples = {**SAMPLES, **more}
    lost: list[str] = []
    composed: list[str] = []
    for kind, text in samples.items():
        # The normalizer alone is judged before the ids: it changes text even where every letter has a token.
        # SentencePiece writes a space as U+2581.
        cleaned = normalise(text).replace("\u2581", " ")
        if not _is_same(cleaned, text):
            raise _changed(where, kind, text, cleaned)
        ids = engine.encode(text)
        found = engine.decode(ids, skip_controls=False)
        # Letters without a token are a limit of the vocabulary. Anything else that comes back changed would be learnt.
        if unknown_id in ids or _is_short_of(found, text):
            lost.append(f"{text!r} as {found!r}")
        elif not _is_same(found, text):
            raise _changed(where, kind, text, found)
        elif found != text:
            composed.append(f"{text!a} as {found!a}")
    for pair, found in apart:
        raise _changed(where, "texts side by side", "".join(pair), found)
    # The samples are composed letters, so a tokenizer that composes shows only with decomposed ones.
    decomposed = unicodedata.normalize("NFD", SAMPLES["accents"])
    found = engine.decode(engine.encode(decomposed), skip_controls=False)
    if not lost and not composed and found != decomposed and _is_same(found, decomposed):
        composed.append(f"{decomposed!a} as {found!a}")
    # Dropout leaves many short texts as they are, but hardly a long one four times.
    long = " ".join(SAMPLES.values()) * 3
    if len({tuple(engine.encode(long)) for _ in range(REPEATS)}) > 1:
        raise TokenizerError(f"{where} writes the same text differently each time; switch off its sampling")
    notes = [f"{where}: letters without a token, e.g. it writes {lost[0]}"] if lost else []
    return notes + ([f"{where}: writes another form of the same letters (NFC), e.g. {composed[0]}"] if composed else [])


def _joined_otherwise(
    engine: TokenizerEngine, unknown_id: int | None, pairs: Sequence[tuple[str, ...]]
) -> list[tuple[tuple[str, ...], str]]:
    """Texts that are written one by one and read together as something else, with what is read."""
    otherwise = []
    for pair in pairs:
        ids = [token for text in pair for token in engine.encode(text)]
        found = engine.decode(ids, skip_controls=False)
        if unknown_id not in ids and not _is_same(found, "".join(pair)):
            otherwise.append((pair, found))
    return otherwise


def _is_same(found: str, text: str) -> bool:
    return found == text or unicodedata.normalize("NFC", found) == unicodedata.normalize("NFC", text)


def _is_short_of(found: str, text: str) -> bool:
    """Whether nothing but letters beyond ASCII is missing, as where a vocabulary has no token for them."""
    kept = iter(found.replace("\ufffd", ""))
    letter = next(kept, None)
    for expected in text:
        # Walks both texts at once: a letter that is missing may be skipped only if it is beyond ASCII.
        if letter == expected:
            letter = next(kept, None)
        elif expected.isascii():
            return False
    return letter is None and found != text


def _changed(where: str, kind: str, text: str, found: str) -> TokenizerError:
    return TokenizerError(
        f"{where} changes {kind}: it writes {text!r} as {found!r}, and a model would learn that; take the normalizer or "
        "pre_tokenizer that does it out of the file, or give another tokenizer"
    )


def _short(value: object, most: int = 80) -> str:
    shown = repr(value)
    return shown if len(shown) <= most else f"{shown[:most]}..."


def _listed(names: Iterable[str], most: int = 5) -> str:
    shown = [repr(name) for name in names]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")
