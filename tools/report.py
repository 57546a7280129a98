"""Writes the report of a round: one HTML file with every number, image and candidate, to be opened offline.

In: folder with generations.jsonl, scores.jsonl, decisions.jsonl and funnel.json; the folder of images; earlier rounds
Out: report.html   Next: a browser
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sicog_mcore.config import Experiment
from sicog_mcore.errors import EXIT_OK, SicogError, exit_code, printable
from sicog_mcore.presets import PRESETS

MEGABYTE = 1_000_000


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; mistakes end with exit code 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--round", type=Path, required=True, help="folder of the round")
    parser.add_argument(
        "--images", type=Path, required=True, help="folder that the records' image paths are relative to"
    )
    parser.add_argument(
        "--source",
        type=Path,
        nargs=2,
        action="append",
        default=[],
        metavar=("GENERATIONS", "SCORES"),
        help="instead of the round's own files, as they were curated: again for each source, in the same order",
    )
    parser.add_argument("--out", type=Path, help="file to write; ROUND/report.html without it")
    parser.add_argument("--previous", type=Path, nargs="+", default=[], help="folders of earlier rounds, oldest first")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--preset", choices=sorted(PRESETS), help="model that cut the images")
    model.add_argument("--checkpoint", type=Path, help="its step_N folder, or the output folder of its run")
    parser.add_argument("--thresholds", type=float, nargs="+", help="drawn in the histograms; 0.8 0.85 0.9 without it")
    parser.add_argument("--max-items", type=int, default=500, help="items shown in full; of more, a sample is")
    parser.add_argument("--seed", type=int, default=0, help="of that sample")
    options = parser.parse_args(arguments)
    for folder in (options.round, options.images, *options.previous):
        if not folder.is_dir():
            parser.error(f"{folder} is no folder")
    if options.max_items < 1:
        parser.error(f"--max-items is {options.max_items}; at least 1 is needed")
    if not all(0 <= threshold <= 1 for threshold in options.thresholds or ()):
        parser.error(f"--thresholds are {options.thresholds}; each must lie between 0 and 1")
    return options


def find_experiment(options: argparse.Namespace) -> Experiment:
    """What the model was configured with."""
    if options.preset:
        return PRESETS[options.preset]()
    from sicog_mcore.checkpoint.locate import find_folder
    from sicog_mcore.checkpoint.part_reader import read_experiment

    return read_experiment(find_folder(options.checkpoint) or options.checkpoint)


def write_whole(path: Path, text: str) -> int:
    """Writes a file that appears whole or not at all. Returns its size in bytes."""
    from sicog_mcore.files import whole_file

    with whole_file(path) as aside:
        return aside.write_bytes(text.encode("utf-8"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes one report; returns the exit code."""
    options = parse(arguments)
    from sicog_mcore.cognition.reporting.page import ReportOptions, build_report
    from sicog_mcore.cognition.reporting.rounds import RoundSource
    from sicog_mcore.cognition.scoring.agreement import THRESHOLDS

    try:
        settings = ReportOptions(
            images=options.images,
            experiment=find_experiment(options),
            thresholds=tuple(options.thresholds or THRESHOLDS),
            max_items=options.max_items,
            seed=options.seed,
        )
        sources = [RoundSource(generations, scores) for generations, scores in options.source]
        report = build_report(options.round, settings, options.previous, sources)
        out = options.out or options.round / "report.html"
        size = write_whole(out, report.html)
    except (SicogError, OSError) as error:
        print(printable(f"report: {error}"), file=sys.stderr)
        return exit_code(error)
    line = f"{out}: {report.shown} of {report.items} items, {size / MEGABYTE:.1f} MB"
    for drift in report.drifts:
        for name, verdict in drift.judged[-1:]:
            line += f"; {drift.task} in {name}: {verdict.level}"
    print(printable(line))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
