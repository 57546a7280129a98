"""Candidates for unlabelled items, from one of our checkpoints: writes OUT/generations.jsonl, one record per item.

python launch/generate.py --checkpoint runs/stage0a --rows items.jsonl --images images --prompts cod=2 caption=1 \
    --temperature 0.7 --top-p 0.9 --top-k 0 --max-new-tokens 1200 --seed 0 --batch 16 --out runs/round1/generate
torchrun --nproc-per-node 8 launch/generate.py --tensor 2 ...     four copies of the model, two ranks each

The same command goes on where it was stopped; its records are the same, whatever the ranks, the batch, and the stops.
Next: tools/score.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

from sicog_mcore.cognition.generation.options import GenerationOptions
from sicog_mcore.errors import EXIT_CONFIG, EXIT_INTERRUPTED, EXIT_OK, SicogError, printable
from sicog_mcore.launcher import find_place, prepare, say, start_command, stop
from sicog_mcore.lock import owned
from sicog_mcore.rollout.requests import Sampling


def read_options(words: list[str]) -> tuple[GenerationOptions, bool]:
    """The options, and whether only an estimate is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="output folder of a run, or a step_N folder")
    parser.add_argument(
        "--rows", type=Path, nargs="+", required=True, help=".json or .jsonl files of LLaVA rows; labels are not needed"
    )
    parser.add_argument("--images", type=Path, required=True, help="folder that the rows' image paths are relative to")
    parser.add_argument(
        "--prompts",
        type=_prompt_count,
        nargs="+",
        required=True,
        metavar="ID=COUNT",
        help="prompts and candidates of each",
    )
    parser.add_argument("--temperature", type=float, required=True, help="0 takes the most probable token")
    parser.add_argument("--top-p", type=float, required=True, help="share of the probability to draw from; 1 for all")
    parser.add_argument("--top-k", type=int, required=True, help="tokens to draw from; 0 for all")
    parser.add_argument("--max-new-tokens", type=int, required=True, help="longest answer")
    parser.add_argument("--seed", type=int, required=True, help="of the run; every candidate derives its own")
    parser.add_argument(
        "--batch", type=int, required=True, help="items that a copy of the model answers at the same time"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--engine", choices=["native", "vllm"], default="native", help="who answers (default native)")
    parser.add_argument("--tensor", type=int, default=1, help="ranks that share a copy of the model (default 1)")
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="default: that of the checkpoint")
    parser.add_argument("--tokenizer", default="", help="default: that of the checkpoint")
    parser.add_argument("--limit", type=int, default=0, help="so many items at most (default: all)")
    parser.add_argument("--price-per-gpu-hour", type=float, default=0.0, help="for the cost; any currency")
    parser.add_argument("--tokens-per-s", type=float, default=0.0, help="of one copy, for the time a dry run states")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done, and about what it takes")
    given = vars(parser.parse_args(words))
    sampling = Sampling(**{name: given.pop(name) for name in ("temperature", "top_p", "top_k", "max_new_tokens")})
    is_dry = given.pop("dry_run")
    lists = {name: tuple(given.pop(name)) for name in ("rows", "prompts")}
    return GenerationOptions(**given, **lists, sampling=sampling), is_dry


def _prompt_count(word: str) -> tuple[str, int]:
    name, _, count = word.partition("=")
    if not name or not count.isdecimal():
        raise argparse.ArgumentTypeError(f"found {word!r}, expected a prompt and its candidates, e.g. cod=2")
    return name, int(count)


def main(words: list[str], environment: MutableMapping[str, str]) -> int:
    """Returns the exit code: 0 done, 2 wrong options, rows or checkpoint, 17 do not retry, 75 machine, 130 interrupted."""
    options, is_dry = read_options(words)
    place = find_place(environment)
    if place is None:
        return EXIT_CONFIG
    try:
        options.check()
        if options.engine == "vllm":
            environment.setdefault("VLLM_NO_USAGE_STATS", "1")  # it would report to its makers
        if is_dry:
            from sicog_mcore.cognition.generation.cost_estimate import estimate  # takes seconds to import

            lines = estimate(options, place.world_size)
            if place.is_main:
                print(printable("\n".join(lines)))
            return EXIT_OK
        with owned(options.out, start_command([sys.argv[0], *words], environment), say, place.is_main):
            prepare(environment, options.tensor, place)
            from sicog_mcore.cognition.generation.generate import run  # takes seconds to import

            run(options, place.world_size, place.rank)
    except SicogError as error:
        return stop(f"error: {error}", error.exit_code, error.is_said_by(place.is_main))
    except KeyboardInterrupt:
        return stop("interrupted; the same command goes on with what is left", EXIT_INTERRUPTED, place.is_main)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
