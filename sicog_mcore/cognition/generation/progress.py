"""How far a generation run is: a bar on a terminal, a line now and then elsewhere.

In: counters of one replica of the model   Out: text   Used by: generate.py
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console as Screen
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from sicog_mcore.errors import printable
from sicog_mcore.rollout.requests import Counters
from sicog_mcore.train.console import duration_text

LINE_EVERY_S = 30.0


class GenerationProgress:
    """The screen of a run; only the main rank speaks.

    Args:
        total: items that this replica has to do.
        replicas: of the model; all are taken to be as fast as this one.
        gpus: of the whole run.
        price: per GPU and hour; 0 for unknown.
    """

    def __init__(
        self, speaks: bool, total: int, replicas: int, gpus: int, price: float, screen: Screen | None = None
    ) -> None:
        self._speaks, self._total, self._replicas, self._gpus, self._price = speaks, total, replicas, gpus, price
        self._screen = screen or Screen(highlight=False)
        self._start = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def notice(self, text: str) -> None:
        if self._speaks:
            self._screen.print(Text(printable(text)), soft_wrap=not self._screen.is_terminal)

    def restart(self) -> None:
        """The clock of speeds and estimates starts now, after the model is loaded."""
        self._start = self._last_line = time.monotonic()

    def update(self, done: int, counters: Counters) -> None:
        """Shows where the run is after ``done`` items of this replica."""
        if not self._speaks:
            return
        text = progress_text(done, self._total, self.seconds, counters, self._replicas)
        eta_s = self.seconds / max(1, done) * (self._total - done)
        if self._price:
            text += f" | cost {self.cost(self.seconds):.2f} of about {self.cost(self.seconds + eta_s):.2f}"
        if self._screen.is_terminal:
            self._move_bar(done, text)
        elif done == self._total or time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            self.notice(text)

    def cost(self, seconds: float) -> float:
        return seconds / 3600 * self._gpus * self._price

    def finish(self, lines: Sequence[str]) -> None:
        self.close()
        for line in lines:
            self.notice(line)

    def close(self) -> None:
        """Takes the bar off; safe to call twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _move_bar(self, done: int, text: str) -> None:
        if self._bar is None:
            columns = (BarColumn(bar_width=None), TextColumn("{task.fields[text]}", markup=False))
            self._bar = Progress(*columns, console=self._screen, expand=True)
            self._task = self._bar.add_task("", total=self._total, text=text)
            self._bar.start()
        self._bar.update(self._task, completed=done, text=text)


def progress_text(done: int, total: int, seconds: float, counters: Counters, replicas: int) -> str:
    """One line: items, tokens, speed, time left; of this replica where there are several."""
    eta_s = seconds / max(1, done) * (total - done)
    speed = counters.decode_tokens / max(seconds, 1e-9)
    each = f" (one of {replicas} copies)" if replicas > 1 else ""
    return (
        f"items {done:,}/{total:,}{each} | read {counters.prefill_tokens:,} tokens, {counters.slices:,} slices"
        f" | drawn {counters.decode_tokens:,} tokens, {speed:,.0f}/s | ETA {duration_text(eta_s)}"
    )
