"""The table of the experiment as Markdown, with the sentences that follow from its numbers.

In: SeedResults, Regime   Out: text of docs/micro_loop.md   Used by: __main__.py
"""

from __future__ import annotations

from collections.abc import Sequence

from examples.micro_loop.digits import SIZES
from examples.micro_loop.plan import BASE, EQUAL, LONG, UNCURATED, Regime
from examples.micro_loop.results import CONFIDENCE, GATE_KEPT, GATE_POINTS, Difference, Kept, Scores, SeedResult, paired

INTRODUCTION = """\
# Does the loop help? An experiment with equal compute

Written by `python -m examples.micro_loop`; do not edit. Real handwritten digits (UCI, from scikit-learn's wheel) in colours
of ours; descriptions are plain or in five steps. Every arm starts from the same first weights and ends with the same
{finetune} steps of stage 2 on {labelled} labelled pictures; before that come {pretrain} steps of stage 1.5 on what the arm
is named after, out of {unlabelled} unlabelled pictures. `{equal}` takes the labels for these steps too, `{long}` takes all
steps in one schedule. Below are {split} pictures, seeds {seeds}; settings were chosen on validation pictures of seed 1000.
Numbers are %; ± is a paired 95 % t-interval over seeds.
"""


def write_document(results: Sequence[SeedResult], regime: Regime, split: str, seconds: float) -> str:
    """The whole text."""
    sizes = {**SIZES, **regime.sizes}
    introduction = INTRODUCTION.format(
        finetune=regime.finetune_steps,
        equal=EQUAL,
        long=LONG,
        pretrain=regime.pretrain_steps,
        labelled=sizes["labelled"],
        unlabelled=sizes["unlabelled"],
        split=split,
        seeds=", ".join(str(result.seed) for result in results),
    )
    drawn = f"{regime.candidates} chains and {regime.candidates} plain descriptions per picture"
    renderings = f", {regime.renderings} renderings of each unlabelled digit" if regime.renderings > 1 else ""
    cost = f"{drawn} at temperature {regime.temperature:g}{renderings}. All steps took {seconds / 60:.0f} process minutes.\n"
    parts = [introduction + "\n" + cost, "## Arms\n", *arm_table(results), "\n## What curation keeps\n"]
    return "\n".join([*parts, *kept_table(results), "\n## Reading\n", *reading(results)]) + "\n"


def arm_table(results: Sequence[SeedResult]) -> list[str]:
    """One row per arm."""
    others = (EQUAL, BASE, UNCURATED)
    minus = " | ".join(f"minus {other}" for other in others)
    rows = [f"| arm | digit | {minus} | attributes | questions |", "|---|---|---|---|---|---|---|"]
    for arm in results[0].arms:
        scores = [result.arms[arm] for result in results]
        digit, attributes, questions = (
            f"{_average(scores, field):.1f}" for field in ("digit", "attributes", "questions")
        )
        against = [
            show(difference(results, other, arm)) if arm != other and other in results[0].arms else ""
            for other in others
        ]
        rows.append(f"| {arm} | {digit} | {' | '.join(against)} | {attributes} | {questions} |")
    return rows


def kept_table(results: Sequence[SeedResult]) -> list[str]:
    """One row per curation."""
    rows = [
        "| curation | kept | precision kept | precision random | difference | per seed | gate |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in results[0].kept:
        kept = [result.kept[name] for result in results]
        share, precision, random = (_average(kept, field) for field in ("share", "precision", "random"))
        gain = paired([entry.random for entry in kept], [entry.precision for entry in kept])
        each = ", ".join(f"{entry.gain:+.1f}" for entry in kept)
        passed = sum(entry.passes for entry in kept)
        cells = (
            name,
            f"{share:.1f}",
            f"{precision:.1f}",
            f"{random:.1f}",
            show(gain),
            each,
            f"{passed} of {len(kept)}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    low, high = GATE_KEPT
    return [
        *rows,
        "",
        f"Gate: at least {GATE_POINTS:g} points more than a random candidate, {low:g} to {high:g} % kept.",
    ]


def reading(results: Sequence[SeedResult]) -> list[str]:
    """Draws the conclusions, in sentences that the numbers choose."""
    arms, lines = results[0].arms.keys(), []
    for name in results[0].kept:
        kept = [result.kept[name] for result in results]
        passed = f"{sum(entry.passes for entry in kept)} of {len(kept)} seeds"
        lines.append(
            f"- Gate for `{name}`: {'holds' if all(entry.passes for entry in kept) else 'does not hold'} ({passed})."
        )
    curated = [arm for arm in arms if arm.startswith("curated")]
    for arm in curated if EQUAL in arms else ():
        gain = difference(results, EQUAL, arm)
        lines.append(f"- Goal for `{arm}`: {show(gain)} points of digits against {EQUAL}: {verdict(gain)}.")
    if EQUAL in arms and len(curated) > 1:
        chance = 100 * (1 - (1 - (1 - CONFIDENCE) / 2) ** len(curated))
        lines.append(
            f"- These are {len(curated)} intervals: were none of the arms better, in up to {chance:.0f} % of such"
            " experiments one of them would still lie above zero."
        )
    for arm in curated if UNCURATED in arms else ():
        gain = difference(results, UNCURATED, arm)
        lines.append(f"- `{arm}` against {UNCURATED}: {show(gain)}: what the selection itself brings: {verdict(gain)}.")
    for arm, meaning in ((LONG, "what more steps on the labels alone bring"), ("oracle", "what the truth would bring")):
        if {arm, BASE} <= arms:
            lines.append(f"- `{arm}` against {BASE}: {show(difference(results, BASE, arm))} points: {meaning}.")
    return lines


def verdict(gain: Difference) -> str:
    """Words the statement that an interval allows."""
    if gain.half != gain.half:
        return "one seed says nothing"
    if gain.is_above_zero:
        return "it helps"
    return "it harms" if gain.mean + gain.half < 0 else "no difference is shown"


def difference(results: Sequence[SeedResult], first: str, second: str) -> Difference:
    """Digit accuracy of the second arm minus that of the first."""
    return paired([result.arms[first].digit for result in results], [result.arms[second].digit for result in results])


def show(value: Difference) -> str:
    """A difference with its interval."""
    return f"{value.mean:+.1f}" + (f" ± {value.half:.1f}" if value.half == value.half else "")


def _average(rows: Sequence[Kept] | Sequence[Scores], field: str) -> float:
    return sum(float(vars(row)[field]) for row in rows) / len(rows)
