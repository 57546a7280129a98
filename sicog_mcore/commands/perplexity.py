"""How well a checkpoint predicts the answers of given rows: loss per item, and perplexity.

In: one of our checkpoints, LLaVA rows   Out: results.jsonl, results.json   Next: held_out.py (how), evaluate.py (compares)
Under torchrun the model may be split, with --tensor and --pipeline; further ranks share the rows.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from sicog_mcore.commands.verb import Verb, VerbCall
from sicog_mcore.config import Experiment, ParallelConfig, SourceConfig
from sicog_mcore.data.preflight import check_inputs
from sicog_mcore.errors import EXIT_CONFIG, EXIT_INTERRUPTED, EXIT_OK, ConfigError, RecordError, SicogError, printable
from sicog_mcore.flags import flag
from sicog_mcore.launcher import find_place, prepare, say, start_command, stop
from sicog_mcore.lock import owned
from sicog_mcore.validation import find_problems


@dataclass(frozen=True, kw_only=True)
class PerplexityOptions:
    """Options that ``perplexity`` takes.

    Attributes:
        checkpoint: folder step_N, or the output folder of a run.
        rows: LLaVA rows whose answers are predicted.
        images: folder that image paths are relative to.
        out: folder for results.jsonl and results.json.
        tokenizer: where it is now (default: as the checkpoint says).
        tensor: tensor-parallel ranks.
        pipeline: pipeline stages.
    """

    checkpoint: Path
    rows: str
    images: str = "."
    out: Path
    tokenizer: str = ""
    tensor: int = flag(1, metavar="N")
    pipeline: int = flag(1, metavar="N")


@dataclass(frozen=True)
class Perplexity:
    """How well the answers were predicted.

    Attributes:
        perplexity: exponential of the mean loss per token.
        low, high: its 95 % interval.
        items: rows that were measured.
        tokens: of their answers.
        failures: rows that were left out, by reason.
        notes: what is to be said of weights, rows and tokenizer.
        is_main: whether this rank has written the results, and speaks.
    """

    perplexity: float
    low: float
    high: float
    items: int
    tokens: int
    failures: dict[str, int]
    notes: tuple[str, ...]
    is_main: bool


def evaluated(options: PerplexityOptions, world_size: int) -> tuple[Experiment, str]:
    """Returns what the checkpoint was trained with, on the rows to be predicted; and the checkpoint's fingerprint.

    Raises:
        ConfigError: rows, images, tokenizer or layout cannot be used.
        CheckpointError: there is no checkpoint.
    """
    from sicog_mcore.rollout.load import read_checkpoint

    checkpoint = read_checkpoint(options.checkpoint, tokenizer=options.tokenizer)
    saved, num_copies = checkpoint.experiment, max(1, world_size // (options.tensor * options.pipeline))
    experiment = replace(
        saved,
        output=str(options.out),
        data=replace(saved.data, sources=(SourceConfig(path=options.rows, images=options.images),)),
        parallel=ParallelConfig(tensor=options.tensor, pipeline=options.pipeline),
        # The rules about the global batch are asked too.
        train=replace(saved.train, packs_per_step=num_copies, samples_per_step=0, tokens_per_step=0),
        objective="next_token",
    )
    if problems := [*check_inputs(experiment), *find_problems(experiment, world_size)]:
        raise ConfigError(problems)
    return experiment, checkpoint.fingerprint


def measure_perplexity(experiment: Experiment, fingerprint: str, out: Path) -> Perplexity:
    """Measures on all ranks, writes the results on rank 0, and returns what was found. Collective.

    Args:
        experiment: the checkpoint's, on the rows to be predicted; see ``evaluated``.
        fingerprint: of the checkpoint, for the results.
        out: folder of the results.

    Raises:
        RecordError: none of the rows can be used.
    """
    from sicog_mcore.cognition.evaluation.benchmark import content_hash
    from sicog_mcore.cognition.evaluation.judging import ItemOutcome, summarise, write_results
    from sicog_mcore.parallel.topology import start_topology, stop_topology
    from sicog_mcore.train.held_out import measure_losses

    topology = start_topology(experiment.parallel, experiment.train.seed, output=experiment.output)
    try:
        topology.watch.beat("the measurement")
        with topology.watch.explaining():
            losses = measure_losses(experiment, topology)
    finally:
        stop_topology()
    if not any(sample.tokens for sample in losses.samples):  # the same on all ranks
        reasons = {rejection.reason for rejection in losses.refused} | ({"no_tokens"} if losses.samples else set())
        count = len(losses.refused) + len(losses.samples)
        raise RecordError(f"none of the {count} rows can be used: {', '.join(sorted(reasons))}")
    outcomes = [ItemOutcome(s.id, "", "loss", s.loss_sum / s.tokens, s.tokens) for s in losses.samples if s.tokens]
    outcomes += [ItemOutcome(s.id, "", "loss", 0.0, 0.0, failure="no_tokens") for s in losses.samples if not s.tokens]
    outcomes += [ItemOutcome(r.id, "", "loss", 0.0, 0.0, failure=r.reason) for r in losses.refused]
    rows = experiment.data.sources[0].path
    summary = summarise(
        outcomes, {"checkpoint": fingerprint, "benchmark": rows, "benchmark_hash": content_hash(Path(rows))}
    )
    if topology.is_main:
        write_results(out, outcomes, summary)
    low, high = summary["perplexity_interval"]
    return Perplexity(
        perplexity=summary["perplexity"],
        low=low,
        high=high,
        items=len(losses.samples),
        tokens=summary["tokens"],
        failures=summary["failures"],
        notes=tuple(losses.notes),
        is_main=topology.is_main,
    )


def line_of(found: Perplexity, out: Path) -> str:
    """Says in one line what was found."""
    left_out = "".join(f"; left out: {count} x {reason}" for reason, count in found.failures.items())
    value = f"perplexity {found.perplexity:.4g}, 95 % interval {found.low:.4g} to {found.high:.4g}"
    return f"{out}: {value}, {found.items} items, {found.tokens:,} tokens{left_out}"


def main(options: PerplexityOptions, call: VerbCall) -> int:
    """Measures and prints one line on rank 0; returns the exit code."""
    environment = call.environment
    place = find_place(environment)
    if place is None:
        return EXIT_CONFIG
    try:
        experiment, fingerprint = evaluated(options, place.world_size)
        with owned(options.out, start_command(call.argv, environment), say, place.is_main):
            prepare(environment, options.tensor, place)
            found = measure_perplexity(experiment, fingerprint, options.out)
            for note in found.notes if found.is_main else ():
                print(printable(note), file=sys.stderr)
    except SicogError as error:
        return stop(f"error: {error}", error.exit_code, error.is_said_by(place.is_main))
    except KeyboardInterrupt:
        return stop("interrupted; nothing was written", EXIT_INTERRUPTED, place.is_main)
    if place.is_main:
        print(printable(line_of(found, options.out)))
    return EXIT_OK


VERB = Verb((__doc__ or "").splitlines()[0], PerplexityOptions, main)
