"""Bad samples: each written down with its reason, all counted, and the run stopped when there are too many.

In: Rejection   Out: a line of quarantine.jsonl, counts; DataError   Next: loader.py, train/metrics.py
"""

from __future__ import annotations

import json
from collections import Counter, deque
from dataclasses import asdict, dataclass
from pathlib import Path

from sicog_mcore.errors import DataError, writing

REASONS_SHOWN = 3


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


class Quarantine:
    """Keeps the report, and the rate of bad samples among the last ones.

    Args:
        path: report, one JSON line per rejection; lines are appended.
        max_bad_rate: share of bad samples in the window at which the run stops.
        bad_window: samples in the window, good and bad.
    """

    def __init__(self, path: Path, max_bad_rate: float, bad_window: int) -> None:
        self._path = path
        self._max_bad_rate = max_bad_rate
        self._outcomes: deque[Rejection | None] = deque(maxlen=bad_window)  # None is a good sample
        self._bad_in_window = 0
        self._allowed_bad = max_bad_rate * bad_window
        self.reasons: Counter[str] = Counter()
        self.num_truncated = 0

    @property
    def num_bad(self) -> int:
        """Samples rejected since the run started."""
        return self.reasons.total()

    def record(self, rejection: Rejection) -> None:
        """Writes a bad sample down.

        Raises:
            DataError: there are too many of them now.
        """
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a", encoding="utf-8") as report:  # closed, so flushed, after every line
                report.write(json.dumps(asdict(rejection), ensure_ascii=False) + "\n")
        self.reasons[rejection.reason] += 1
        self._add(rejection)
        if self._bad_in_window > self._allowed_bad:
            raise DataError(self._describe())

    def accept(self, num_samples: int) -> None:
        """Counts good samples."""
        for _ in range(num_samples):
            self._add(None)

    def count_truncated(self, num_samples: int) -> None:
        """Counts samples that lost the end of their answer; they are good samples otherwise."""
        self.num_truncated += num_samples

    def summary(self) -> str:
        """The most frequent reasons so far, and where all of them are listed."""
        reasons = ", ".join(f"{number} x {reason}" for reason, number in self.reasons.most_common(REASONS_SHOWN))
        return f"{reasons or 'no row'}; all are listed in {self._path}"

    def _add(self, outcome: Rejection | None) -> None:
        if len(self._outcomes) == self._outcomes.maxlen and self._outcomes[0] is not None:
            self._bad_in_window -= 1  # falls out of the window
        self._outcomes.append(outcome)
        self._bad_in_window += outcome is not None

    def _describe(self) -> str:
        bad = [outcome for outcome in self._outcomes if outcome is not None]
        latest = {rejection.reason: rejection for rejection in bad}
        lines = [
            f"{len(bad)} of the last {len(self._outcomes)} samples are bad, "
            f"at most {self._allowed_bad:g} of {self._outcomes.maxlen} are allowed:"
        ]
        for reason, number in Counter(rejection.reason for rejection in bad).most_common(REASONS_SHOWN):
            lines.append(f"  - {number} x {reason}, for example {latest[reason].origin}: {latest[reason].detail}")
        lines.append(
            f"all are listed in {self._path}; repair the data or raise data.max_bad_rate ({self._max_bad_rate:g})"
        )
        return "\n".join(lines)
