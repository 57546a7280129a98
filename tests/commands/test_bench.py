"""`sicog bench data` prints both planners' figures and writes them as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from sicog_mcore.commands.bench import MixName
from sicog_mcore.commands.front import main
from sicog_mcore.data.stream_bench import MIXES, PLANNERS


def test_every_mix_can_be_named() -> None:
    assert get_args(MixName) == tuple(MIXES)


def test_figures_are_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    words = ["bench", "data", "--mixes", "recap", "--rows", "4096", "--repeats", "1", "--out", str(out)]
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("recap  windows ")
    before, now = json.loads(out.read_text())
    assert (before["planner"], now["planner"]) == tuple(PLANNERS)
    assert now["fill"] >= 0.99 > before["fill"]


def test_a_budget_that_no_row_fits_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "data", "--mixes", "cod", "--rows", "100", "--token-budget", "100"]
    assert main(words) != 0
    assert capsys.readouterr().err == (
        "bench data: no row of the mix 'cod' fits into 100 tokens; raise the token budget\n"
    )


def test_numbers_below_one_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "data", "--rows", "0"])
    assert caught.value.code == 2 and "each must be at least 1" in capsys.readouterr().err


def test_figures_that_too_few_packs_cannot_give_are_not_shown_as_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "data", "--mixes", "sft", "--rows", "50", "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    assert "slowest replica / mean: 32 x 1 (too few packs)" in printed and "0.0000" not in printed
