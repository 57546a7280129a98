"""Measures how alike two clauses are, on one scale from 0 to 1: by vectors, by votes, by the attributes they name.

In: distinct clauses   Out: [n, n] similarities   Next: agreement.py
A clause that is not like itself (0 on the diagonal) has nothing that could be compared, and wins nothing. None of these
knows what is true: answers that share a mistake agree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash

from sicog_mcore.cognition.answer_grammar import read_text
from sicog_mcore.cognition.answers import attribute_f1, attributes, normalise, same_number
from sicog_mcore.cognition.scoring.embed import Embedder
from sicog_mcore.errors import ConfigError, ConfigProblem


class Similarity(Protocol):
    """Compares texts with each other."""

    @property
    def name(self) -> str:
        """Kind and settings, as records name it."""
        ...

    def matrix(self, texts: Sequence[str]) -> np.ndarray:
        """Similarities as float64 [n, n], symmetric."""
        ...


class Cosine:
    """Cosine of vectors, in fp64 throughout; may be below 0."""

    def __init__(self, embedder: Embedder):
        self._embedder = embedder

    @property
    def name(self) -> str:
        """Name of the embedder."""
        return self._embedder.name

    def matrix(self, texts: Sequence[str]) -> np.ndarray:
        """Cosines; normalised again, so that fp32 norms do not show."""
        # In fp64, so that equal texts come to 1 within a millionth, which is the unit of scores.
        vectors = self._embedder.embed(texts).astype(np.float64)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors /= np.where(norms > 0, norms, 1)
        return vectors @ vectors.T


class Vote:
    """1 for the same answer: equal in plain form, or the same number if one of them is nothing but a number.

    "3 apples" and "three" are one vote, "3 apples" and "3 pears" two. What an answer states counts, not how: "The answer is
    B." and a boxed B are one vote. One that states several things is equal to nothing. The score is then the share of votes.
    """

    name = "vote"

    def matrix(self, texts: Sequence[str]) -> np.ndarray:
        """Zeros and ones."""
        stated = [read_text(text).value or "" for text in texts]
        plain = [normalise(text) for text in stated]
        same = [[self._same(a, b, plain[i], plain[j]) for j, b in enumerate(stated)] for i, a in enumerate(stated)]
        return np.array(same, np.float64)

    @staticmethod
    def _same(a: str, b: str, plain_a: str, plain_b: str) -> bool:
        if plain_a == plain_b:
            return plain_a != ""
        # Two answers with words are compared by these alone: "3 apples" and "3 pears" share a number, and nothing else.
        bare = not (any(map(str.isalpha, plain_a)) and any(map(str.isalpha, plain_b)))
        return bare and (same_number(a, b) or same_number(b, a))


class AttributeF1:
    """F1 of the sets of attributes that two clauses name; all else that they say is not looked at."""

    def __init__(self, vocabulary: Mapping[str, Sequence[str]]):
        self._vocabulary = vocabulary
        content = xxhash.xxh3_64_hexdigest(json.dumps(vocabulary, sort_keys=True).encode())
        self.name = f"attributes-{content[:8]}"

    def matrix(self, texts: Sequence[str]) -> np.ndarray:
        """F1 of every pair; 0 where one of them names no attribute."""
        found = [attributes(text, self._vocabulary) for text in texts]
        return np.array([[attribute_f1(a, b) if a and b else 0.0 for b in found] for a in found], np.float64)


def read_vocabulary(path: Path) -> dict[str, list[str]]:
    """Values of each kind of attribute, from JSON such as {"colour": ["red", "light blue"]}.

    Raises:
        ConfigError: no such file, or another form.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError([ConfigProblem("scorer", str(path), str(error), "give a JSON file")]) from error
    fits = isinstance(found, dict) and all(
        isinstance(values, list) and values and all(isinstance(value, str) and value.strip() for value in values)
        for values in found.values()
    )
    if not found or not fits:
        expected = 'expected lists of words by kind, such as {"colour": ["red"]}'
        raise ConfigError([ConfigProblem("scorer", str(path), expected, "correct the file")])
    return found
