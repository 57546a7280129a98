r"""Candidates for unlabelled items, from one of our checkpoints: writes OUT/generations.jsonl, one record per item.

sicog generate --checkpoint runs/stage0a --rows items.jsonl --images images --prompts cod=2 caption=1 \
    --temperature 0.7 --top-p 0.9 --top-k 0 --max-new-tokens 1200 --seed 0 --batch 16 --out runs/round1/generate
torchrun --nproc-per-node 8 -m sicog_mcore generate --tensor 2 ...     four replicas of the model, two ranks each

The same command goes on where it was stopped; its records are the same, whatever the ranks, the batch, and the stops.
Next: score.py.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

from sicog_mcore.cognition.generation.options import GenerationOptions
from sicog_mcore.commands.verb import Verb, VerbCall
from sicog_mcore.errors import EXIT_CONFIG, EXIT_INTERRUPTED, EXIT_OK, SicogError, printable
from sicog_mcore.launcher import find_place, prepare, say, start_command, stop
from sicog_mcore.lock import owned
from sicog_mcore.ranks import Place

RECORDS = "generations.jsonl"


@dataclass(frozen=True)
class GeneratedCandidates:
    """Candidates that generation left in files.

    Attributes:
        records: the file, of rank 0; empty path after a dry run.
        estimate: lines that say what a run would take, of a dry run.
    """

    records: Path
    estimate: tuple[str, ...] = ()


def generate_candidates(
    options: GenerationOptions, place: Place, environment: MutableMapping[str, str], command: str = ""
) -> GeneratedCandidates:
    """Generates what is not there yet, or says what it would take. Collective.

    Args:
        place: of this process among the ranks, see launcher.find_place.
        environment: of the process; what Megatron relies on is set in it.
        command: what is told to others that want the folder.

    Raises:
        ConfigError: all that is wrong with the options, or the folder is in use.
        RecordError: rows or records are damaged.
        CheckpointError: there is no checkpoint, or it does not fit.
    """
    options.check()
    if options.engine == "vllm":
        environment.setdefault("VLLM_NO_USAGE_STATS", "1")  # it would report to its makers
    if options.dry_run:
        from sicog_mcore.cognition.generation.cost_estimate import estimate  # takes seconds to import

        return GeneratedCandidates(Path(), tuple(estimate(options, place.world_size)))
    with owned(options.out, command, say, place.is_main):
        prepare(environment, options.tensor, place)
        from sicog_mcore.cognition.generation.generate import run  # takes seconds to import

        run(options, place.world_size, place.rank)
    return GeneratedCandidates(options.out / RECORDS)


def main(options: GenerationOptions, call: VerbCall) -> int:
    """Generates; returns the exit code: 0 done, 2 wrong input, 17 do not retry, 75 machine, 130 interrupted."""
    place = find_place(call.environment)
    if place is None:
        return EXIT_CONFIG
    try:
        made = generate_candidates(options, place, call.environment, start_command(call.argv, call.environment))
        if made.estimate and place.is_main:
            print(printable("\n".join(made.estimate)))
    except SicogError as error:
        return stop(f"error: {error}", error.exit_code, error.is_said_by(place.is_main))
    except KeyboardInterrupt:
        return stop("interrupted; the same command goes on with what is left", EXIT_INTERRUPTED, place.is_main)
    return EXIT_OK


VERB = Verb(__doc__ or "", GenerationOptions, main)
