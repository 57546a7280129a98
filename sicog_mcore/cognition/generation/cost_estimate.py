"""A dry run estimates generation before any weight is read: counts, and a time and a price where speeds are known.

In: GenerationOptions   Out: lines for the user   Next: generate.py (the run itself)
"""

from __future__ import annotations

from collections import Counter

from sicog_mcore.cognition.generation.item_records import record_facts, refusal_lines, split_items
from sicog_mcore.cognition.generation.items import read_items
from sicog_mcore.cognition.generation.options import GenerationOptions
from sicog_mcore.cognition.item_keys import KeyCounter
from sicog_mcore.data.encode import Encoder
from sicog_mcore.data.sample import Turn
from sicog_mcore.errors import SampleError
from sicog_mcore.rollout.load import read_checkpoint
from sicog_mcore.train.console import duration_text

MEASURED_ITEMS = 200  # items that the estimate of a dry run looks at


def estimate(options: GenerationOptions, world_size: int) -> list[str]:
    """Estimates the cost of a run, as lines for the user; no weight is read and nothing is written."""
    options.check()
    checkpoint = read_checkpoint(options.checkpoint, options.tensor, options.precision, options.tokenizer)
    facts = record_facts(options, checkpoint)
    counter = KeyCounter()
    items = read_items(options.rows, options.images, options.limit, counter)
    requests, refused = split_items(facts, items)
    encoder = Encoder(checkpoint.experiment.model, checkpoint.experiment.data)
    sizes, failures = [], Counter(result.failure for result in refused)
    for request in requests[:: max(1, len(requests) // MEASURED_ITEMS)]:
        try:
            sizes.append(encoder.measure_prompts(request.images, [(Turn("user", t),) for t in request.prompts]))
        except SampleError as error:
            failures[error.reason] += 1
    candidates = sum(count for _, count in facts.prompts) * len(requests)
    tokens, slices = (
        round(sum(column) / max(1, len(sizes)) * len(requests)) for column in zip(*(sizes or [(0, 0)]), strict=True)
    )
    most = candidates * options.sampling.max_new_tokens
    asked = ", ".join(f"{prompt.id} v{prompt.version} x {count}" for prompt, count in facts.prompts)
    lines = [
        f"items      {len(items):,}, {len(requests):,} of them usable rows",
        *counter.lines(),
        *refusal_lines(items, refused),
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
