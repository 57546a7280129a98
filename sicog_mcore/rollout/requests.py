"""Requests and results: the questions to a model and its answers, whatever the engine behind it.

In: prompts, images, seeds, Sampling   Out: Result per Request   Next: engine.py, vllm_engine.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from sicog_mcore.data.sample import IMAGE_PLACEHOLDER, ImageRef

HARMLESS_PLACEHOLDER = "<image >"

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """The settings of drawing tokens; nothing else takes part, least of all a checkpoint's generation_config.

    Attributes:
        temperature: 0 takes the most probable token.
        top_p: share of the probability that may be drawn from; 1 for all.
        top_k: number of tokens that may be drawn from; 0 for all.
        max_new_tokens: after so many tokens the answer is cut and its finish is "length".
    """

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    max_new_tokens: int = 1200


@dataclass(frozen=True)
class Request:
    """One item with its prompts, and a seed for each answer.

    Attributes:
        images: in the order of the placeholders that every prompt begins with.
        prompts: user turns, see prompts.ask.
        seeds: for each prompt those of its answers, at least one in all.
    """

    id: str
    images: tuple[ImageRef, ...]
    prompts: tuple[str, ...]
    seeds: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Answer:
    """One answer as it was drawn.

    Attributes:
        tokens: the one that ended the answer counted.
        text: without control tokens, and without a placeholder of images.
        log_probs: of each token under the unmodified model.
    """

    tokens: tuple[int, ...]
    text: str
    log_probs: tuple[float, ...]
    finish: Finish


@dataclass(frozen=True)
class Result:
    """All answers of one item, or why there are none.

    Attributes:
        prompt_tokens: length of each prompt, visual tokens counted.
        answers: for each prompt, in the order of its seeds.
        failure: reason code; empty if there are answers.
        detail: of the failure, for people.
    """

    id: str
    prompt_tokens: tuple[int, ...] = ()
    answers: tuple[tuple[Answer, ...], ...] = ()
    failure: str = ""
    detail: str = ""


@dataclass
class Counters:
    """Work done so far by one replica of the model.

    Attributes:
        prefill_tokens: of prompts; a beginning that the prompts of an item share counts once.
        decode_tokens: drawn.
        slices: that went through the tower.
    """

    items: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    slices: int = 0


class Engine(Protocol):
    """Answers requests; the same request with the same sampling gets the same answers, whatever it is asked with."""

    counters: Counters

    @property
    def name(self) -> str:
        """Name and version, as records have it."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Result]:
        """One result per request, in any order. All ranks of a replica must ask the same."""


def harmless(text: str) -> str:
    """Rewrites placeholders, so that the text stands for no image; control tokens in it are text anyway, see chat.py."""
    return text.replace(IMAGE_PLACEHOLDER, HARMLESS_PLACEHOLDER)
