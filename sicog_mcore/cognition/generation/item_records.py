"""Requests and records of items are made here, the one place that knows which inputs the bytes of a record depend on.

In: GenerationOptions, Checkpoint, GenerationItem, Result   Out: Request, Generation, the header of the records
Next: generate.py (asks and commits), cost_estimate.py (only counts)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sicog_mcore.cognition.generation.items import GenerationItem
from sicog_mcore.cognition.generation.options import GenerationOptions
from sicog_mcore.cognition.prompts import Prompt, ask
from sicog_mcore.cognition.records import Candidate, Generation, PromptUse
from sicog_mcore.errors import SampleError
from sicog_mcore.files import hash_file
from sicog_mcore.rollout.engine import NATIVE
from sicog_mcore.rollout.load import Checkpoint
from sicog_mcore.rollout.requests import Answer, Request, Result, Sampling
from sicog_mcore.rollout.sampling import candidate_seed
from sicog_mcore.rollout.vllm_engine import vllm_name

LOG_PROB_DIGITS = 2


@dataclass(frozen=True)
class RecordFacts:
    """Facts that all records of a run have in common."""

    prompts: tuple[tuple[Prompt, int], ...]
    sampling: Sampling
    seed: int
    engine: str
    checkpoint: str

    def request(self, item: GenerationItem) -> Request:
        """Builds the request that asks the engine about an item.

        Raises:
            SampleError: the row cannot be used, a prompt needs a question that it has not, or asks for a description of
                a picture that it has not.
        """
        if item.failure:
            raise SampleError(item.failure, item.detail)
        if not item.refs and any(prompt.task == "caption" for prompt, _ in self.prompts):
            raise SampleError("no_image", "a description is asked for, and the row has no picture under 'image'")
        if item.unasked and any(prompt.with_question for prompt, _ in self.prompts):
            keys = ", ".join(map(repr, item.unasked))
            fix = "write the whole question into the first turn of 'conversations', and leave these keys out"
            raise SampleError("question_incomplete", f"{keys:.200} would not be asked; {fix}")
        return Request(
            id=item.id,
            images=item.refs,
            prompts=tuple(ask(prompt, item.question, len(item.refs)) for prompt, _ in self.prompts),
            seeds=tuple(
                tuple(candidate_seed(self.seed, item.id, prompt.id, index) for index in range(count))
                for prompt, count in self.prompts
            ),
        )

    def record(self, item: GenerationItem, result: Result) -> Generation:
        """The row of an item."""
        candidates: tuple[Candidate, ...] = ()
        if not result.failure:
            candidates = tuple(
                self._candidate(item, prompt, index, answer)
                for (prompt, _), answers in zip(self.prompts, result.answers, strict=True)
                for index, answer in enumerate(answers)
            )
        return Generation(
            id=item.id,
            task=self.prompts[0][0].task,
            image=item.image,
            image_hash=item.image_hash(),
            question=item.question,
            prompts=tuple(PromptUse(prompt.id, prompt.version, count) for prompt, count in self.prompts),
            engine=self.engine,
            checkpoint=self.checkpoint,
            sampling=self.sampling,
            seed=self.seed,
            prompt_tokens=result.prompt_tokens,
            candidates=candidates,
            failure=result.failure,
            detail=result.detail,
        )

    def _candidate(self, item: GenerationItem, prompt: Prompt, index: int, answer: Answer) -> Candidate:
        return Candidate(
            prompt=prompt.id,
            index=index,
            seed=candidate_seed(self.seed, item.id, prompt.id, index),
            text=answer.text,
            tokens=len(answer.tokens),
            log_prob=round(sum(answer.log_probs), LOG_PROB_DIGITS) + 0.0,  # never -0.0
            finish=answer.finish,
        )


def record_facts(options: GenerationOptions, checkpoint: Checkpoint) -> RecordFacts:
    """The facts of a run, known before its engine is built.

    Raises:
        ConfigError: the engine is not installed.
    """
    engine = vllm_name() if options.engine == "vllm" else NATIVE
    return RecordFacts(options.uses, options.sampling, options.seed, engine, checkpoint.fingerprint)


def split_items(facts: RecordFacts, items: Sequence[GenerationItem]) -> tuple[list[Request], list[Result]]:
    """Splits items into requests that can be asked, and results of those that cannot."""
    requests, refused = [], []
    for item in items:
        try:
            requests.append(facts.request(item))
        except SampleError as error:
            refused.append(Result(item.id, failure=error.reason, detail=error.detail))
    return requests, refused


def refusal_lines(items: Sequence[GenerationItem], refused: Sequence[Result]) -> Iterator[str]:
    """One line for every reason why rows cannot be asked about, with the first of them."""
    origins = {item.id: item.origin for item in items}
    counts = Counter(result.failure for result in refused)
    first = {result.failure: f"{origins[result.id]}: {result.detail}" for result in reversed(refused)}
    for reason, count in counts.most_common():
        yield f"refused    {count:,} of {len(items):,} items: {reason}, first {first[reason]:.400}"


def make_header(facts: RecordFacts, checkpoint: Checkpoint, rows: Sequence[Path]) -> Mapping[str, Any]:
    """Everything that the bytes of a record depend on; the checkpoint's hash covers sizes, template and system prompt."""
    return {
        "engine": facts.engine,
        "checkpoint": facts.checkpoint,
        "precision": checkpoint.experiment.train.precision,
        "tokenizer": hash_file(checkpoint.tokenizer),
        "prompts": [f"{prompt.id} version {prompt.version}: {count}" for prompt, count in facts.prompts],
        "sampling": asdict(facts.sampling),
        "seed": facts.seed,
        "rows": [hash_file(path) for path in rows],
    }
