"""The report of a round: one HTML file that loads nothing, and runs nothing that came with the data.

In: folder of a round, folder of images, folders of earlier rounds   Out: an HTML page   Next: a browser, offline
Captions are written by a model, so all text is hostile: every value is escaped, odd characters are shown by number, and
the page's policy admits only our own style and script, by their hashes. Equal files give equal bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from sicog_mcore.cognition.records import Candidate, Decision, Generation, Scores, Task
from sicog_mcore.cognition.reporting.chart import Chart, lay_out_chart
from sicog_mcore.cognition.reporting.drift import RULE, Drift, find_drift
from sicog_mcore.cognition.reporting.overview import Overview, Threshold, choose_rows, histogram, survey
from sicog_mcore.cognition.reporting.rounds import RoundItem, RoundSource, read_round
from sicog_mcore.cognition.reporting.thumbnails import Line, Thumbnail, make_thumbnail, slice_borders, slice_centres
from sicog_mcore.cognition.scoring.agreement import THRESHOLDS, others
from sicog_mcore.config import DataConfig, Experiment
from sicog_mcore.data.slicing import SlicePlan, lay_out, plan_slices
from sicog_mcore.errors import RecordError, SampleError

PACKAGE = "sicog_mcore.cognition.reporting"
FUNNEL = "funnel.json"
LONGEST_TEXT = 6000  # characters of a candidate that are shown
HEAT_FROM, HEAT_STEP, HEAT_LEVELS = 0.5, 0.05, 10
Thumbnails = Callable[[str, str, DataConfig], Thumbnail]
SHOWN_CONTROLS = "\n\t\u200c\u200d"  # joiners belong to the spelling of some scripts and of emoji


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """The options of a report beside the files of the round.

    Attributes:
        images: folder that the records' image paths are relative to; nothing outside it is read.
        experiment: how the model cuts images, and which images it accepts.
        thresholds: of agreement, drawn into the histograms beside those that the round was curated with.
        max_items: items shown in full; of more, a sample is.
        seed: of that sample.
    """

    images: Path
    experiment: Experiment
    thresholds: tuple[float, ...] = THRESHOLDS
    max_items: int = 500
    seed: int = 0


@dataclass(frozen=True)
class Report:
    """A page and what a person wants to know before opening it."""

    html: str
    items: int
    shown: int
    drifts: tuple[Drift, ...]


@dataclass(frozen=True)
class Figure:
    """An image of an item; ``problem`` says why there is none, or what is odd about it."""

    uri: str = ""
    plan: SlicePlan | None = None
    lines: tuple[Line, ...] = ()
    centres: tuple[tuple[float, float], ...] = ()
    visual_tokens: int = 0
    problem: str = ""


@dataclass(frozen=True)
class ShownAnswer:
    """A candidate as the page shows it; the part that was compared stands between ``before`` and ``after``."""

    candidate: Candidate
    score: float | None
    marks: tuple[str, ...]
    before: str
    compared: str
    after: str
    note: str = ""


@dataclass(frozen=True)
class Card:
    """One item as the page shows it."""

    generation: Generation
    scores: Scores
    decision: Decision
    figure: Figure | None
    answers: tuple[ShownAnswer, ...]


@dataclass(frozen=True)
class Agreement:
    """The agreement of a task's candidates."""

    task: str
    items: int
    candidates: int
    mean: float
    chart: Chart
    thresholds: tuple[Threshold, ...]


@dataclass(frozen=True)
class FunnelRow:
    """A row of the funnel: what one filter dropped, by task and in all, and what it left."""

    stage: str
    reason: str
    dropped: Mapping[str, int]
    total: int
    left: int


