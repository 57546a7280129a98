"""Bounds the tokens of a text from below before it is tokenised: tokenising takes 150 times a text's size in memory.

In: a tokenizer's file   Out: TextBound; None where a token can stand for any length of text   Next: tokenizer.py, encode.py
The bound is safe: a text never has fewer tokens than it says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tokenizers.pre_tokenizers import ByteLevel

ALL_BYTES = 256
# Unicode's normal forms write at most so many bytes as one: a bold mathematical zero as a digit.
NORMAL_FORM_SHRINKS = 4
NORMAL_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
KEEPS_TEXT = ("ByteLevel", "Metaspace", "Digits", "UnicodeScripts")  # kinds of pre-tokenizers that drop nothing
SPLITS = ("Split", "Punctuation")  # kinds that drop what they find if they are told to


class TextBound(NamedTuple):
    """The most text that one token can stand for.

    Attributes:
        longest: bytes of normalised text.
        shrink: most bytes of a text that normalising turns into one byte; ASCII stays as it is.
    """

    longest: int
    shrink: int

    def bytes_per_token(self, text: str) -> int:
        return self.longest if text.isascii() else self.longest * self.shrink

    def least_tokens(self, text: str) -> int:
        """Gives a number of tokens that the text has at least."""
        # Normalising leaves at least bytes / shrink, and a token covers at most ``longest`` of them; nothing of the
        # text may be dropped, which is why the functions below give no bound where something could be.
        return -(-num_bytes(text) // self.bytes_per_token(text))


def num_bytes(text: str) -> int:
    """Length in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def bound_of_file(spec: Mapping[str, Any]) -> TextBound | None:
    """Computes the bound of a tokenizer.json.

    None where it cuts texts off, drops characters, or makes one unknown token of any number of them.
    """
    model, splitters = spec["model"], list(_parts(spec.get("pre_tokenizer"), "pretokenizers"))
    shrink = _shrink(spec.get("normalizer"))
    added = [token for token in spec.get("added_tokens", ()) if not token["special"]]  # special ones stand in no text
    # Such a token takes any amount of white space with it, so it would have no longest text.
    swallows_space = any(token["lstrip"] or token["rstrip"] for token in added)
    if spec.get("truncation") or shrink is None or swallows_space or not all(map(_keeps_text, splitters)):
        return None
    is_byte_level = any(part["type"] == "ByteLevel" for part in splitters)
    longest = _longest(model, is_byte_level)
    if longest is None:
        return None
    # Tokens that were added beside the vocabulary are found in texts too, and may be longer than all its entries.
    return TextBound(max([longest, *(num_bytes(token["content"]) for token in added)]), shrink)


def _longest(model: Mapping[str, Any], is_byte_level: bool) -> int | None:
    """Most bytes of an entry of the vocabulary; None unless every byte has one."""
    pieces = list(model["vocab"]) if model["type"] == "BPE" else []
    if model["type"] == "Unigram" and not is_byte_level:
        pieces = [piece for piece, _ in model["vocab"]]
    # A byte level writes each of the 256 bytes as one visible character, so an entry stands for as many bytes as it has
    # characters. A byte without an entry would vanish, or join an unknown token of any length.
    if is_byte_level:
        return max(map(len, pieces)) if set(ByteLevel.alphabet()) <= set(pieces) else None
    # Letters without an entry are written byte by byte. The name of a byte has six, and a space is written as a sign of
    # three: both only make the bound looser.
    names = {f"<0x{byte:02X}>" for byte in range(ALL_BYTES)}
    return max(map(num_bytes, pieces)) if model.get("byte_fallback") and names <= set(pieces) else None


def _shrink(normalizer: Mapping[str, Any] | None) -> int | None:
    """Bytes that a normalizer makes one byte of at most; None if it can drop text."""
    shrink = 1
    for part in _parts(normalizer, "normalizers"):
        if part["type"] in NORMAL_FORMS:
            shrink = NORMAL_FORM_SHRINKS
        elif part["type"] == "Replace":
            # A replacement may make a text longer, not shorter; what a regular expression finds has no bound.
            found = part["pattern"].get("String")
            if not found or num_bytes(part["content"]) < num_bytes(found):
                return None
        elif part["type"] != "Prepend":
            return None
    return shrink


def _keeps_text(splitter: Mapping[str, Any]) -> bool:
    return splitter["type"] in KEEPS_TEXT or (splitter["type"] in SPLITS and splitter["behavior"] != "Removed")


def _parts(step: Mapping[str, Any] | None, inside: str) -> Iterator[Mapping[str, Any]]:
    """A step of a tokenizer.json, or the steps of a sequence."""
    if step is not None and step["type"] == "Sequence":
        for part in step[inside]:
            yield from _parts(part, inside)
    elif step is not None:
        yield step
