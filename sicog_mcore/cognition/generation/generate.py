"""Candidates for every item: asks the engine, commits each record as it is done, and puts them in order at the end.

In: GenerationOptions   Out: ``generations.jsonl`` in the order of the items   Next: agreement.py
Items are dealt out to the copies of the model; each writes a part of its own (record_parts.py). The bytes of the result
depend on the inputs alone: not on ranks, batches, or how often the run was killed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sicog_mcore.build import Build
from sicog_mcore.cognition.generation.items import GenerationItem, read_items
from sicog_mcore.cognition.generation.options import GenerationOptions
from sicog_mcore.cognition.generation.progress import GenerationProgress
from sicog_mcore.cognition.generation.record_parts import PartWriter, merge_parts, open_parts
from sicog_mcore.cognition.item_keys import KeyTally
from sicog_mcore.cognition.prompts import Prompt, ask
from sicog_mcore.cognition.records import Candidate, Generation, PromptUse
from sicog_mcore.data.encode import Encoder
from sicog_mcore.data.sample import Turn
from sicog_mcore.data.tokenizer import find_tokenizer_file
from sicog_mcore.errors import DataError, SampleError
from sicog_mcore.files import append_lines, hash_file
from sicog_mcore.model.vlm import VisionLanguageModel
from sicog_mcore.parallel.topology import Topology
from sicog_mcore.rollout.engine import NATIVE, NativeEngine
from sicog_mcore.rollout.load import Checkpoint, joined, load_model, read_checkpoint
from sicog_mcore.rollout.parity import PROBE, check_parity
from sicog_mcore.rollout.requests import Answer, Counters, Engine, Request, Result, Sampling
from sicog_mcore.rollout.sampling import candidate_seed
from sicog_mcore.rollout.vllm_engine import VllmEngine, vllm_name
from sicog_mcore.train.console import duration_text

RECORDS = "generations.jsonl"
DECODER = "decoder"  # exported for vLLM
USAGE = "usage.jsonl"  # one line per finished process group: what it cost
MEASURED_ITEMS = 200  # items that the estimate of a dry run looks at
LOG_PROB_DIGITS = 2


@dataclass(frozen=True)
class RecordFacts:
    """What every record of a run has in common."""

    prompts: tuple[tuple[Prompt, int], ...]
    sampling: Sampling
    seed: int
    engine: str
    checkpoint: str

    def request(self, item: GenerationItem) -> Request:
        """What the engine is asked about an item.

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
        return Generation(
            id=item.id,
            task=self.prompts[0][0].task,
            image=item.image,
            image_hash=_image_hash(item),
            question=item.question,
            prompts=tuple(PromptUse(prompt.id, prompt.version, count) for prompt, count in self.prompts),
            engine=self.engine,
            checkpoint=self.checkpoint,
            sampling=self.sampling,
            seed=self.seed,
            prompt_tokens=result.prompt_tokens,
            candidates=tuple(
                self._candidate(item, prompt, index, answer)
                for (prompt, _), answers in zip(self.prompts, result.answers, strict=True)
                for index, answer in enumerate(answers)
            )
            if not result.failure
            else (),
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


def run(options: GenerationOptions, world_size: int = 1, rank: int = 0, init_method: str = "") -> Path:
    """Generates, or goes on where a run before was stopped; returns the file of records.

    Args:
        world_size, rank: of this process.
        init_method: how the ranks find each other; empty under torchrun and in a single process.

    Raises:
        SicogError: anything wrong with options, checkpoint or rows, or records that depend on other inputs.
    """
    options.check()
    checkpoint = read_checkpoint(options.checkpoint, options.tensor, options.precision, options.tokenizer)
    task = RecordFacts(options.uses, options.sampling, options.seed, engine_name(options), checkpoint.fingerprint)
    told: list[str] = []  # by the rank that reads the rows
    items, done = _prepare(options, checkpoint, task, told) if rank == 0 else ([], frozenset())
    failures: Counter[str] = Counter()
    with joined(checkpoint, world_size, init_method, rank, str(options.out)) as (build, topology):
        items, done = topology.broadcast_object((items, done))  # type: ignore[misc]  # as they were sent
        pending = [item for item in items if item.id not in done]
        own = pending[topology.data_rank :: topology.data_size]
        progress = GenerationProgress(
            topology.is_main, len(own), topology.data_size, topology.world_size, options.price_per_gpu_hour
        )
        try:
            progress.notice(f"{len(items):,} items, {len(items) - len(pending):,} of them done before")
            for line in told:
                progress.notice(line)
            if pending:
                _generate(options, task, own, build, topology, progress)
            topology.gather_objects(None)  # every record is on disk
            if topology.is_main:
                merge_parts(options.out, [item.id for item in items], options.out / RECORDS, failures)
            progress.finish([f"records    {options.out / RECORDS}"])
        finally:
            progress.close()
    if rank == 0:
        _require_answers(failures, options.out / RECORDS)
    return options.out / RECORDS


def _require_answers(failures: Counter[str], records: Path) -> None:
    """Raises DataError if no item of the file was answered; such records are of no use to any step behind this one."""
    if not failures[""]:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in failures.most_common() if reason) or "no rows"
        fix = "their `detail` says why; correct the rows or their images, and choose another --out"
        raise DataError(f"{records}: 0 of {failures.total():,} items were answered ({reasons}); {fix}")


