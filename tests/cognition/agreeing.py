"""Generations written by hand, and an embedder whose vectors stand in the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sicog_mcore.cognition.codec import render
from sicog_mcore.cognition.records import Candidate, Generation, PromptUse, Task
from sicog_mcore.rollout.requests import Finish, Sampling
from tests.checkpoint.foreign import write_decoder

PLAIN = {"caption": "caption", "answer": "direct"}
STEPS = {"caption": "cod", "answer": "cot"}


class Written:
    """The text "3,4" has the vector (0.6, 0.8); remembers what it was asked."""

    name = "written"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        self.asked += texts
        vectors = np.array([[float(value) for value in text.split(",")] for text in texts])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def in_steps(text: str, task: Task = "caption") -> str:
    """An answer in steps whose last one is the text."""
    count, kind = (5, "cod") if task == "caption" else (4, "cot")
    return render([f"Fact {i}." for i in range(count - 1)] + [text], kind)


def generation(
    name: str, plain: Sequence[str] = (), steps: Sequence[str] = (), task: Task = "caption", cut: Sequence[int] = ()
) -> Generation:
    """One item: its answers in steps first, then the plain ones.

    Args:
        steps: whole texts, with their steps.
        cut: which of all candidates ended for want of room.
    """
    asked = [(STEPS[task], i, text) for i, text in enumerate(steps)]
    asked += [(PLAIN[task], i, text) for i, text in enumerate(plain)]
    candidates = []
    for place, (prompt, index, text) in enumerate(asked):
        finish: Finish = "length" if place in cut else "stop"
        candidates.append(Candidate(prompt, index, place, text, len(text), -1.0, finish))
    uses = [(STEPS[task], len(steps)), (PLAIN[task], len(plain))]
    prompts = tuple(PromptUse(prompt, 1, count) for prompt, count in uses if count)
    base = Generation(name, task, "a.png", "00", "What?", prompts, "native-1", "c0ffee", Sampling(), 7)
    return replace(base, prompt_tokens=(9,) * len(prompts), candidates=tuple(candidates))


def failed(item: Generation, reason: str = "decode_error") -> Generation:
    """The same item without candidates."""
    return replace(item, candidates=(), prompt_tokens=(), failure=reason)


def write_word_decoder(folder: Path) -> Path:
    """A random Qwen2 on disk whose token of "w5" is 7; 1 is its end."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    write_decoder(folder, "qwen2")
    words = {word: i for i, word in enumerate(["?", "<end>", *(f"w{i}" for i in range(50))])}
    tokenizer = Tokenizer(models.WordLevel(words, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder
