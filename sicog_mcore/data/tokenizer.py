"""Loads tokenizers of both families behind one protocol: Hugging Face tokenizer.json and SentencePiece .model files.

In: a file, or a folder that holds one   Out: Tokenizer   Next: chat.py
Text never yields control tokens, and nothing is put in front of it: the pieces of a conversation are encoded one by one,
so a tokenizer that starts every text with a space would write spaces that nobody wrote.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, decoders, models, normalizers

from sicog_mcore.data.text_bound import ALL_BYTES, TextBound, bound_of_file, num_bytes
from sicog_mcore.data.tokenizer_check import CONTROL_TOKEN, TokenizerError, judge_text, patterns, read_content, settle

HF_FILE, SENTENCEPIECE_FILE = "tokenizer.json", "tokenizer.model"
SENTENCEPIECE_SUFFIX = ".model"
UNIGRAM, BPE = 1, 2  # kinds of SentencePiece models
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # kinds of its pieces
SPACE = "▁"
LOSSLESS_SAMPLE = "two\n\n  words "


class Tokenizer(Protocol):
    """Text to token ids and back, the same each time. Picklable; ids run from 0 to below ``size``.

    Attributes:
        notes: lines for the user: what of the file is switched off, not used, or writes a text in another form.
    """

    notes: tuple[str, ...]

    @property
    def size(self) -> int:
        """Rows that the decoder's embedding table must have."""

    @property
    def bound(self) -> TextBound | None:
        """The most text that a token can stand for; None if that has no bound."""

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text; a control token in it is text like any other."""

    def decode(self, ids: Iterable[int], skip_controls: bool = True) -> str:
        """Text of ids."""

    def token_to_id(self, token: str) -> int | None:
        """Id of one token, control tokens included; None if there is none."""

    def save(self, path: Path) -> None:
        """Writes a tokenizer.json that transformers loads and that gives the same ids.

        One difference is left to SentencePiece models: text that spells a control piece is that piece there.
        """


def find_tokenizer_file(path: str) -> Path | None:
    """The file that a path means: itself, or the first one known inside a folder; None if there is none."""
    given = Path(path)
    files = (given / HF_FILE, given / SENTENCEPIECE_FILE) if path and given.is_dir() else (given,)
    return next((file for file in files if file.is_file()), None)


def load_tokenizer(path: str) -> Tokenizer:
    """Reads tokenizer.json, a SentencePiece .model, or a folder that holds one of them.

    Raises:
        TokenizerError: there is no such file, it cannot be read, or it writes another text than it is given.
    """
    file = find_tokenizer_file(path)
    if file is None:
        raise TokenizerError(f"{path!r} holds no tokenizer; give a {HF_FILE}, a SentencePiece .model, or their folder")
    return SentencePieceTokenizer(file) if file.suffix == SENTENCEPIECE_SUFFIX else HuggingFaceTokenizer(file)


class HuggingFaceTokenizer:
    """A tokenizer.json, without its truncation, padding and dropout; controls (``<|name|>``) are never read from text.

    Raises:
        TokenizerError: it cannot be read, or it writes another text than it is given.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{file} cannot be read ({error}); copy it again") from error
        content = read_content(text, str(file))
        before = json.dumps(_settings(content))
        settled = settle(content, str(file))
        # Kept only where something was switched off: ``save`` copies all other files byte by byte.
        self._changed = json.dumps(content, ensure_ascii=False) if json.dumps(_settings(content)) != before else None
        try:
            self._engine = tokenizers.Tokenizer.from_str(self._changed or text)
        except Exception as error:  # the library raises nothing narrower
            raise TokenizerError(f"{file} cannot be read as a tokenizer ({error}); copy it again") from error
        # Read as ordinary text, control tokens in data open and close no turn.
        self._engine.encode_special_tokens = True
        try:
            self.notes = (*settled, *self._judge(content))
        except TokenizerError:
            raise
        except Exception as error:  # of a vocabulary that cannot write a sample at all
            raise TokenizerError(f"{file} cannot write plain text ({error}); give another tokenizer") from error

    def _judge(self, content: Mapping[str, Any]) -> list[str]:
        added = content.get("added_tokens") or []
        for token in added:
            if (found := self._engine.token_to_id(token["content"])) != token["id"]:
                raise TokenizerError(
                    f"{self._file} numbers {token['content']!r} {token['id']}, and it is read as {found}; save it again"
                )
        unknown = content["model"].get("unk_token")
        unknown_id = content["model"].get("unk_id") if unknown is None else self._engine.token_to_id(unknown)
        normalizer = self._engine.normalizer
        words = self._known_words(unknown_id)
        # Words of the vocabulary itself, so that a small vocabulary is judged by text that it can write.
        before, behind = words if len(words) == 2 else ("a", "b")
        literals, notes = patterns(content, str(self._file))
        literals += [token["content"] for token in added if not token.get("special")]
        samples = {f"text around {literal!r}": f"{before}  {literal}  {behind}" for literal in literals}
        if len(words) == 2:
            samples["known words"] = f"{before}  {behind}\n{before}"
        normalise = normalizer.normalize_str if normalizer is not None else str
        return notes + judge_text(self, str(self._file), unknown_id, normalise, samples)

    def _known_words(self, unknown_id: int | None) -> tuple[str, ...]:
        """Two words that the vocabulary can write; fewer if it has no such words."""
        words = []
        for token in sorted(self._engine.get_vocab(with_added_tokens=False)):
            if token.isascii() and token.isalnum() and unknown_id not in self.encode(token) and len(token) > 1:
                words.append(token)
            if len(words) == 2:
                break
        return tuple(words)

    def __reduce__(self) -> tuple[type[HuggingFaceTokenizer], tuple[Path]]:
        """A pickled engine forgets that control tokens in text are text; so workers read the file again."""
        return HuggingFaceTokenizer, (self._file,)

    @property
    def size(self) -> int:
        return max(self._engine.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def bound(self) -> TextBound | None:
        return bound_of_file(json.loads(self._file.read_text(encoding="utf-8")))

    def encode(self, text: str) -> list[int]:
        return self._engine.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_controls: bool = True) -> str:
        return self._engine.decode(list(ids), skip_special_tokens=skip_controls)

    def token_to_id(self, token: str) -> int | None:
        return self._engine.token_to_id(token)

    def save(self, path: Path) -> None:
        """Writes the file, with what was switched off in it."""
        path.write_bytes(self._file.read_bytes() if self._changed is None else self._changed.encode())


