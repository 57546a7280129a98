"""How well a checkpoint predicts the answers of given rows: loss per item, and perplexity.

python launch/perplexity.py --checkpoint runs/stage2 --rows bench/rows.jsonl --images bench --out results/stage2
torchrun --nproc-per-node 2 launch/perplexity.py --tensor 2 --checkpoint ...

In: one of our checkpoints, LLaVA rows   Out: results.jsonl, results.json   Next: tools/evaluate.py compare
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import MutableMapping
from dataclasses import replace
from pathlib import Path

from sicog_mcore.config import Experiment, ParallelConfig, SourceConfig
from sicog_mcore.data.preflight import check_inputs
from sicog_mcore.errors import EXIT_CONFIG, EXIT_INTERRUPTED, EXIT_OK, ConfigError, RecordError, SicogError, printable
from sicog_mcore.launcher import find_place, prepare, say, start_command, stop
from sicog_mcore.lock import owned
from sicog_mcore.validation import find_problems


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder step_N, or the output folder of a run")
    parser.add_argument("--rows", required=True, help="LLaVA rows whose answers are predicted")
    parser.add_argument("--images", default=".", help="folder that image paths are relative to (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.jsonl and results.json")
    parser.add_argument("--tokenizer", default="", help="where it is now (default: as the checkpoint says)")
    parser.add_argument("--tensor", type=int, default=1, metavar="N", help="tensor-parallel ranks")
    parser.add_argument("--pipeline", type=int, default=1, metavar="N", help="pipeline stages")
    return parser.parse_args(arguments)


def evaluated(options: argparse.Namespace, world_size: int) -> tuple[Experiment, str]:
    """What the checkpoint was trained with, on the rows to be predicted; and the checkpoint's fingerprint.

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


def measure(experiment: Experiment, fingerprint: str, out: Path) -> str:
    """Measures, writes the results on rank 0, and returns the line that says what was found."""
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
        for note in losses.notes:
            print(printable(note), file=sys.stderr)
        write_results(out, outcomes, summary)
    low, high = summary["perplexity_interval"]
    left_out = "".join(f"; left out: {count} x {reason}" for reason, count in summary["failures"].items())
    found = f"perplexity {summary['perplexity']:.4g}, 95 % interval {low:.4g} to {high:.4g}"
    return f"{out}: {found}, {len(losses.samples)} items, {summary['tokens']:,} tokens{left_out}"


def main(arguments: list[str] | None, environment: MutableMapping[str, str]) -> int:
    """Runs the command; returns its exit code."""
    options = parse(arguments)
    place = find_place(environment)
    if place is None:
        return EXIT_CONFIG
    words = sys.argv[1:] if arguments is None else arguments
    try:
        experiment, fingerprint = evaluated(options, place.world_size)
        with owned(options.out, start_command([sys.argv[0], *words], environment), say, place.is_main):
            prepare(environment, options.tensor, place)
            line = measure(experiment, fingerprint, options.out)
    except SicogError as error:
        return stop(f"error: {error}", error.exit_code, error.is_said_by(place.is_main))
    except KeyboardInterrupt:
        return stop("interrupted; nothing was written", EXIT_INTERRUPTED, place.is_main)
    if place.is_main:
        print(printable(line))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(None, os.environ))
