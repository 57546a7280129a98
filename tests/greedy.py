"""Greedy decoding with our model, without a cache: the whole prefix again for every token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sicog_mcore.config import Experiment
from sicog_mcore.data.batch import EncodedSample
from sicog_mcore.data.chat import Chat
from sicog_mcore.data.collate import collate


@torch.no_grad()
def greedy(
    model: Any, experiment: Experiment, chat: Chat, prompt: EncodedSample, most: int
) -> tuple[np.ndarray, list[int]]:
    """Logits of all positions of the prompt [s, v], and up to ``most`` tokens that follow it, the end included.

    Args:
        model: the only chunk of a model on one rank.
        experiment: that the model was built from.
        chat: knows the tokens that end an answer.
        prompt: from ``Encoder.encode_prompt``.
        most: longest answer.
    """
    logits, answer = torch.empty(0), []
    ends = {chat.end_id, chat.pad_id}
    while len(answer) < most and not ends & set(answer):
        tokens = torch.cat([prompt.tokens, torch.tensor(answer, dtype=torch.int64)])
        batch = collate(
            [replace(prompt, tokens=tokens, labels=torch.full_like(tokens, -100), segments=())],
            token_budget=len(tokens),
            pad_id=chat.pad_id,
            queries=experiment.model.resampler.queries,
            patch_dim=experiment.model.tower.patch_dim,
        )
        first_row = 0 if not answer else len(tokens) - 1
        found = model.language_model.project(model.hidden_states(batch), torch.arange(first_row, len(tokens)))
        found = found[:, 0, : experiment.model.decoder.vocab_size]
        logits = found if not answer else logits
        answer.append(int(found[-1].argmax()))
    return logits.numpy(), answer