class SentencePieceTokenizer:
    """A SentencePiece model, unigram or BPE.

    User-defined symbols of the form ``<|name|>`` become control symbols, which text cannot yield.

    Raises:
        TokenizerError: it cannot be read, or it writes another text than it is given, white space included.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            self._model = ModelProto.FromString(file.read_bytes())
        except Exception as error:  # protobuf has errors of its own
            raise TokenizerError(f"{file} cannot be read as a SentencePiece model ({error}); copy it again") from error
        # Pieces of a conversation are encoded one by one, and each would get a space in front.
        self._model.normalizer_spec.add_dummy_prefix = False
        for piece in self._model.pieces:
            # A user-defined symbol is found in text; a control symbol never is.
            if piece.type == USER_DEFINED and CONTROL_TOKEN.fullmatch(piece.piece):
                piece.type = CONTROL
        try:
            self._engine = SentencePieceProcessor(model_proto=self._model.SerializeToString())
        except (OSError, RuntimeError) as error:
            raise TokenizerError(f"{file} cannot be read as a SentencePiece model ({error}); copy it again") from error
        if (found := self.decode(self.encode(LOSSLESS_SAMPLE))) != LOSSLESS_SAMPLE:
            remedy = "--byte_fallback --remove_extra_whitespaces=false --normalization_rule_name=identity"
            raise TokenizerError(f"{file} writes {LOSSLESS_SAMPLE!r} as {found!r}; train it with {remedy}")
        self.notes = tuple(judge_text(self, str(file), self._engine.unk_id()))

    def __reduce__(self) -> tuple[type[SentencePieceTokenizer], tuple[Path]]:
        return SentencePieceTokenizer, (self._file,)

    @property
    def size(self) -> int:
        return self._engine.get_piece_size()

    @cached_property
    def bound(self) -> TextBound | None:
        pieces, rules = self._model.pieces, self._model.normalizer_spec
        has_all_bytes = sum(piece.type == BYTE for piece in pieces) == ALL_BYTES
        # Without all bytes, letters may join one unknown token; the two rules may make text shorter.
        drops = not has_all_bytes or rules.remove_extra_whitespaces or rules.precompiled_charsmap
        return None if drops else TextBound(max(num_bytes(piece.piece) for piece in pieces), 1)

    def encode(self, text: str) -> list[int]:
        return self._engine.encode(text)

    def decode(self, ids: Iterable[int], skip_controls: bool = True) -> str:
        parts: list[str] = []
        # SentencePiece writes nothing for a control symbol. Where they are wanted, their names go between the runs of
        # ordinary pieces, which are decoded one by one.
        for is_control, group in itertools.groupby(ids, self._engine.is_control):
            run = list(group)
            if not is_control:
                parts.append(self._engine.decode(run))
            elif not skip_controls:
                parts += map(self._engine.id_to_piece, run)
        return "".join(parts)

    def token_to_id(self, token: str) -> int | None:
        found = self._engine.piece_to_id(token)
        return found if self._engine.id_to_piece(found) == token else None

    def save(self, path: Path) -> None:
        _convert(self._model).save(str(path))


def _settings(content: Mapping[str, Any]) -> list[Any]:
    """Gives all of a tokenizer.json but the vocabulary, which is large and never changed."""
    model = {key: value for key, value in content["model"].items() if key not in ("vocab", "merges")}
    return [{key: value for key, value in content.items() if key != "model"}, model]


def _convert(model: ModelProto) -> tokenizers.Tokenizer:
    """Converts a SentencePiece model for the tokenizers library."""
    pieces, spec = model.pieces, model.trainer_spec
    unknown = next(piece.piece for piece in pieces if piece.type == UNKNOWN)
    engine = tokenizers.Tokenizer(_unigram(model) if spec.model_type == UNIGRAM else _bpe(model, unknown))
    charsmap = model.normalizer_spec.precompiled_charsmap
    rules = [normalizers.Precompiled(charsmap)] if charsmap else []
    engine.normalizer = normalizers.Sequence([*rules, normalizers.Replace(" ", SPACE)])
    engine.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    engine.add_special_tokens([AddedToken(p.piece, normalized=False) for p in pieces if p.type in (UNKNOWN, CONTROL)])
    engine.add_tokens([AddedToken(p.piece, normalized=True) for p in pieces if p.type == USER_DEFINED])
    return engine


def _unigram(model: ModelProto) -> models.Unigram:
    lowest = min(piece.score for piece in model.pieces)
    # The names of bytes stand in the vocabulary, where text must not find them.
    scored = [(piece.piece, 10 * lowest if piece.type == BYTE else piece.score) for piece in model.pieces]
    unknown = next(i for i, piece in enumerate(model.pieces) if piece.type == UNKNOWN)
    return models.Unigram(scored, unknown, model.trainer_spec.byte_fallback)


def _bpe(model: ModelProto, unknown: str) -> models.BPE:
    ids: Mapping[str, int] = {piece.piece: i for i, piece in enumerate(model.pieces)}
    merges = []
    # A SentencePiece file holds no merges. Its scores fall in the order in which pieces were merged, so each piece,
    # best score first, gives every pair of known halves as a merge.
    for piece in sorted(model.pieces, key=lambda piece: -piece.score):
        if piece.type in (UNKNOWN, CONTROL, USER_DEFINED, BYTE):
            continue
        halves = ((piece.piece[:i], piece.piece[i:]) for i in range(1, len(piece.piece)))
        merges += [(left, right) for left, right in halves if left in ids and right in ids]
    fallback = model.trainer_spec.byte_fallback
    return models.BPE(dict(ids), merges, unk_token=unknown, fuse_unk=True, byte_fallback=fallback)
