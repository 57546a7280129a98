"""Counts the items that went in, were dropped, and came out; refuses a result of too few.

In: what became of every item   Out: funnel.json, a table for people, StarvedFunnel   Next: tools/curate.py
in = dropped + kept, in all and for each task. No path stands in it: equal inputs give equal bytes wherever they lie.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from rich.table import Table
from rich.text import Text

from sicog_mcore.cognition.curation.filters import Drop, FilterStage
from sicog_mcore.cognition.records import Task
from sicog_mcore.errors import DataError, printable

FORMAT = 1
TASKS: tuple[Task, ...] = get_args(Task)
STAGES: tuple[FilterStage, ...] = get_args(FilterStage)


@dataclass
class Funnel:
    """Counts of one curation.

    Attributes:
        items: by task.
        dropped: by stage, reason and task.
        rows: training rows by form.
        text: rows of text by what became of them: "kept", "mix", or the loader's reason.
        pairs: items kept by what became of their pair: "written", or a reason of find_rejected.
        length_ratios: sum over pairs of the logarithm of chosen over rejected tokens.
        evaluation: evaluation images, and those of them known by their bytes alone.
        settings, inputs: on which the result depends: all options; hashes of the files.
    """

    items: Counter[Task] = field(default_factory=Counter)
    dropped: Counter[tuple[FilterStage, str, Task]] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    text: Counter[str] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)
    length_ratios: float = 0.0
    evaluation: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def count(self, task: Task, drop: Drop | None) -> None:
        """Counts one item."""
        self.items[task] += 1
        if drop:
            self.dropped[drop.stage, drop.reason, task] += 1

    def kept(self, task: Task) -> int:
        return self.items[task] - sum(count for (_, _, of), count in self.dropped.items() if of == task)

    @property
    def share(self) -> float:
        """Share of items that passed every filter; what the mix left out has passed."""
        failed = sum(count for (stage, _, _), count in self.dropped.items() if stage != "mix")
        return 1 - failed / self.items.total() if self.items else 0.0

    def steps(self) -> list[tuple[FilterStage, str, Mapping[Task, int]]]:
        """Stage, reason and number of dropped items by task, in the order of the filters."""
        # One row for each reason, whatever the tasks it met.
        keys = {(stage, reason) for stage, reason, _ in self.dropped}
        order = sorted(keys, key=lambda key: (STAGES.index(key[0]), key[1]))
        return [(stage, reason, {task: self.dropped[stage, reason, task] for task in TASKS}) for stage, reason in order]

    def to_json(self) -> str:
        """Gives the content of funnel.json."""
        steps = [
            {"stage": stage, "reason": reason, "count": sum(counts.values()), **counts}
            for stage, reason, counts in self.steps()
        ]
        written = self.pairs["written"]
        value = {
            "format": FORMAT,
            "in": self.items.total(),
            "dropped": steps,
            "kept": sum(self.kept(task) for task in TASKS),
            "share": round(self.share, 6),
            "tasks": {task: {"in": self.items[task], "kept": self.kept(task)} for task in TASKS},
            "rows": dict(sorted(self.rows.items())),
            "text": dict(sorted(self.text.items())),
            "pairs": dict(sorted(self.pairs.items())),
            "mean_log_length_ratio": round(self.length_ratios / written, 4) if written else 0.0,
            "evaluation_images": dict(self.evaluation),
            "settings": dict(self.settings),
            "inputs": dict(self.inputs),
        }
        return json.dumps(value, ensure_ascii=False, indent=1) + "\n"

    def table(self) -> Table:
        """Lays the counts out as a table for people."""
        table = Table(title="Funnel", title_justify="left")
        for column in ("stage", "reason"):
            table.add_column(column)
        for column in (*TASKS, "all", "left"):
            table.add_column(column, justify="right")
        left = self.items.total()
        counts = [self.items[task] for task in TASKS]
        table.add_row("in", "", *map(str, counts), str(left), str(left), end_section=True)
        for stage, reason, dropped in self.steps():
            left -= sum(dropped.values())
            counts = [-dropped[task] for task in TASKS]
            table.add_row(
                stage, Text(printable(reason)), *(str(count or "") for count in counts), str(sum(counts)), str(left)
            )
        table.add_section()
        table.add_row("kept", f"{self.share:.1%} agreed", *(str(self.kept(task)) for task in TASKS), str(left), "")
        return table


class StarvedFunnel(DataError):
    """Too little came out, or suspiciously much; nothing was written."""

    def __init__(self, funnel: Funnel, problem: str) -> None:
        super().__init__(problem)
        self.funnel = funnel
