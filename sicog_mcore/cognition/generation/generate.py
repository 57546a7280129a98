"""Candidates for every item: asks the engine, commits each record as it is done, and puts them in order at the end.

In: GenerationOptions   Out: ``generations.jsonl`` in the order of the items   Next: item_records.py, agreement.py
Items are dealt out to the replicas of the model; each writes a part of its own (record_parts.py). The bytes of the result
depend on the inputs alone: not on ranks, batches, or how often the run was killed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from sicog_mcore.build import Build
from sicog_mcore.cognition.generation.item_records import (
    RecordFacts,
    make_header,
    record_facts,
    refusal_lines,
    split_items,
)
from sicog_mcore.cognition.generation.items import GenerationItem, read_items
from sicog_mcore.cognition.generation.options import GenerationOptions
from sicog_mcore.cognition.generation.progress import GenerationProgress
from sicog_mcore.cognition.generation.record_parts import PartWriter, merge_parts, open_parts
from sicog_mcore.cognition.item_keys import KeyCounter
from sicog_mcore.data.encode import Encoder
from sicog_mcore.errors import DataError
from sicog_mcore.files import append_lines
from sicog_mcore.parallel.topology import Topology
from sicog_mcore.rollout.engine import NativeEngine
from sicog_mcore.rollout.load import joined, load_model, read_checkpoint
from sicog_mcore.rollout.parity import PROBE, check_parity
from sicog_mcore.rollout.requests import Counters, Engine, Request, Result
from sicog_mcore.rollout.vllm_engine import VllmEngine
from sicog_mcore.train.console import duration_text

RECORDS = "generations.jsonl"
DECODER = "decoder"  # exported for vLLM
USAGE = "usage.jsonl"  # one line per finished process group: what it cost


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
    facts = record_facts(options, checkpoint)
    items: list[GenerationItem] = []
    done: frozenset[str] = frozenset()
    told: list[str] = []
    if rank == 0:  # reads the rows for all
        counter = KeyCounter()
        items = read_items(options.rows, options.images, options.limit, counter)
        told = [*counter.lines(), *refusal_lines(items, split_items(facts, items)[1])]
        done = open_parts(options.out, make_header(facts, checkpoint, options.rows))
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
                requests, refused = split_items(facts, own)
                engine = _open_engine(options, requests, build, topology, progress)
                results = chain(refused, engine.generate(requests, facts.sampling))
                reasons = _commit(results, engine.counters, facts, own, options.out, topology, progress)
                _report(options.out, topology, progress, engine.counters, reasons)
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


def _open_engine(
    options: GenerationOptions,
    requests: Sequence[Request],
    build: Build,
    topology: Topology,
    progress: GenerationProgress,
) -> Engine:
    """The engine with the checkpoint's weights, once its answers to some of the requests are those of the trainer.

    Raises:
        ParityError: they are not.
    """
    model = load_model(build, topology, progress.notice)
    encoder = Encoder(build.experiment.model, build.experiment.data)
    engine: Engine
    if options.engine == "native":
        engine = NativeEngine(model, encoder, topology, options.batch)
    else:
        answers = sum(count for _, count in options.prompts)
        longest = max(options.sampling.max_new_tokens, PROBE.max_new_tokens)
        engine = VllmEngine(model, encoder, topology, options.out / DECODER, options.batch, answers, longest)
    parity = check_parity(engine, model, encoder, requests)
    progress.notice(
        f"parity     {parity.items} items: patches and tokens equal; {parity.tokens} log-probabilities differ by at most"
        f" {parity.difference:.2g}"
    )
    engine.counters = Counters()
    return engine


def _commit(
    results: Iterable[Result],
    counters: Counters,
    facts: RecordFacts,
    items: Sequence[GenerationItem],
    out: Path,
    topology: Topology,
    progress: GenerationProgress,
) -> Counter[str]:
    """Brings the record of every result to the disk before it asks for the next one; counts the records by failure."""
    by_id = {item.id: item for item in items}
    failures: Counter[str] = Counter()
    progress.restart()
    with PartWriter(out, f"{topology.data_rank:05d}") as writer:
        for done, result in enumerate(results, 1):
            if topology.loads_data:
                writer.commit(facts.record(by_id[result.id], result))
                failures[result.failure] += 1
            progress.update(done, counters)
    progress.close()
    return failures


def _report(
    out: Path, topology: Topology, progress: GenerationProgress, counters: Counters, failures: Counter[str]
) -> None:
    """Sums over the replicas; the main rank says them and notes what this run cost."""
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
