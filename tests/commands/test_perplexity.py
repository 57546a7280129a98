"""The command prints a measurement; that the measurement is the loss of training is shown with held-out rows."""

from __future__ import annotations

from pathlib import Path

from sicog_mcore.commands.perplexity import Perplexity, line_of


def test_one_line_says_what_was_found() -> None:
    found = Perplexity(
        perplexity=12.3456,
        low=10.0,
        high=15.55555,
        items=7,
        tokens=12345,
        failures={"image_missing": 2, "no_tokens": 1},
        notes=(),
        is_main=True,
    )
    assert line_of(found, Path("o")) == (
        "o: perplexity 12.35, 95 % interval 10 to 15.56, 7 items, 12,345 tokens"
        "; left out: 2 x image_missing; left out: 1 x no_tokens"
    )
