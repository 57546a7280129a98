"""Does curation help? Runs the experiment of docs/micro_loop.md.

python -m examples.micro_loop --out runs/micro_loop --document docs/micro_loop.md     the whole of it
python -m examples.micro_loop --fast --out runs/micro_loop_fast                       the mechanics, in minutes
From the folder of the repository. The same command goes on where it was stopped; what is done is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from examples.micro_loop.document import write_document
from examples.micro_loop.lanes import run_lanes, seconds_of
from examples.micro_loop.plan import ARMS, FAST, Regime, plan_seed
from examples.micro_loop.results import read_seed

SEEDS, FAST_SEEDS = (1, 2, 3, 4, 5), (100,)
NUMBERS = ("pretrain_steps", "finetune_steps", "candidates", "renderings")
FAILED = 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.micro_loop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of everything")
    parser.add_argument("--fast", action="store_true", help="few steps, pictures and arms, one seed: no claim")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 1 to 5, with --fast 100")
    parser.add_argument("--split", choices=("test", "validation"), help="default: test, with --fast validation")
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help=f"of: {'; '.join(ARMS)}")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, of one thread each")
    parser.add_argument("--document", type=Path, help="Markdown file (default: report.md in the folder)")
    for name in NUMBERS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help="instead of what was chosen")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    options = parse(arguments)
    given = {name: value for name in (*NUMBERS, "arms") if (value := vars(options)[name]) is not None}
    regime = replace(FAST if options.fast else Regime(), **given)
    seeds = options.seeds or (FAST_SEEDS if options.fast else SEEDS)
    split = options.split or ("validation" if options.fast else "test")
    root = options.out.resolve()
    lanes = [lane for seed in seeds for lane in plan_seed(regime, seed, split, root / f"seed-{seed}")]
    lanes.sort(key=lambda lane: lane.after is not None)  # what others wait for comes first
    if not run_lanes(lanes, options.jobs):
        return FAILED
    results = [read_seed(root / f"seed-{seed}", regime, seed, split) for seed in seeds]
    numbers = {"regime": asdict(regime), "split": split, "results": [asdict(result) for result in results]}
    (root / "results.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    text = write_document(results, regime, split, seconds_of(lanes))
    document = options.document or root / "report.md"
    document.write_text(text, encoding="utf-8")
    sys.stdout.write(f"{text}\n{document}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
