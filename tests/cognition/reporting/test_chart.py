"""Bars and thresholds stand where their agreement is."""

from __future__ import annotations

from sicog_mcore.cognition.reporting.chart import BOTTOM, LEFT, RIGHT, TOP, Mark, lay_out_chart
from sicog_mcore.cognition.reporting.overview import Bar, Threshold

BARS = [Bar(0.5, 0.75, kept=0, dropped=0), Bar(0.75, 1.0, kept=3, dropped=1)]
WIDTH = RIGHT - LEFT


def threshold(value: float, *, used: bool = False) -> Threshold:
    return Threshold(value, used, 0, 0.0, None)


def test_thresholds_stand_at_their_share_of_the_axis() -> None:
    chart = lay_out_chart(BARS, [threshold(0.4), threshold(0.5), threshold(0.75, used=True), threshold(1.0)])
    middle = LEFT + WIDTH / 2
    assert chart.thresholds == (Mark(LEFT, "0.5"), Mark(middle, "0.75", is_used=True), Mark(RIGHT, "1"))
    assert [mark.label for mark in chart.ticks] == ["0.5", "0.6", "0.7", "0.8", "0.9", "1.0"]


def test_the_highest_bar_fills_the_plot_with_what_was_kept_below() -> None:
    (column,) = lay_out_chart(BARS, []).columns
    assert column.dropped_y == TOP and column.dropped_height == (BOTTOM - TOP) / 4
    assert column.kept_y + column.kept_height == BOTTOM and column.kept_y == TOP + column.dropped_height
