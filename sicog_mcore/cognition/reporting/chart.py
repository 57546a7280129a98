"""Lays out a histogram of agreement in pixels.

In: bars, thresholds   Out: Chart   Next: report.html.j2, which draws it
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sicog_mcore.cognition.reporting.overview import Bar, Threshold

WIDTH, HEIGHT = 560, 200
LEFT, RIGHT, TOP, BOTTOM = 40, 548, 26, 174  # of the plot
GAP = 1.5  # between bars


@dataclass(frozen=True)
class Column:
    """A bar with its parts, the kept items at the bottom (px)."""

    bar: Bar
    x: float
    width: float
    kept_y: float
    kept_height: float
    dropped_y: float
    dropped_height: float


@dataclass(frozen=True)
class Mark:
    """A labelled place on the axis (px)."""

    x: float
    label: str
    is_used: bool = False


@dataclass(frozen=True)
class Chart:
    """All parts of the drawing, in the pixels of a WIDTH x HEIGHT picture."""

    columns: tuple[Column, ...]
    ticks: tuple[Mark, ...]
    thresholds: tuple[Mark, ...]
    highest: int
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT
    top: int = TOP
    floor: int = BOTTOM


def lay_out_chart(bars: Sequence[Bar], thresholds: Sequence[Threshold]) -> Chart:
    """Places bars, ticks at every tenth, and the thresholds that lie in the range of the bars."""
    low = bars[0].low
    highest = max(bar.kept + bar.dropped for bar in bars)
    per_item = (BOTTOM - TOP) / max(highest, 1)

    def place(value: float) -> float:
        return round(LEFT + (value - low) / (1 - low) * (RIGHT - LEFT), 2)

    columns = []
    for bar in bars:
        if not bar.kept + bar.dropped:
            continue
        kept, dropped = bar.kept * per_item, bar.dropped * per_item
        columns.append(
            Column(
                bar=bar,
                x=round(place(bar.low) + GAP / 2, 2),
                width=round(place(bar.high) - place(bar.low) - GAP, 2),
                kept_y=round(BOTTOM - kept, 2),
                kept_height=round(kept, 2),
                dropped_y=round(BOTTOM - kept - dropped, 2),
                dropped_height=round(dropped, 2),
            )
        )
    # The small term keeps 0.3 * 10, which is a little more than 3, from losing its tick.
    ticks = [tick / 10 for tick in range(math.ceil(low * 10 - 1e-9), 11)]
    return Chart(
        columns=tuple(columns),
        ticks=tuple(Mark(place(tick), f"{tick:.1f}") for tick in ticks),
        thresholds=tuple(Mark(place(t.value), f"{t.value:g}", t.is_used) for t in thresholds if t.value >= low),
        highest=highest,
    )