@dataclass(frozen=True)
class ShownFunnel:
    """The counts of tools/curate.py, filter by filter.

    Attributes:
        tasks: items in and kept, by task.
        made: training rows by form, and items kept by what became of their pair.
        thresholds: that a winner had to reach, whatever its prompt.
        settings: all options of the curation, as text.
    """

    came: int
    steps: tuple[FunnelRow, ...]
    kept: int
    tasks: Mapping[str, tuple[int, int]]
    made: Mapping[str, Mapping[str, int]]
    thresholds: frozenset[float]
    settings: Mapping[str, str]


def build_report(
    folder: Path, options: ReportOptions, previous: Sequence[Path] = (), sources: Sequence[RoundSource] = ()
) -> Report:
    """Reads a round and writes its page.

    Args:
        previous: folders of earlier rounds, oldest first.
        sources: generations and scores of the round, where they are not the folder's own.

    Raises:
        RecordError: a file of the round is missing or damaged.
    """
    found = survey(read_round(folder, sources), options.seed)
    if not found.items:
        raise RecordError(f"{folder} has no items; generate, score and curate first")
    # The round is read twice: once to count all its items, once for the few that are shown.
    rounds = [*previous, folder]
    names = _names(rounds)
    contents = [survey(read_round(earlier), options.seed).content for earlier in previous] + [found.content]
    drifts = find_drift(list(zip(names, contents, strict=True))) if previous else ()
    rows = choose_rows(found.order, options.max_items)
    shown = (item for row, item in enumerate(read_round(folder, sources)) if row in rows)
    thumbnails = lru_cache(make_thumbnail)  # an image is often asked several things
    cards = [_card(item, options, thumbnails) for item in shown]
    funnel = read_funnel(folder / FUNNEL)
    values = {
        "name": names[-1],
        "survey": found,
        "funnel": funnel,
        "agreements": [_agreement(task, found, options.thresholds, funnel.thresholds) for task in found.agreements],
        "drifts": drifts,
        "rule": RULE,
        "cards": cards,
        "reasons": list(found.reasons),
        "options": options,
    }
    return Report(_render(values), found.items, len(cards), drifts)


