"""The ledger of an annotator: its calls, its answers and their cost, in one file that only grows.

In: calls begun and ended   Out: JSON lines; which items are done; tokens and costs   Next: annotator.py
A call is written down before it starts and again when it ends, so one that a kill cut off is known and counted as paid at
its upper bound. A half-written last line is dropped when the file is opened; every other damage is an error.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from sicog_mcore.errors import RecordError, SicogError
from sicog_mcore.files import LineFile, cut_torn_line, disk_faults, made_folder

FORMAT = 1
CallOutcome = Literal["answer", "refused", "fault"]


@dataclass(frozen=True)
class Call:
    """One question to the endpoint, and how it ended.

    Attributes:
        outcome: "answer" can be used; "refused" was answered, but not usably; "fault" brought no answer.
        reason: of a refusal or fault.
        final: the item needs no further call: it has its answer, or it failed.
        text: what the annotator wrote.
        cost: price in USD; None where the endpoint may ask for one and did not tell how many tokens.
    """

    outcome: CallOutcome
    reason: str = ""
    detail: str = ""
    final: bool = False
    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: Decimal | None = Decimal(0)


@dataclass
class Totals:
    """Sums over all calls of a ledger.

    Attributes:
        calls: by outcome, and "cut_off" for those without one.
        cost: USD, of all calls whose price is known.
        unpriced: calls whose price is not known.
        at_most: USD that the unpriced calls can have cost.
    """

    calls: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    priced_answers: int = 0
    cost: Decimal = Decimal(0)
    unpriced: int = 0
    at_most: Decimal = Decimal(0)


class Ledger:
    """The ledger's file, and the sums over its lines. Only one process can have it open.

    Args:
        path: file; made if it does not exist.
        settings: those that the answers depend on; a ledger that was begun with others is refused.

    Raises:
        RecordError: a damaged line, other settings, or another process that writes.
        MachineError: here and in ``begin`` and ``end``: the disk is full or broken.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.totals = Totals()
        self._path = path
        self._finals: dict[str, Call] = {}
        self._costs: dict[str, Decimal] = {}
        self._begun: dict[int, tuple[str, Decimal]] = {}  # calls without an end: their item, and their price at most
        self._next = 0
        with disk_faults(path), made_folder(path.parent):
            self._file = LineFile(path)
            try:
                self._lock()
                self._load({"format": FORMAT} | dict(settings))
            except BaseException:
                with suppress(SicogError):  # it has been said
                    self._file.close()
                # A file that was made just now, and holds nothing, goes again.
                if not path.stat().st_size:
                    path.unlink()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def committed(self) -> Decimal:
        """USD that are spent at most: known prices, and the bounds of all other calls, those under way among them."""
        return (
            self.totals.cost + self.totals.at_most + sum((at_most for _, at_most in self._begun.values()), Decimal(0))
        )

    def begin(self, item: str, at_most: Decimal) -> int:
        """Writes down that a call starts; returns its number."""
        number = self._next
        # Not synced: a killed process loses nothing that it has written, and the end of the call is synced anyway.
        self._write({"call": number, "item": item, "at_most": str(at_most)})
        self._start(number, item, at_most)
        return number

    def end(self, number: int, call: Call) -> None:
        """Writes down how a call ended; when this returns it is on disk."""
        cost = None if call.cost is None else str(call.cost)
        self._write({"call": number} | asdict(call) | {"cost": cost}, is_synced=True)
        self._finish(number, call)

    def final(self, item: str) -> Call | None:
        """The call that settled an item."""
        return self._finals.get(item)

    def cost(self, item: str) -> Decimal:
        """USD of all calls of an item whose price is known."""
        return self._costs.get(item, Decimal(0))

    def cut_off(self) -> int:
        """Calls that were begun and have no end: under way now, or killed."""
        return len(self._begun)

    def _lock(self) -> None:
        try:
            # The kernel takes this lock back however the process ends, so no stale one is left.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RecordError(
                f"{self._path}: another process writes it; wait for it, or choose another folder"
            ) from error

    def _load(self, settings: dict[str, Any]) -> None:
        # A line without its end was being written when the process was killed: its call stays without an end, and so
        # counts at its bound.
        cut_torn_line(self._path)
        lines = self._path.read_bytes().split(b"\n")[:-1]
        for number, line in enumerate(lines, 1):
            try:
                # Lines go through the same two functions as live calls, so sums after a restart are those before it.
                self._replay(json.loads(line), settings, first=number == 1)
            except (ValueError, KeyError, TypeError, ArithmeticError) as error:
                found = f"{self._path}:{number}: {line[:60]!r} is no line of a ledger ({error!r})"
                raise RecordError(f"{found}; restore the file, or move it away and pay again") from error
        if not lines:
            self._write(settings)

    def _replay(self, row: dict[str, Any], settings: dict[str, Any], first: bool) -> None:
        if first:
            if row != settings:
                odd = sorted(name for name in row.keys() | settings.keys() if row.get(name) != settings.get(name))
                found = ", ".join(f"{name} {row.get(name)!r} (now {settings.get(name)!r})" for name in odd)
                raise RecordError(f"{self._path} was begun with {found:.500}; use the same, or another folder")
            return
        number = row.pop("call")
        if "at_most" in row:
            self._start(number, row["item"], Decimal(row["at_most"]))
            return
        cost = row.pop("cost")
        self._finish(number, Call(**row, cost=None if cost is None else Decimal(cost)))

    def _start(self, number: int, item: str, at_most: Decimal) -> None:
        self._begun[number] = (item, at_most)
        self._next = number + 1

    def _finish(self, number: int, call: Call) -> None:
        item, at_most = self._begun.pop(number)
        totals = self.totals
        totals.calls[call.outcome] = totals.calls.get(call.outcome, 0) + 1
        totals.prompt_tokens += call.prompt_tokens
        totals.completion_tokens += call.completion_tokens
        if call.cost is None:
            # The endpoint may have charged up to the bound that was written when the call began.
            totals.unpriced += 1
            totals.at_most += at_most
        else:
            totals.cost += call.cost
            totals.priced_answers += call.outcome != "fault"
            self._costs[item] = self.cost(item) + call.cost
        if call.final:
            self._finals[item] = call

    def _write(self, row: Mapping[str, Any], is_synced: bool = False) -> None:
        self._file.append(json.dumps(row), is_synced)
