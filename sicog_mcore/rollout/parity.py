"""The parity check before a run: a few samples show whether the engine reads and answers as the trainer would.

In: an engine, requests   Out: Parity   Next: generate.py
The check compares patches and prompt tokens with those of a training sample, byte by byte, and the engine's
log-probabilities of its own answers with those of the trainer's forward pass over a packed batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from sicog_mcore.data.batch import IGNORED_LABEL, EncodedSample
from sicog_mcore.data.collate import collate
from sicog_mcore.data.encode import Encoder
from sicog_mcore.data.sample import Sample, Turn
from sicog_mcore.errors import EXIT_GIVE_UP, SampleError, SicogError
from sicog_mcore.model.vlm import VisionLanguageModel
from sicog_mcore.rollout.engine import encode_request
from sicog_mcore.rollout.requests import Answer, Engine, Request, Result, Sampling

SAMPLES = 3  # items that are asked
PROBE = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=16)
# Largest difference of one token's log-probability, by the precision of the model.
TOLERANCES: Mapping[torch.dtype, float] = {torch.float32: 1e-3, torch.bfloat16: 0.25}


class ParityError(SicogError):
    """The engine differs from the trainer; what it generates would come from another model than the one that was trained."""

    exit_code = EXIT_GIVE_UP
    same_on_all_ranks = False


@dataclass(frozen=True)
class Parity:
    """The result of a comparison. ``difference`` is the largest one of a token's log-probability."""

    items: int
    tokens: int
    difference: float


@dataclass(frozen=True)
class _Case:
    """A prompt, what the engine answered, and both as a training sample whose labels are that answer."""

    prompt: EncodedSample
    answer: Answer
    sample: EncodedSample


def check_parity(engine: Engine, model: VisionLanguageModel, encoder: Encoder, requests: Sequence[Request]) -> Parity:
    """Compares engine and trainer on the first items that can be read. All ranks of a replica must call it.

    Args:
        model: as the trainer has it.
        encoder: as the trainer has it.
        requests: of the run; one answer per prompt is probed.

    Raises:
        ParityError: they differ.
    """
    for start in range(0, len(requests), SAMPLES):
        probes = [_probe(request) for request in requests[start : start + SAMPLES]]
        asked = {request.id: request for request in probes}
        results = [result for result in engine.generate(probes, PROBE) if not result.failure]
        if results:
            # The order in which they were done may differ between runs; the comparison must not.
            results.sort(key=lambda result: list(asked).index(result.id))
            cases = [case for result in results for case in _cases(encoder, asked[result.id], result)]
            return Parity(len(results), sum(len(case.answer.tokens) for case in cases), _compare(model, encoder, cases))
    return Parity(0, 0, 0.0)


def _probe(request: Request) -> Request:
    return replace(request, seeds=tuple(seeds[:1] for seeds in request.seeds))


def _cases(encoder: Encoder, request: Request, result: Result) -> list[_Case]:
    prompts = encode_request(encoder, request)
    cases = []
    for prompt, text, answers in zip(prompts, request.prompts, result.answers, strict=True):
        for answer in answers:
            _require_same_input(encoder, request, text, prompt, answer)
            cases.append(_Case(prompt, answer, _as_training(prompt, answer)))
    for length, prompt in zip(result.prompt_tokens, prompts, strict=True):
        if length != len(prompt.tokens):
            raise ParityError(f"{request.id}: the engine read {length} tokens, the trainer {len(prompt.tokens)}")
    return cases


def _require_same_input(encoder: Encoder, request: Request, text: str, prompt: EncodedSample, answer: Answer) -> None:
    turns = (Turn("user", text), Turn("assistant", answer.text))
    try:
        trained = encoder.encode(Sample(request.id, "parity", turns, request.images))
    except SampleError as error:
        if error.reason == "too_long":  # too long to be trained on with its answer; nothing to compare with
            return
        raise
    length = len(prompt.tokens)
    same: Mapping[str, bool] = {
        "patches": torch.equal(prompt.patches, trained.patches) and torch.equal(prompt.grids, trained.grids),
        "tokens": torch.equal(prompt.tokens, trained.tokens[:length]),
        "places of visual tokens": torch.equal(prompt.image_slots, trained.image_slots)
        and torch.equal(prompt.visual_rows, trained.visual_rows),
    }
    different = [name for name, is_same in same.items() if not is_same]
    if different:
        raise ParityError(f"{request.id}: {', '.join(different)} of the prompt are not those of training")


def _as_training(prompt: EncodedSample, answer: Answer) -> EncodedSample:
    drawn = torch.tensor(answer.tokens, dtype=torch.int64)
    tokens = torch.cat([prompt.tokens, drawn])
    labels = torch.full_like(tokens, IGNORED_LABEL)
    # Labels are shifted: the prompt's last position predicts the first drawn token, and the last drawn token predicts
    # nothing.
    labels[len(prompt.tokens) - 1 : -1] = drawn
    return replace(prompt, tokens=tokens, labels=labels, segments=())


@torch.no_grad()
def _compare(model: VisionLanguageModel, encoder: Encoder, cases: Sequence[_Case]) -> float:
    batch = collate(
        [case.sample for case in cases],
        token_budget=sum(len(case.sample.tokens) for case in cases),
        pad_id=encoder.chat.pad_id,
        queries=model.model_config.resampler.queries,
        patch_dim=model.model_config.tower.patch_dim,
    )
    parameter = next(model.parameters())
    # The trainer's forward pass gives -log p of every position with a label, in the order of the cases; the engine's
    # values are chained in that order too.
    expected = -model(batch.to(parameter.device)).double().cpu()  # [tokens of all answers]
    found = torch.tensor([value for case in cases for value in case.answer.log_probs], dtype=torch.float64)
    difference, limit = float((found - expected).abs().max()), TOLERANCES[parameter.dtype]
    # Not ``>``: a difference that is NaN must fail as well.
    if not difference <= limit:
        raise ParityError(
            f"log-probabilities of the engine and of the trainer differ by up to {difference:.3g}, at most {limit:g} is "
            "expected; generate with another engine, and report this"
        )
    return difference
