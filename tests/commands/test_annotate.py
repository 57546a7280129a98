"""Annotation as a library step: what it returns, which the command only prints."""

from __future__ import annotations

import json
from collections import Counter
from decimal import Decimal
from pathlib import Path

from sicog_mcore.cognition.annotation.annotator import Estimate
from sicog_mcore.commands.annotate import DescribeOptions, DescriptionRun, ReasonOptions, describe, reason, summary
from tests.cognition.annotation.test_llava_cot import tagged
from tests.cognition.chat_server import ChatServer
from tests.tools.test_annotate import COMPLETION_PRICE, PROMPT_PRICE, write_items


def asked(folder: Path, url: str, dry_run: bool = False) -> DescribeOptions:
    return DescribeOptions(
        endpoint=url,
        model="m",
        rows=folder / "rows.json",
        images=folder / "images",
        out=folder / "out",
        price_prompt=PROMPT_PRICE,
        price_completion=COMPLETION_PRICE,
        first_wait_s=0.001,
        dry_run=dry_run,
    )


def test_a_run_returns_what_it_asked_and_paid(tmp_path: Path) -> None:
    write_items(tmp_path, 3)
    told: list[tuple[int, int]] = []
    estimate = describe(asked(tmp_path, "http://127.0.0.1:9/v1", dry_run=True), print, lambda *_: None)
    assert isinstance(estimate, Estimate) and (estimate.items, estimate.measured) == (3, 0)
    assert not (tmp_path / "out").exists()
    with ChatServer(lambda call, item, of_item: "answer") as server:
        found = describe(asked(tmp_path, server.url), print, lambda *counts: told.append(counts))
    assert isinstance(found, DescriptionRun)
    assert found.outcomes["answer"].total() == 3 and found.calls == {"answer": 3} and found.halted_by == ""
    assert (found.prompt_tokens, found.completion_tokens) == (
        server.counts.prompt_tokens,
        server.counts.completion_tokens,
    )
    assert found.cost == (PROMPT_PRICE * found.prompt_tokens + COMPLETION_PRICE * found.completion_tokens) / 10**6
    assert sorted(told) == [(1, 3), (2, 3), (3, 3)]
    again = describe(asked(tmp_path, "http://127.0.0.1:9/v1", dry_run=True), print, lambda *_: None)
    assert isinstance(again, Estimate) and (again.items, again.measured, again.cost) == (0, 3, 0)


def test_calls_of_unknown_price_are_named() -> None:
    found = DescriptionRun(
        outcomes={"answer": Counter({"": 2}), "failed": Counter({"refused": 1})},
        calls={"answer": 2, "cut_off": 1},
        prompt_tokens=1200,
        completion_tokens=30,
        cost=Decimal("0.5"),
        unknown=1,
        at_most=Decimal("0.25"),
        halted_by="",
    )
    assert summary(Path("o"), found) == (
        "o: 2 rows each in cod.jsonl and caption.jsonl; failed: 1 x refused (asked again with --retry-failed)"
        "; calls: 2 x answer, 1 x cut_off; 1,200 + 30 tokens, 0.500000 USD"
        "; 1 calls of unknown price, at most 0.250000 USD"
    )


def test_rows_of_reasoning_are_counted(tmp_path: Path) -> None:
    made = tagged(4)
    made[2]["conversations"][1]["value"] *= 2
    (tmp_path / "cot.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    options = ReasonOptions(rows=tmp_path / "cot.jsonl", images=tmp_path, out=tmp_path / "out", take=2)
    found = reason(options)
    assert found.written == {"cot": 2, "direct": 2} and found.refused.total() + found.only_direct.total() == 1