def engine_name(options: GenerationOptions) -> str:
    """Name and version of the engine, known before it is built.

    Raises:
        ConfigError: it is not installed.
    """
    return vllm_name() if options.engine == "vllm" else NATIVE


def _prepare(
    options: GenerationOptions, checkpoint: Checkpoint, task: RecordFacts, told: list[str]
) -> tuple[list[GenerationItem], frozenset[str]]:
    """What one rank finds out for all: the items, and which of them are done. Lines for the user are added to ``told``."""
    tally = KeyTally()
    items = read_items(options.rows, options.images, options.limit, tally)
    told += [*tally.lines(), *_refusals(task, items)]
    return items, open_parts(options.out, make_header(options, checkpoint, task))


def _refusals(task: RecordFacts, items: Sequence[GenerationItem]) -> Iterator[str]:
    """One line for every reason why rows cannot be asked about, with the first of them."""
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for item in items:
        try:
            task.request(item)
        except SampleError as error:
            counts[error.reason] += 1
            first.setdefault(error.reason, f"{item.origin}: {error.detail}")
    for reason, count in counts.most_common():
        yield f"refused    {count:,} of {len(items):,} items: {reason}, first {first[reason]:.400}"


def make_header(options: GenerationOptions, checkpoint: Checkpoint, task: RecordFacts) -> Mapping[str, Any]:
    """Everything that the bytes of a record depend on; the checkpoint's hash covers sizes, template and system prompt."""
    tokenizer = find_tokenizer_file(checkpoint.experiment.data.tokenizer)
    assert tokenizer is not None, "read_checkpoint looked for it"
    return {
        "engine": task.engine,
        "checkpoint": task.checkpoint,
        "precision": checkpoint.experiment.train.precision,
        "tokenizer": hash_file(tokenizer),
        "prompts": [f"{prompt.id} version {prompt.version}: {count}" for prompt, count in task.prompts],
        "sampling": asdict(task.sampling),
        "seed": task.seed,
        "rows": [hash_file(path) for path in options.rows],
    }


def _generate(
    options: GenerationOptions,
    task: RecordFacts,
    own: Sequence[GenerationItem],
    build: Build,
    topology: Topology,
    progress: GenerationProgress,
) -> None:
    """Does this copy's items, and says what it took."""
    model = load_model(build, topology, progress.notice)
    encoder = Encoder(build.experiment.model, build.experiment.data)
    engine = _build_engine(options, model, encoder, topology)
    requests, refused = _requests(task, own)
    parity = check_parity(engine, model, encoder, requests)
    progress.notice(
        f"parity     {parity.items} items: patches and tokens equal; {parity.tokens} log-probabilities differ by at most"
        f" {parity.difference:.2g}"
    )
    engine.counters = Counters()
    progress.restart()
    failures: Counter[str] = Counter()
    with PartWriter(options.out, f"{topology.data_rank:05d}") as writer:
        for done, (item, result) in enumerate(_results(task, own, requests, refused, engine), 1):
            if topology.loads_data:
                writer.commit(task.record(item, result))
                failures[result.failure] += 1
            progress.update(done, engine.counters)
    progress.close()
    _report(options.out, topology, progress, engine.counters, failures)


def _build_engine(
    options: GenerationOptions, model: VisionLanguageModel, encoder: Encoder, topology: Topology
) -> Engine:
    if options.engine == "native":
        return NativeEngine(model, encoder, topology, options.batch)
    answers = sum(count for _, count in options.prompts)
    longest = max(options.sampling.max_new_tokens, PROBE.max_new_tokens)
    return VllmEngine(model, encoder, topology, options.out / DECODER, options.batch, answers, longest)


