"""Writes the report of a round: one HTML file with every number, image and candidate, to be opened offline.

In: folder with generations.jsonl, scores.jsonl, decisions.jsonl and funnel.json; the folder of images; earlier rounds
Out: report.html   Next: a browser
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sicog_mcore.cognition.step_options import RoundReportOptions
from sicog_mcore.commands.verb import Verb, VerbCall, reporting
from sicog_mcore.config import Experiment
from sicog_mcore.presets import PRESETS

if TYPE_CHECKING:
    from sicog_mcore.cognition.reporting.page import Report

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class WrittenReport:
    """A report on disk.

    Attributes:
        out: the file.
        size: its bytes.
        report: what it shows.
    """

    out: Path
    size: int
    report: Report


def find_experiment(options: RoundReportOptions) -> Experiment:
    """Finds the experiment that configured the model."""
    if options.preset:
        return PRESETS[options.preset]()
    from sicog_mcore.checkpoint.locate import find_folder
    from sicog_mcore.checkpoint.part_reader import read_experiment

    assert options.checkpoint is not None  # one of the two is given
    return read_experiment(find_folder(options.checkpoint) or options.checkpoint)


def write_whole(path: Path, text: str) -> int:
    """Writes a file that appears whole or not at all. Returns its size in bytes."""
    from sicog_mcore.files import whole_file

    with whole_file(path) as temporary:
        return temporary.write_bytes(text.encode("utf-8"))


def report_round(options: RoundReportOptions) -> WrittenReport:
    """Writes one report.

    Raises:
        RecordError: a file of the round is missing or damaged.
        CheckpointError: the run has no checkpoint.
    """
    from sicog_mcore.cognition.reporting.page import ReportOptions, build_report
    from sicog_mcore.cognition.reporting.rounds import RoundSource
    from sicog_mcore.cognition.scoring.agreement import THRESHOLDS

    settings = ReportOptions(
        images=options.images,
        experiment=find_experiment(options),
        thresholds=options.thresholds or THRESHOLDS,
        max_items=options.max_items,
        seed=options.seed,
    )
    sources = [RoundSource(generations, scores) for generations, scores in options.source]
    report = build_report(options.round, settings, options.previous, sources)
    out = options.out or options.round / "report.html"
    return WrittenReport(out, write_whole(out, report.html), report)


def main(options: RoundReportOptions, call: VerbCall) -> int:
    """Writes one report and prints a line; returns the exit code."""

    def work() -> str:
        written = report_round(options)
        report = written.report
        line = f"{written.out}: {report.shown} of {report.items} items, {written.size / MEGABYTE:.1f} MB"
        for drift in report.drifts:
            for name, verdict in drift.judged[-1:]:
                line += f"; {drift.task} in {name}: {verdict.level}"
        return line

    return reporting("report", work)


VERB = Verb((__doc__ or "").splitlines()[0], RoundReportOptions, main)
