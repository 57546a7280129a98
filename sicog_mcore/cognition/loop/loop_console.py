"""The loop for people: plan and ledger as tables, and the line that says what is happening.

In: Planned steps, their build records   Out: text
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sicog_mcore.cognition.loop.steps import Planned, State, WorkflowStep
from sicog_mcore.errors import printable
from sicog_mcore.train.console import duration_text

LINE_EVERY_S = 60.0
STATES: Mapping[State, str] = {"done": "done", "run": "will run", "open": "may run"}


class LiveLine:
    """One line that moves on a terminal; elsewhere a line now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def follow(self, title: str) -> Iterator[Callable[[str], None]]:
        """Yields a function that shows its text behind title and time."""
        start = said = time.monotonic()
        self.say(f"{title} ...")

        def show(text: str) -> None:
            nonlocal said
            now = time.monotonic()
            line = f"{title}  {duration_text(now - start)}  {text}"
            if status:
                status.update(Text(printable(line)[: self._console.width - 4], no_wrap=True))
            elif now - said >= LINE_EVERY_S:
                said = now
                self.say(line)

        status = self._console.status(Text(printable(title))) if self._console.is_terminal else None
        if status is None:
            yield show
            return
        with status:
            yield show

    def finished(self, title: str, seconds: float, last: str) -> None:
        self.say(f"{title}  {duration_text(seconds)}  {last}")

    def failed(self, title: str, exit_code: int, seconds: float, lines: Sequence[str], log: Path) -> None:
        """The last lines of a step, and where to find the others."""
        for line in lines:
            self.say(f"  | {line}")
        self.say(f"{title} failed with exit code {exit_code} after {duration_text(seconds)}; its log: {log}")

    def say(self, text: str) -> None:
        """Prints a line as it is."""
        self._console.print(Text(printable(text)), soft_wrap=not self._console.is_terminal)


def plan_table(planned: Sequence[Planned]) -> Table:
    """Renders the plan as a table: one row tells what will happen to each step."""
    table = Table(title="Plan", title_justify="left")
    for column in ("step", "state", "size", "took", "needs"):
        table.add_column(column, overflow="fold")
    for entry in planned:
        step, record = entry.step, entry.record
        state = f"{STATES[entry.state]}{f': {entry.why}' if entry.why else ''}"
        took = duration_text(record.seconds) if record and record.seconds else ""
        words = (step.name, state, step.size, took, ", ".join(step.needs))
        table.add_row(*(Text(printable(word)) for word in words))
    return table


def plan_commands(planned: Sequence[Planned], command: Callable[[WorkflowStep], list[str]]) -> list[str]:
    """The commands themselves, as a shell takes them."""
    return [line for entry in planned for line in (f"# {entry.step.name}", shlex.join(command(entry.step)))]


def plan_summary(planned: Sequence[Planned]) -> str:
    """The plan in a line."""
    counts = {state: sum(entry.state == state for entry in planned) for state in STATES}
    known = sum(entry.record.seconds for entry in planned if entry.state == "run" and entry.record)
    text = ", ".join(f"{count} {STATES[state]}" for state, count in counts.items() if count)
    return f"{len(planned)} steps: {text}" + (f"; last time those took {duration_text(known)}" if known else "")


def ledger_rows(planned: Sequence[Planned]) -> list[dict[str, Any]]:
    """Lists the cost that each finished step had, as values of JSON."""
    return [
        {
            "step": entry.step.name,
            "seconds": entry.record.seconds,
            "tokens": entry.record.tokens,
            "device_seconds": entry.record.device_seconds,
        }
        for entry in planned
        if entry.record and entry.record.is_finished
    ]


def ledger_table(rows: Sequence[dict[str, Any]], device: str) -> Table:
    """Lays the ledger's rows out as a table for people, with sums.

    Args:
        device: what a device-second is counted of, e.g. "GPU".
    """
    table = Table(title="Ledger", title_justify="left", show_footer=True)
    table.add_column("step", "all steps")
    for column, name in (("time", "seconds"), ("tokens", "tokens"), (f"{device}-seconds", "device_seconds")):
        total = sum(row[name] for row in rows)
        table.add_column(column, duration_text(total) if name == "seconds" else f"{total:,.0f}", justify="right")
    for row in rows:
        tokens, devices = (f"{row[name]:,.0f}" if row[name] else "" for name in ("tokens", "device_seconds"))
        table.add_row(Text(printable(row["step"])), duration_text(row["seconds"]), tokens, devices)
    return table


def comparison_line(name: str, entries: Sequence[dict[str, Any]]) -> str:
    """Whether it helped: the first entry of a comparison, which is over all items."""
    entry = entries[0]
    low, high = entry["low"], entry["high"]
    verdict = "better" if low > 0 else "worse" if high < 0 else "no difference that this many items could show"
    interval = f"95 % interval {low:+.4f} to {high:+.4f}"
    means = f"{entry['metric']} {entry['before']:.4f} -> {entry['after']:.4f}"
    return (
        f"{name}: {means} against the baseline, {entry['difference']:+.4f}, {interval}, {entry['n']} items: {verdict}"
    )
