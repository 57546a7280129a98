"""Draws tokens by inverse CDF, with random numbers that belong to the candidate and nobody else.

In: logits, the candidates' random numbers   Out: tokens, their log-probabilities   Next: engine.py
A candidate's numbers depend on its seed and the position of the token alone: not on the batch, the ranks, or a resume. The
tokens that remain after truncation are laid out by id, not by probability: two layouts whose sums differ in the last bit
then move a border by that bit, where a sorted row might swap two tokens.
"""

from __future__ import annotations

import json

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from sicog_mcore.rollout.requests import Sampling


def candidate_seed(run_seed: int, record_id: str, prompt_id: str, index: int) -> int:
    """Derives the candidate's own seed, of 63 bits."""
    # JSON keeps the four parts apart: joined by a sign, an id that holds the sign could name another candidate.
    named = json.dumps([run_seed, record_id, prompt_id, index])
    # One bit less, so that files with signed integers can hold it.
    return xxhash.xxh64_intdigest(named.encode()) >> 1


def random_numbers(seed: int, count: int) -> NDArray[np.float64]:
    """One number in [0, 1) for each token position: fp64 [count]; a longer row begins with the shorter one."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


def draw(logits: Tensor, numbers: Tensor, sampling: Sampling) -> Tensor:
    """The next token of each row.

    Args:
        logits: fp32 [r, v].
        numbers: fp64 [r] in [0, 1); unused at temperature 0.

    Returns:
        int64 [r]
    """
    if sampling.temperature == 0:
        ids = torch.arange(logits.shape[-1], device=logits.device)
        is_best = logits == logits.amax(-1, keepdim=True)
        return torch.where(is_best, ids, len(ids)).amin(-1)  # of equals the lowest id, which argmax does not promise
    probabilities = truncate((logits.double() / sampling.temperature).softmax(-1), sampling)
    borders = probabilities.cumsum(-1)  # [r, v]
    # Scaled by the last border and not by 1: what truncation left does not sum to 1.
    wanted = numbers[:, None] * borders[:, -1:]
    found = torch.searchsorted(borders, wanted, right=True)[:, 0]
    # Rounding may carry a number close to 1 up to the last border: the last token that is left is meant.
    last = torch.searchsorted(borders, borders[:, -1:].contiguous())[:, 0]
    return torch.minimum(found, last)


def truncate(probabilities: Tensor, sampling: Sampling) -> Tensor:
    """Leaves the most probable tokens: first ``top_k`` of them, of these the fewest that make up ``top_p``.

    Args:
        probabilities: fp64 [r, v]; of equal ones the lower id counts as more probable.

    Returns:
        fp64 [r, v], zero where a token is out, not summing to 1.
    """
    vocabulary = probabilities.shape[-1]
    kept = sampling.top_k if 0 < sampling.top_k < vocabulary else vocabulary
    if kept == vocabulary and sampling.top_p >= 1:
        return probabilities
    ranked, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    ranked, ids = ranked[:, :kept], ids[:, :kept]
    # [r, kept], the probability of all tokens ranked before. A token stays if that is short of top_p, so the one that
    # reaches top_p is the last to stay.
    before = ranked.cumsum(-1) - ranked
    is_left = before < sampling.top_p * ranked.sum(-1, keepdim=True)
    # One token stays even where top_p is 0.
    is_left[:, 0] = True
    return torch.zeros_like(probabilities).scatter(-1, ids, ranked * is_left)


def log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Gives log-probabilities of tokens under the unmodified model: fp64 [r] of logits [r, v] and tokens [r]."""
    return logits.double().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
