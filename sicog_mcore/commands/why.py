"""Why is this row in the training data, or why is it not? Walks back from a row to all that it was made from.

In: id of a training row, a pair, or an item; folder of a round; maybe folders of runs   Out: text
Shows the image and whether it is still the one, the prompts, every candidate with its score, the matrix, the decision with
its reason, and the training steps that consumed the rows. An unknown id is answered with the nearest ones, and exit code 2.
Next: report.py (the whole round)
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sicog_mcore.cognition.curation.curated_round import DECISIONS
from sicog_mcore.cognition.prompts import ask, load_prompts
from sicog_mcore.cognition.records import Candidate, Decision, Generation, Scores, read_records
from sicog_mcore.cognition.reporting.rounds import record_file
from sicog_mcore.commands.verb import Verb, VerbCall
from sicog_mcore.errors import EXIT_OK, RecordError, SampleError, SicogError, exit_code, printable
from sicog_mcore.files import hash_file
from sicog_mcore.flags import flag

CONSUMED = "consumed-*.jsonl"  # of train/feed.py, which would import Megatron
PAIR_SUFFIX, TEXT_SUFFIX = "#pair", "#text"
NEAREST = 3


@dataclass(frozen=True, kw_only=True)
class WhyOptions:
    """Options that ``why`` takes.

    Attributes:
        sample: id of a training row, of a pair, or of an item.
        round: folder of the round.
        run: output folders of training runs.
        images: folder of images, to see whether the image is still the one.
        generations: if they do not lie in the round's folder.
        scores: the same for scores.
    """

    sample: str = flag(is_positional=True)
    round: Path
    run: tuple[Path, ...] = ()
    images: Path | None = None
    generations: tuple[Path, ...] = ()
    scores: tuple[Path, ...] = ()


@dataclass(frozen=True)
class ItemOrigin:
    """The records of a round that tell of one item."""

    generation: Generation
    scores: tuple[Scores, ...]
    decision: Decision

    @property
    def row_ids(self) -> tuple[str, ...]:
        """Everything that training may have consumed of it."""
        pair = (self.generation.id + PAIR_SUFFIX,) if self.decision.rejected >= 0 else ()
        return (*self.decision.rows, *pair)


def find_decision(path: Path, wanted: str) -> Decision:
    """The decision about an item, or about the item of a row or a pair.

    Raises:
        RecordError: there is none; the nearest ids are named.
    """
    ids: list[str] = []
    for decision in read_records(path, Decision):
        pair = [decision.id + PAIR_SUFFIX] if decision.rejected >= 0 else []
        own = [decision.id, *decision.rows, *pair]
        if wanted in own:
            return decision
        ids += own
    if wanted.endswith(TEXT_SUFFIX):
        raise RecordError(f"{wanted!r} was not generated: it is a row of the file that was given to curation as --text")
    nearest = difflib.get_close_matches(wanted, ids, NEAREST, cutoff=0.0)
    raise RecordError(
        f"{path}: found no {wanted!r}; the nearest are {', '.join(map(repr, nearest)) or 'none: it is empty'}"
    )


def find_origin(options: WhyOptions) -> ItemOrigin:
    """Everything the round's files say about the wanted id.

    Raises:
        RecordError: a file is missing or damaged, or none knows the id.
    """
    decision = find_decision(options.round / DECISIONS, options.sample)
    files = options.generations or [record_file(options.round, "generations")]
    generations = (record for file in files for record in read_records(file, Generation))
    generation = next((record for record in generations if record.id == decision.id), None)
    if generation is None:
        names = ", ".join(map(str, files))
        raise RecordError(f"{names}: found no {decision.id!r}, which was curated; name its file with --generations")
    files = options.scores or [record_file(options.round, "scores")]
    scores = [record for file in files for record in read_records(file, Scores) if record.id == decision.id]
    return ItemOrigin(generation, tuple(scores), decision)


def consumed_steps(run: Path, ids: Sequence[str]) -> dict[str, list[int]]:
    """Training steps of a run that consumed each of these rows.

    Raises:
        RecordError: the folder has no record of what was consumed.
    """
    files = sorted(run.glob(CONSUMED))
    if not files:
        raise RecordError(f"{run} has no {CONSUMED}; give the output folder of a training run")
    steps: dict[str, set[int]] = {name: set() for name in ids}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the line that a run was writing when it was killed; the next run writes the step again
            for name in steps.keys() & set(entry["ids"]):
                steps[name].add(entry["step"])
    return {name: sorted(found) for name, found in steps.items()}


@dataclass(frozen=True)
class Explanation:
    """Where one training row came from and where it went.

    Attributes:
        consumed: for each run, the training steps that consumed each of the item's rows.
    """

    origin: ItemOrigin
    consumed: Mapping[Path, Mapping[str, Sequence[int]]]


def explain(options: WhyOptions) -> Explanation:
    """Returns all that the files of the round and of the runs say of the wanted id.

    Raises:
        RecordError: a file is missing or damaged, or none knows the id.
    """
    origin = find_origin(options)
    return Explanation(origin, {run: consumed_steps(run, origin.row_ids) for run in options.run})


def image_state(generation: Generation, images: Path | None) -> str:
    """Whether the image is still the one that the answers were made from."""
    if not generation.image:
        return "none, text only"
    state = f"hash {generation.image_hash}"
    if images is None:
        return f"{generation.image}, {state} (give --images to compare)"
    try:
        found = hash_file(images / generation.image)
    except OSError as error:
        return f"{generation.image}, {state}; cannot be read: {error.strerror}"
    same = "unchanged" if found == generation.image_hash else f"CHANGED, now {found}"
    return f"{generation.image}, {state}, {same}"


def show(origin: ItemOrigin, console: Console, images: Path | None) -> None:
    """Prints item, prompts, candidates, matrix and decision."""
    generation, decision = origin.generation, origin.decision
    sampling = ", ".join(f"{name} {value}" for name, value in vars(generation.sampling).items())
    facts = {
        "item": f"{generation.id} ({generation.task})",
        "image": image_state(generation, images),
        "question": generation.question,
        "engine": f"{generation.engine}, checkpoint {generation.checkpoint}",
        "sampling": f"{sampling}, seed {generation.seed}",
        "decision": f"{decision.reason}{': ' if decision.detail else ''}{decision.detail}",
        "rows": ", ".join(origin.row_ids) or "none",
    }
    if generation.failure:
        facts["failure"] = f"{generation.failure}: {generation.detail}"
    grid = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        grid.add_row(Text(name, style="bold"), _text(value))
    console.print(grid)
    for use in generation.prompts:
        title = f"prompt {use.id}@{use.version}, {use.count} candidates"
        console.print(Panel(_text(_question(generation, use.id, use.version)), title=_text(title), title_align="left"))
    for index, candidate in enumerate(generation.candidates):
        title, style = _heading(origin, index, candidate)
        console.print(Panel(_text(candidate.text), title=_text(title), title_align="left", border_style=style))
    for scores in origin.scores:
        console.print(_matrix(scores))


def _question(generation: Generation, prompt_id: str, version: int) -> str:
    """The user turn, if this program still knows it."""
    prompt = load_prompts().get(prompt_id)
    if prompt is None or prompt.version != version:
        known = f"version {prompt.version}" if prompt else "no such prompt"
        return f"(its wording is not known here: this program has {known})"
    try:
        return ask(prompt, generation.question, 1 if generation.image else 0)
    except SampleError as error:
        return f"({error})"


def _heading(origin: ItemOrigin, index: int, candidate: Candidate) -> tuple[str, str]:
    """Title and colour of a candidate."""
    roles = {origin.decision.chosen: ("CHOSEN", "green"), origin.decision.rejected: ("REJECTED", "red")}
    role, style = roles.get(index, ("", "dim"))
    rate = candidate.log_prob / max(candidate.tokens, 1)
    scores = [f"{row.scores[index]:.4f} by {row.scorer}" for row in origin.scores if index < len(row.scores)]
    facts = [
        f"{index} {role}".strip(),
        f"{candidate.prompt} #{candidate.index}, seed {candidate.seed}",
        f"{candidate.tokens} tokens, {candidate.finish}",
        f"log-prob {candidate.log_prob:.2f} ({rate:.3f} per token)",
        *(f"score {score}" for score in scores),
    ]
    return " | ".join(facts), style


def _matrix(scores: Scores) -> Table:
    """Similarity of all pairs; the winner is marked."""
    if scores.failure:
        return Table(title=_text(f"{scores.scorer}: {scores.failure}"), title_justify="left")
    table = Table(title=_text(f"similarity by {scores.scorer}"), title_justify="left")
    for name in ("", *map(str, range(len(scores.matrix))), "score"):
        table.add_column(name, justify="right")
    for index, row in enumerate(scores.matrix):
        name = f"{index} *" if index == scores.winner else str(index)
        table.add_row(name, *(f"{value:.3f}" for value in row), f"{scores.scores[index]:.4f}")
    return table


def show_steps(run: Path, steps: Mapping[str, Sequence[int]], console: Console) -> None:
    """Prints which steps of a run consumed each row."""
    console.print(_text(f"consumed by {run}"), soft_wrap=True)  # the path whole, so that it can be copied
    table = Table()
    for name in ("row", "steps"):
        table.add_column(name)
    for name, found in steps.items():
        table.add_row(_text(name), ", ".join(map(str, found)) or "never")
    console.print(table)


def _text(text: str) -> Text:
    """Text as it is, without markup; what would steer a terminal is shown as its code."""
    return Text(printable(text))


def main(options: WhyOptions, call: VerbCall) -> int:
    """Explains one id; returns the exit code."""
    console = Console()
    try:
        found = explain(options)
    except (SicogError, OSError) as error:
        print(printable(f"why: {error}"), file=sys.stderr)
        return exit_code(error)
    show(found.origin, console, options.images)
    for run, steps in found.consumed.items():
        show_steps(run, steps, console)
    return EXIT_OK


VERB = Verb((__doc__ or "").splitlines()[0], WhyOptions, main)
