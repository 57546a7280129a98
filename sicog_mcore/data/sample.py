"""A sample is one row of a data set after its keys are understood, before anything is decoded.

In: a row of a source   Out: Sample   Next: slicing.py, chat.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Role = Literal["system", "user", "assistant"]
IMAGE_PLACEHOLDER = "<image>"


class Size(NamedTuple):
    """Height and width, always in this order. The unit (px or patches) is named by the field that holds it."""

    height: int
    width: int


@dataclass(frozen=True)
class ImageRef:
    """Where the bytes of an image are: a file, or a byte range of a tar shard.

    ``path`` is absolute and already proven to lie inside its source's image root.
    ``length`` is -1 for "the whole file".
    """

    path: str
    offset: int = 0
    length: int = -1


@dataclass(frozen=True)
class Turn:
    """One turn of the conversation; user text holds one ``<image>`` per image, in order."""

    role: Role
    text: str


@dataclass(frozen=True)
class Sample:
    """One training row.

    Attributes:
        id: unique in the run; the key of every record about this sample.
        origin: ``file:line`` (or ``shard.tar:member``) for error messages.
        answers: further answers to what the last turn answers: of a preference pair the rejected one, of candidates all but
            the first; nothing in most rows.
        weights: of the loss of each answer, the last turn's first; () where all are 1.
    """

    id: str
    origin: str
    turns: tuple[Turn, ...]
    images: tuple[ImageRef, ...] = ()
    answers: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