def _names(folders: Sequence[Path]) -> list[str]:
    """Names of folders, with as many of their parents as it takes to tell them apart."""
    paths = [folder.resolve() for folder in folders]
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        # Folders of rounds are often called alike; as many parents as needed tell them apart.
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def read_funnel(path: Path) -> ShownFunnel:
    """The counts of a curation.

    Raises:
        RecordError: the file is missing, has another form, or its counts do not add up.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tasks = {task: (counts["in"], counts["kept"]) for task, counts in content["tasks"].items() if counts["in"]}
        # Summed up anew, and held against the number kept below.
        left, steps = content["in"], []
        for step in content["dropped"]:
            left -= step["count"]
            dropped = {task: step[task] for task in tasks}
            steps.append(FunnelRow(step["stage"], step["reason"], dropped, step["count"], left))
        settings = content["settings"]
        used = [source[0] for source in settings["thresholds"]]  # of the scorer that named the winners
        funnel = ShownFunnel(
            came=content["in"],
            steps=tuple(steps),
            kept=content["kept"],
            tasks=tasks,
            made={"training rows": content["rows"], "pairs": content["pairs"]},
            thresholds=frozenset(v for t in used for v in (t["general"], *(number for _, number in t["special"]))),
            settings={name: json.dumps(value, ensure_ascii=False) for name, value in settings.items()},
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RecordError(f"{path} cannot be read ({type(error).__name__}: {error}); curate again") from error
    if left != funnel.kept:
        raise RecordError(f"{path}: {left} items are left by the filters but {funnel.kept} were kept; curate again")
    return funnel


def _agreement(task: Task, found: Overview, asked: Sequence[float], used: frozenset[float]) -> Agreement:
    pairs, count = found.agreements[task], found.candidates[task]
    thresholds = []
    for value in sorted({*asked, *used}):
        above = sum(agreement >= value for agreement, _ in pairs)
        to_others = others(value, count) if count > 1 else None
        thresholds.append(Threshold(value, value in used, above, above / len(pairs), to_others))
    mean = sum(agreement for agreement, _ in pairs) / len(pairs)
    return Agreement(task, len(pairs), count, mean, lay_out_chart(histogram(pairs), thresholds), tuple(thresholds))


def _card(item: RoundItem, options: ReportOptions, thumbnails: Thumbnails) -> Card:
    figure = _figure(item.generation, options, thumbnails) if item.generation.image else None
    answers = tuple(_answer(item, index) for index in range(len(item.generation.candidates)))
    return Card(item.generation, item.scores, item.decision, figure, answers)


def _figure(generation: Generation, options: ReportOptions, thumbnails: Thumbnails) -> Figure:
    """The image with its slices; an image that cannot be shown is no reason to show no report."""
    model, limits = options.experiment.model, options.experiment.data
    try:
        thumbnail = thumbnails(generation.image, os.path.realpath(options.images), limits)
    except SampleError as error:
        return Figure(problem=error.reason)
    plan = plan_slices(thumbnail.image, model.slicing, model.tower.patch_px)
    return Figure(
        uri=thumbnail.uri,
        plan=plan,
        lines=slice_borders(plan),
        centres=slice_centres(plan),
        visual_tokens=lay_out(plan, model.resampler.query_grid, model.slicing.layout).num_tokens,
        problem="" if thumbnail.file_hash == generation.image_hash else "the file has changed since it was described",
    )


def _answer(item: RoundItem, index: int) -> ShownAnswer:
    candidate, scores, decision = item.generation.candidates[index], item.scores, item.decision
    places = {"chosen": decision.chosen, "rejected": decision.rejected}
    if scores.winner != decision.chosen:
        places["best agreement"] = scores.winner
    marks = tuple(mark for mark, place in places.items() if place == index)
    score = scores.scores[index] if scores.scores else None
    clause = scores.clauses[index] if scores.clauses else None
    # Cut before it is searched: a page stays small whatever a model wrote.
    text, left_out = candidate.text[:LONGEST_TEXT], len(candidate.text) - LONGEST_TEXT
    note = f"{left_out} more characters in the records" if left_out > 0 else ""
    if clause is None or clause == text:
        missing = "" if clause == text or not scores.clauses else "has no part that could be compared"
        return ShownAnswer(candidate, score, marks, text, "", "", "; ".join(filter(None, (missing, note))))
    # The last occurrence: the compared clause is the end of an answer, and may be said before.
    before, compared, after = text.rpartition(clause)
    if not compared:  # the clause was normalised, or stands behind the cut
        before, after = text, ""
        note = "; ".join(filter(None, (note, f"compared: {clause[:LONGEST_TEXT]}")))
    return ShownAnswer(candidate, score, marks, before, compared, after, note)


def heat(value: float) -> int:
    """Level of a similarity, 0 to HEAT_LEVELS; each level is HEAT_STEP wide and the first takes all below HEAT_FROM."""
    return max(0, min(HEAT_LEVELS, int((value - HEAT_FROM) / HEAT_STEP + 1e-6)))


def visible(text: str) -> str:
    """Text whose controls, direction marks and lone surrogates are shown by number and can do nothing."""
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character.isprintable() or character in SHOWN_CONTROLS or unicodedata.category(character)[0] != "C":
        return character
    return f"⟨U+{ord(character):04X}⟩"


def _finalize(value: Any) -> Any:
    """Shows every value that Jinja is about to escape with its odd characters by number; no value gets around it."""
    return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _render(values: Mapping[str, Any]) -> str:
    style, script = _asset("report.css"), _asset("report.js")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_finalize, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["heat"] = heat
    template = environment.from_string(_asset("report.html.j2"))
    # Only our own style and script run, known by hash: text that got past escaping could still run nothing.
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
    )
    return template.render(**values, policy=policy, style=style, script=script)


def _asset(name: str) -> str:
    return (resources.files(PACKAGE) / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """The form in which a content policy names an inline element."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