def _requests(task: RecordFacts, items: Sequence[GenerationItem]) -> tuple[list[Request], list[Result]]:
    """What can be asked, and the results of what cannot."""
    requests, refused = [], []
    for item in items:
        try:
            requests.append(task.request(item))
        except SampleError as error:
            refused.append(Result(item.id, failure=error.reason, detail=error.detail))
    return requests, refused


def _results(
    task: RecordFacts,
    items: Sequence[GenerationItem],
    requests: Sequence[Request],
    refused: Sequence[Result],
    engine: Engine,
) -> Iterator[tuple[GenerationItem, Result]]:
    by_id = {item.id: item for item in items}
    for result in refused:
        yield by_id[result.id], result
    for result in engine.generate(requests, task.sampling):
        yield by_id[result.id], result


def _report(
    out: Path, topology: Topology, progress: GenerationProgress, counters: Counters, failures: Counter[str]
) -> None:
    """Sums over the copies; the main rank says them and notes what this run cost."""
    seconds = progress.seconds
    gathered = topology.gather_objects((counters, failures) if topology.loads_data else None)
    if not topology.is_main:
        return
    told = [entry for entry in gathered if entry is not None]
    total = Counters(*(sum(column) for column in zip(*(asdict(c).values() for c, _ in told), strict=True)))
    reasons: Counter[str] = sum((found for _, found in told), Counter())
    answered = reasons.pop("", 0)
    failed = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items())) or "none"
    price = f", cost {progress.cost(seconds):.2f}" if progress.cost(1.0) else ""
    usage = asdict(total) | {
        "items": answered,
        "failed": dict(sorted(reasons.items())),
        "seconds": round(seconds, 3),
        "ranks": topology.world_size,
        "device_seconds": round(seconds * topology.world_size, 3),
    }
    append_lines(out / USAGE, [json.dumps(usage)])
    progress.finish(
        [
            f"items      {answered:,} answered; failed: {failed}",
            f"tokens     {total.prefill_tokens:,} read, {total.decode_tokens:,} drawn; {total.slices:,} slices encoded",
            f"speed      {total.decode_tokens / max(seconds, 1e-9):,.0f} drawn tokens/s in {duration_text(seconds)}{price}",
        ]
    )


def _image_hash(item: GenerationItem) -> str:
    try:
        return hash_file(Path(item.refs[0].path)) if item.refs else ""
    except OSError:
        return ""


def estimate(options: GenerationOptions, world_size: int) -> list[str]:
    """What a run would take, as lines for the user; no weight is read and nothing is written."""
    options.check()
    checkpoint = read_checkpoint(options.checkpoint, options.tensor, options.precision, options.tokenizer)
    task = RecordFacts(options.uses, options.sampling, options.seed, engine_name(options), checkpoint.fingerprint)
    tally = KeyTally()
    items = read_items(options.rows, options.images, options.limit, tally)
    requests, refused = _requests(task, items)
    encoder = Encoder(checkpoint.experiment.model, checkpoint.experiment.data)
    sizes, failures = [], Counter(result.failure for result in refused)
    for request in requests[:: max(1, len(requests) // MEASURED_ITEMS)]:
        try:
            sizes.append(encoder.measure_prompts(request.images, [(Turn("user", t),) for t in request.prompts]))
        except SampleError as error:
            failures[error.reason] += 1
    candidates = sum(count for _, count in task.prompts) * len(requests)
    tokens, slices = (
        round(sum(column) / max(1, len(sizes)) * len(requests)) for column in zip(*(sizes or [(0, 0)]), strict=True)
    )
    most = candidates * options.sampling.max_new_tokens
    asked = ", ".join(f"{prompt.id} v{prompt.version} x {count}" for prompt, count in task.prompts)
    lines = [
        f"items      {len(items):,}, {len(requests):,} of them usable rows",
        *tally.lines(),
        *_refusals(task, items),
        f"prompts    {asked}",
        f"candidates {candidates:,}",
        f"tokens     about {tokens:,} to read, {slices:,} slices to encode; at most {most:,} to draw",
        *([f"problems   {dict(sorted(failures.items()))} among {len(sizes)} measured items"] if failures else []),
    ]
    if not options.tokens_per_s:
        return [*lines, "time       unknown; give --tokens-per-s, which a run prints, e.g. of a first one with --limit"]
    seconds = most / options.tokens_per_s / max(1, world_size // options.tensor)
    cost = (
        f", cost {seconds / 3600 * world_size * options.price_per_gpu_hour:.2f}" if options.price_per_gpu_hour else ""
    )
    return [*lines, f"time       at most {duration_text(seconds)} on {world_size} ranks{cost}"]
