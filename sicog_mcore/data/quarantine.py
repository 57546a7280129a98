"""The quarantine of bad rows: each is written down with its reason, and too large a share of them ends the run.

In: Rejection   Out: a line of quarantine.jsonl, counts, the verdict   Next: loader.py, train/feed.py, train/metrics.py
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sicog_mcore.files import append_lines

REASONS_SHOWN = 3
# Before the end of a pass the share of a part is judged, and chance alone must not end a run.
DEVIATIONS, FEWEST_BAD = 5, 10
ROUNDING = 1e-9  # 0.29 * 100 is a little less than 29


@dataclass(frozen=True)
class Rejection:
    """One sample that is left out, and why.

    Attributes:
        id: the sample's id; its row number where the row could not be read.
        origin: ``file:line`` or ``shard.tar:key``.
        reason: stable code of the SampleError.
        detail: what was found, expected, and the remedy.
        epoch: pass over the data in which it was met.
    """

    id: str
    origin: str
    reason: str
    detail: str
    epoch: int


@dataclass
class _Reason:
    """The number of rows with one reason, and the first of them."""

    count: int
    origin: str
    detail: str


@dataclass
class _Pass:
    """One pass over the data, as far as it has come.

    Attributes:
        rows: of the whole pass.
        seen: of these so far.
        bad: among them.
        recent: (rows, bad) of the windows seen last, the newest last.
        reasons: by code.
    """

    rows: int
    seen: int = 0
    bad: int = 0
    recent: dict[int, list[int]] = field(default_factory=dict)
    reasons: dict[str, _Reason] = field(default_factory=dict)


class BadRows:
    """The share of bad rows in every pass that is under way, held against the limit; a row counts once in a pass.

    Two shares have a limit. That of the whole set: the run stops as soon as more rows are bad than the set may have,
    however many are still to come. And, where the set has more than ``bad_window`` rows, that of the last ``bad_window``
    ones (at least one packing window): the run stops if it is above the limit by more than chance explains, so that a
    set of millions whose first rows are all bad is not read to its end.

    Args:
        max_bad_rate: largest share of bad rows.
        bad_window: rows of the running share.
        saved: ``state`` of the run that goes on.
    """

    def __init__(self, max_bad_rate: float, bad_window: int, saved: Sequence[Mapping[str, Any]] = ()) -> None:
        self._max_bad_rate = max_bad_rate
        self._bad_window = bad_window
        self._passes: dict[int, _Pass] = {}
        for one in saved:
            recent = {window: [rows, bad] for window, rows, bad in one["recent"]}
            reasons = {code: _Reason(*reason) for code, *reason in one["reasons"]}
            self._passes[one["epoch"]] = _Pass(one["rows"], one["seen"], one["bad"], recent, reasons)

    def enter(self, epoch: int, window: int, window_rows: int, num_rows: int, found: Iterable[Rejection]) -> None:
        """Counts the rows of a packing window, and those that planning found bad.

        Args:
            window_rows: rows of the window.
            num_rows: rows of the whole pass.
        """
        one = self._passes.setdefault(epoch, _Pass(num_rows))
        one.seen += window_rows
        # Windows enter in order, so the oldest is the first key; one always stays, even if it is larger than
        # ``bad_window``.
        one.recent[window] = [window_rows, 0]
        rows = sum(rows for rows, _ in one.recent.values())
        while rows > self._bad_window and len(one.recent) > 1:
            rows -= one.recent.pop(next(iter(one.recent)))[0]
        for rejection in found:
            self.add(epoch, window, rejection)

    def add(self, epoch: int, window: int, rejection: Rejection) -> None:
        """Counts a row of a window that was entered, bad as decoding found out."""
        one = self._passes.get(epoch)
        if one is None:
            return  # that pass is over, and was judged
        one.bad += 1
        # A row may be found bad long after planning; a window that has left the running share no longer counts there.
        if window in one.recent:
            one.recent[window][1] += 1
        reason = one.reasons.setdefault(rejection.reason, _Reason(0, rejection.origin, rejection.detail))
        reason.count += 1

    def forget_before(self, epoch: int) -> None:
        """Leaves out the passes before ``epoch``; every one of them was judged."""
        self._passes = {number: one for number, one in self._passes.items() if number >= epoch}

    def verdict(self) -> str:
        """Says why the run has to stop: counts, shares, limits, reasons with their first place; empty if it may go on."""
        for epoch, one in self._passes.items():
            if found := self._judge(epoch, one):
                return "\n".join([found, *_reason_lines(one.reasons)])
        return ""

    def state(self) -> list[dict[str, Any]]:
        """Plain values, for a checkpoint."""
        return [
            {
                "epoch": epoch,
                "rows": one.rows,
                "seen": one.seen,
                "bad": one.bad,
                "recent": [[window, *counts] for window, counts in one.recent.items()],
                "reasons": [[code, *asdict(reason).values()] for code, reason in one.reasons.items()],
            }
            for epoch, one in self._passes.items()
        ]

    def _judge(self, epoch: int, one: _Pass) -> str:
        limit = self._max_bad_rate
        told = f"limit {limit:.4g} (data.max_bad_rate)"
        allowed = limit * one.rows
        # Certain: the bad rows so far exceed what the whole set may have, so reading on changes nothing.
        if one.bad > allowed * (1 + ROUNDING):
            found = f"{one.bad:,} of {one.seen:,} rows are bad, a share of {one.bad / one.seen:.4g}, in epoch {epoch}"
            return f"{found}; {told}: at most {math.floor(allowed * (1 + ROUNDING)):,} of the set's {one.rows:,} rows"
        if one.rows <= self._bad_window:
            return ""
        rows, bad = (sum(column) for column in zip(*one.recent.values(), strict=True))
        # Likely: a data set just at the limit exceeds this count, five standard deviations above the mean, all but
        # never. A few bad rows are no sample.
        chance = rows * limit + DEVIATIONS * math.sqrt(rows * limit * (1 - limit))
        if bad < FEWEST_BAD or bad <= chance:
            return ""
        found = f"{bad:,} of the last {rows:,} rows are bad, a share of {bad / rows:.4g}, in epoch {epoch}"
        return (
            f"{found}; {told}, in a window of {self._bad_window:,} rows (data.bad_window): chance explains {chance:.0f}"
        )


def _reason_lines(reasons: Mapping[str, _Reason]) -> list[str]:
    most = sorted(reasons.items(), key=lambda item: -item[1].count)
    lines = [
        f"  - {one.count:,} x {code}, first met at {one.origin}: {one.detail}" for code, one in most[:REASONS_SHOWN]
    ]
    if more := most[REASONS_SHOWN:]:
        lines.append(f"  - {', '.join(f'{one.count:,} x {code}' for code, one in more)}")
    return lines


class Quarantine:
    """Keeps the report of one replica: its share of the bad rows, by reason.

    Args:
        path: report, one JSON line per rejection; lines are appended.
        max_bad_rate: largest share of bad rows.
        bad_window: rows of the running share.
        saved: ``BadRows.state`` of the run that goes on.
        shown: what messages call the reports of all replicas; empty if this is the only one.
    """

    def __init__(
        self,
        path: Path,
        max_bad_rate: float,
        bad_window: int,
        saved: Sequence[Mapping[str, Any]] = (),
        shown: str = "",
    ) -> None:
        self._path = path
        self._shown = shown or str(path)
        self._limits = (max_bad_rate, bad_window, saved)
        self.reasons: Counter[str] = Counter()
        self.num_truncated = 0

    def count_rows(self) -> BadRows:
        """The share of bad rows, over all replicas, as far as it was known when the run started."""
        return BadRows(*self._limits)

    @property
    def num_bad(self) -> int:
        """Samples rejected since the run started."""
        return self.reasons.total()

    def record(self, rejection: Rejection) -> None:
        """Writes a bad sample down."""
        append_lines(self._path, [json.dumps(asdict(rejection), ensure_ascii=False)])
        self.reasons[rejection.reason] += 1

    def count_truncated(self, num_samples: int) -> None:
        """Counts samples that lost the end of their answer; they are good samples otherwise."""
        self.num_truncated += num_samples

    def summary(self) -> str:
        """The most frequent reasons so far, and where all of them are listed."""
        reasons = ", ".join(f"{number} x {reason}" for reason, number in self.reasons.most_common(REASONS_SHOWN))
        return f"{reasons or 'no row'}; all are listed in {self._shown}"

    def advice(self) -> str:
        """Says what to do about too many bad rows."""
        return f"all are listed in {self._shown}; repair the data or raise data.max_bad_rate"
