"""A generation run shows counts, speed, time left and cost while it works, by the main rank alone."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sicog_mcore.cognition.generation import progress
from sicog_mcore.cognition.generation.progress import GenerationProgress, progress_text
from sicog_mcore.rollout.requests import Counters

COUNTERS = Counters(items=25, prefill_tokens=12_000, decode_tokens=5_000, slices=75)


def test_a_line_counts_what_is_done_and_left() -> None:
    line = progress_text(25, 100, 50.0, COUNTERS, replicas=1)
    assert line == (
        "items 25/100 | read 12,000 tokens, 75 slices | drawn 5,000 tokens, 100/s | ETA 0:02:30"  # 75 items at 2 s
    )
    assert progress_text(25, 100, 50.0, COUNTERS, replicas=4).startswith("items 25/100 (one of 4 copies) |")


def test_lines_come_now_and_then_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    said = io.StringIO()
    run = GenerationProgress(True, 4, 1, 8, 3.0, Console(file=said, width=300))
    for done in (1, 2, 3, 4):
        clock[0] += 20.0
        run.update(done, COUNTERS)
    lines = said.getvalue().splitlines()
    assert [line.split(" |")[0] for line in lines] == ["items 2/4", "items 4/4"]
    assert lines[0].endswith("| cost 0.27 of about 0.53")  # 40 of 80 s on 8 GPUs at 3 an hour
    assert run.cost(3600) == 24.0


def test_other_ranks_are_silent_and_escape_sequences_are_shown() -> None:
    said = io.StringIO()
    screen = Console(file=said, width=300)
    silent = GenerationProgress(False, 1, 2, 1, 0.0, screen)
    silent.update(1, COUNTERS)
    silent.finish(["no"])
    assert said.getvalue() == ""
    GenerationProgress(True, 1, 1, 1, 0.0, screen).finish(["\x1b[31m[bold]red"])
    assert said.getvalue() == "\\x1b[31m[bold]red\n"
