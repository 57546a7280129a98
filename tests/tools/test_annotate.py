"""Annotation against a server that fails: nothing lost, nothing twice, and the ledger is what the server counted."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from sicog_mcore.cognition.annotation.annotator import LEDGER_FILE
from sicog_mcore.cognition.codec import parse
from sicog_mcore.cognition.prompts import ask, find_prompt
from tests.builders import write_image
from tests.cognition.chat_server import ChatServer, Plan
from tests.interrupts import heeded
from tools.annotate import main

ROOT = Path(__file__).parents[2]
KEY = "sk-very-secret-0123456789"
FAULTS = ("429 0.02", "500", "half", "closed", "malformed", "503", "short")
PROMPT_PRICE, COMPLETION_PRICE = Decimal("2.5"), Decimal("10")


def write_items(folder: Path, count: int) -> None:
    """Rows as ALLaVA-VFLAN has them, ids s0 ...; all of the same small image."""
    write_image(folder / "images" / "a" / "x.png", 8, 8, seed=1)
    rows = [
        {
            "id": f"s{i}",
            "image": "a/x.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat can be seen?"},
                {"from": "gpt", "value": f"This is item {i} ."},
            ],
        }
        for i in range(count)
    ]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "key").write_text(KEY + "\n")


def command(folder: Path, server: ChatServer, *more: str, out: str = "out") -> list[str]:
    """A run on the rows of a folder."""
    files = ["--rows", str(folder / "rows.json"), "--images", str(folder / "images"), "--out", str(folder / out)]
    prices = ["--price-prompt", str(PROMPT_PRICE), "--price-completion", str(COMPLETION_PRICE)]
    where = ["--endpoint", server.url, "--model", "m", "--key-file", str(folder / "key")]
    return ["cod", *files, *where, *prices, "--first-wait-s", "0.001", *more]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ledger_lines(folder: Path, torn: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Calls begun and calls ended, of a ledger file whose last line may be torn."""
    text = (folder / "out" / LEDGER_FILE).read_text(encoding="utf-8").splitlines()
    lines = [json.loads(line) for line in text[1 : len(text) - torn]]
    return [line for line in lines if "at_most" in line], [line for line in lines if "outcome" in line]


def every_fifth(call: int, item: int, of_item: int) -> str:
    """Fails a fifth of all calls, in all ways in turn."""
    return FAULTS[call // 5 % len(FAULTS)] if call % 5 == 4 else "answer"


def every_fifth_or_slow(call: int, item: int, of_item: int) -> str:
    """The same, and an eighth of the faults are answers that never come."""
    return "slow" if call % 40 == 39 else every_fifth(call, item, of_item)


@pytest.mark.slow
@pytest.mark.fault
def test_every_item_is_answered_once_by_a_server_that_fails_a_fifth_of_all_calls(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = 200
    write_items(tmp_path, count)
    with ChatServer(every_fifth_or_slow) as server:
        more = ["--concurrency", "16", "--calls", "12", "--answers", "6", "--timeout-s", "12"]
        assert main(command(tmp_path, server, *more)) == 0
    counts = server.counts
    assert counts.calls - counts.done["answer"] >= 0.19 * counts.calls and set(counts.done) == {
        "answer",
        "slow",
        *(fault.split()[0] for fault in FAULTS),
    }
    assert [counts.answers[item] for item in range(count)] == [1] * count
    for name, prompt in (("cod", "cod"), ("caption", "caption")):
        found = rows(tmp_path / "out" / f"{name}.jsonl")
        assert [row["id"] for row in found] == [f"s{i}#{name}" for i in range(count)]
        assert all(row["image"] == "a/x.png" for row in found)
        assert {row["conversations"][0]["value"] for row in found} == {ask(find_prompt(prompt), "", 1)}
        answers = [row["conversations"][1]["value"] for row in found]
        last = [steps[-1] if (steps := parse(text, "cod").steps) else text for text in answers]
        assert last == [f"words\nPart 5 of item {i}." for i in range(count)]

    begun, ended = ledger_lines(tmp_path)
    assert len(begun) == len(ended) == counts.calls
    assert sum(line["prompt_tokens"] for line in ended) == counts.prompt_tokens
    assert sum(line["completion_tokens"] for line in ended) == counts.completion_tokens
    cost = (PROMPT_PRICE * counts.prompt_tokens + COMPLETION_PRICE * counts.completion_tokens) / 10**6
    assert sum(Decimal(line["cost"]) for line in ended if line["cost"]) == cost
    assert sum(line["cost"] is None for line in ended) == sum(
        counts.done[name] for name in ("half", "closed", "malformed", "slow")
    )
    assert sum(Decimal(row["cost"]) for row in rows(tmp_path / "out" / "items.jsonl")) == cost
    printed = capsys.readouterr().out
    assert (
        f"{count} rows each in cod.jsonl and caption.jsonl; calls: 200 x answer" in printed and f"{cost:.6f}" in printed
    )
    assert counts.most_under_way <= 16


def test_the_key_travels_in_its_header_and_nowhere_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_items(tmp_path, 3)
    with ChatServer(lambda call, item, of_item: ("400", "500", "answer")[item]) as server:
        assert main(command(tmp_path, server, "--calls", "2")) == 0
    assert server.counts.keys == {f"Bearer {KEY}"}
    assert [row["detail"] for row in rows(tmp_path / "out" / "items.jsonl")][:2] != ["", ""]
    printed = capsys.readouterr()
    written = "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    assert KEY not in written + printed.out + printed.err


def test_what_was_answered_is_never_asked_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_items(tmp_path, 4)
    bad = {1, 3}
    with ChatServer(lambda call, item, of_item: "short" if item in bad else "answer") as server:
        assert main(command(tmp_path, server, "--answers", "2")) == 0
        assert "2 rows each" in (printed := capsys.readouterr().out) and "failed: 2 x step_missing" in printed
        assert main(command(tmp_path, server, "--answers", "2")) == 0
        assert server.counts.of_item == {0: 1, 1: 2, 2: 1, 3: 2}
        states = [(row["outcome"], row["reason"]) for row in rows(tmp_path / "out" / "items.jsonl")]
        assert states == [("answer", ""), ("failed", "step_missing")] * 2
        bad.clear()
        assert main(command(tmp_path, server, "--retry-failed")) == 0
    assert server.counts.of_item == {0: 1, 1: 3, 2: 1, 3: 3}
    assert [row["id"] for row in rows(tmp_path / "out" / "cod.jsonl")] == [f"s{i}#cod" for i in range(4)]
    _, ended = ledger_lines(tmp_path)
    assert sum(line["prompt_tokens"] for line in ended) == server.counts.prompt_tokens  # refused answers are paid for


def test_a_ledger_cut_anywhere_leads_to_the_same_rows(tmp_path: Path) -> None:
    write_items(tmp_path, 6)
    with ChatServer(every_fifth) as server:
        assert main(command(tmp_path, server)) == 0
        whole = (tmp_path / "out" / LEDGER_FILE).read_bytes()
        expected = [(tmp_path / "out" / f"{name}.jsonl").read_bytes() for name in ("cod", "caption")]
        for cut in random.Random(0).sample(range(len(whole)), 4):
            (tmp_path / "again").mkdir()
            (tmp_path / "again" / LEDGER_FILE).write_bytes(whole[:cut])
            assert main(command(tmp_path, server, out="again")) == 0
            assert [(tmp_path / "again" / f"{name}.jsonl").read_bytes() for name in ("cod", "caption")] == expected
            shutil.rmtree(tmp_path / "again")


def start_and_signal(arguments: list[str], server: ChatServer, at_call: int, number: signal.Signals) -> int:
    """Runs the tool as a process of its own and sends it a signal at a call; returns its exit code."""
    with heeded():
        process = subprocess.Popen(
            [sys.executable, "-m", "tools.annotate", *arguments],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    deadline = time.monotonic() + 60
    while server.counts.calls < at_call and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    return process.wait()


@pytest.mark.slow
@pytest.mark.fault
def test_a_killed_run_goes_on_without_repeating_or_losing_an_item(tmp_path: Path) -> None:
    count, width = 60, 4
    write_items(tmp_path, count)
    with ChatServer(every_fifth, delay_s=0.02) as server:
        arguments = command(tmp_path, server, "--concurrency", str(width), "--calls", "12", "--answers", "6")
        for at_call in (15, 40):
            assert start_and_signal(arguments, server, at_call, signal.SIGKILL) == -signal.SIGKILL
            with (tmp_path / "out" / LEDGER_FILE).open("ab") as ledger:
                ledger.write(b'{"call": 99, "outcome": "ans')
        begun, ended = ledger_lines(tmp_path, torn=1)
        assert 1 <= len(begun) - len(ended) <= 2 * width
        assert start_and_signal(arguments, server, 50, signal.SIGINT) == 130
        after_begun, after_ended = ledger_lines(tmp_path)
        assert len(after_begun) - len(after_ended) == len(begun) - len(
            ended
        )  # an interrupt waits for what is under way
        assert len(rows(tmp_path / "out" / "cod.jsonl")) >= 30
        assert main(arguments) == 0
    assert [row["id"] for row in rows(tmp_path / "out" / "cod.jsonl")] == [f"s{i}#cod" for i in range(count)]
    repeated = sum(number - 1 for number in server.counts.answers.values())
    assert 0 <= repeated <= 2 * width  # only those that were under way when the run was killed
    begun, ended = ledger_lines(tmp_path)
    assert server.counts.calls <= len(begun) <= server.counts.calls + 2 * width


def test_the_budget_is_never_exceeded_and_a_larger_one_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_items(tmp_path, 30)
    with ChatServer() as server:
        assert main(command(tmp_path, server, "--max-cost", "0.1", "--max-tokens", "500", "--concurrency", "4")) == 17
        printed = capsys.readouterr()
        assert "stopped: the next call may cost" in printed.err and "open: " in printed.out
        _, ended = ledger_lines(tmp_path)
        spent = sum(Decimal(line["cost"]) for line in ended)
        assert Decimal("0.08") < spent <= Decimal("0.1")
        assert len(rows(tmp_path / "out" / "cod.jsonl")) == len(ended) < 30
        assert main(command(tmp_path, server, "--max-cost", "1", "--max-tokens", "500")) == 0
    assert len(rows(tmp_path / "out" / "cod.jsonl")) == server.counts.calls == 30


def test_a_dry_run_asks_nothing_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_items(tmp_path, 10)
    with ChatServer() as server:
        assert main(command(tmp_path, server, "--dry-run")) == 0
        assert "10 items to ask" in (printed := capsys.readouterr().out) and "assumed, nothing measured" in printed
        assert not (tmp_path / "out").exists() and server.counts.calls == 0
        assert main(command(tmp_path, server, "--max-cost", "0.05")) == 17
        asked = server.counts.calls
        capsys.readouterr()
        assert main(command(tmp_path, server, "--dry-run")) == 0
        printed = capsys.readouterr().out
        assert f"{10 - asked} items to ask" in printed and f"as {asked} answers in the ledger" in printed
        assert server.counts.calls == asked


@pytest.mark.parametrize(("what", "code"), [("401", 17), ("404", 17), ("429 insufficient_quota", 17)])
def test_what_would_fail_for_every_item_stops_the_run(tmp_path: Path, what: str, code: int) -> None:
    write_items(tmp_path, 20)
    plan: Plan = lambda call, item, of_item: what  # noqa: E731
    with ChatServer(plan) as server:
        assert main(command(tmp_path, server, "--concurrency", "2")) == code
    assert server.counts.calls <= 2
    assert {row["outcome"] for row in rows(tmp_path / "out" / "items.jsonl")} == {"open"}


def test_rows_that_cannot_be_asked_about_are_named_and_cost_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_items(tmp_path, 3)
    found = json.loads((tmp_path / "rows.json").read_text())
    found[0]["image"] = "gone.png"
    del found[1]["image"]
    found.append({"id": "c", "image": "a/x.png", "caption": "This is item 7 ."})
    (tmp_path / "rows.json").write_text(json.dumps(found))
    with ChatServer() as server:
        assert main(command(tmp_path, server)) == 0
    assert (
        "2 rows each" in (printed := capsys.readouterr().out)
        and "1 x image_missing" in printed
        and "no_image" in printed
    )
    states = [(row["id"], row["outcome"], row["reason"]) for row in rows(tmp_path / "out" / "items.jsonl")]
    expected = [
        ("s0", "unusable", "image_missing"),
        ("s2", "answer", ""),
        ("c", "answer", ""),
        ("", "unusable", "no_image"),
    ]
    assert states == expected
    assert set(server.counts.of_item) == {2, 7}


def test_an_endpoint_that_is_dead_is_no_success_and_the_same_command_asks_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_items(tmp_path, 3)
    with ChatServer(lambda call, item, of_item: ("503", "closed", "500")[item]) as server:
        assert main(command(tmp_path, server, "--calls", "1")) == 75
        printed = capsys.readouterr()
        assert "0 rows each" in printed.out and "failed: " in printed.out
        found = "annotate: 0 of 3 rows were answered (1 x http_503, 1 x connection_lost, 1 x http_500); the endpoint gave no"
        assert found in printed.err and "the same command again" in printed.err
    assert {row["outcome"] for row in rows(tmp_path / "out" / "items.jsonl")} == {"failed"}
    with ChatServer() as server:
        assert main(command(tmp_path, server)) == 0
    assert server.counts.of_item == {0: 1, 1: 1, 2: 1}
    assert len(rows(tmp_path / "out" / "cod.jsonl")) == 3


def test_items_that_failed_while_others_were_answered_wait_for_retry_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_items(tmp_path, 2)
    with ChatServer(lambda call, item, of_item: ("answer", "500")[item]) as server:
        assert main(command(tmp_path, server, "--calls", "1")) == 0
        assert "failed: 1 x http_500 (asked again with --retry-failed)" in capsys.readouterr().out
        assert main(command(tmp_path, server, "--calls", "1")) == 0
    assert server.counts.of_item == {0: 1, 1: 1}


@pytest.mark.parametrize(
    ("spoil", "plan", "reasons", "fix"),
    [
        ({"image": "gone.png"}, "answer", "2 x image_missing", "correct the rows"),
        ({"images": ["a/x.png"], "image": ""}, "answer", "2 x no_image", "correct the rows"),
        ({"video": "x.mp4"}, "answer", "2 x media_unread", "correct the rows"),
        ({}, "short", "2 x step_missing", "--retry-failed"),
        ({}, "400", "2 x http_400", "--retry-failed"),
    ],
)
def test_rows_of_which_none_is_answered_are_no_success(
    spoil: dict[str, Any], plan: str, reasons: str, fix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_items(tmp_path, 2)
    found = [row | spoil for row in json.loads((tmp_path / "rows.json").read_text())]
    (tmp_path / "rows.json").write_text(json.dumps(found))
    with ChatServer(lambda call, item, of_item: plan) as server:
        assert main(command(tmp_path, server)) == 17
    printed = capsys.readouterr().err
    assert f"annotate: 0 of 2 rows were answered ({reasons}); " in printed and fix in printed


def test_keys_of_captioned_rows_that_are_not_read_are_named_before_anything_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_items(tmp_path, 2)
    found = [row | {"mood": "gay", "license": "MIT"} for row in json.loads((tmp_path / "rows.json").read_text())]
    (tmp_path / "rows.json").write_text(json.dumps(found))
    with ChatServer() as server:
        assert main(command(tmp_path, server, "--dry-run")) == 0
    assert capsys.readouterr().err == f"annotate: key 'mood' is not read: 2 rows, first {tmp_path}/rows.json:1\n"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--rows", "nowhere.json"], "nowhere.json"),
        (["--rows", "rows.txt"], "is no file of rows"),
        (["--endpoint", "ftp://x/v1"], "is no address of an http server"),
        (["--endpoint", f"http://u:{KEY}@x/v1"], "holds a user name or password"),
        (["--key-file", "rows.json"], "is not one line of printable ASCII"),
        (["--take", "5"], "only 2 rows are usable"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    change: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_items(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    with ChatServer() as server:
        assert main(command(tmp_path, server, *change)) == 2
    printed = capsys.readouterr()
    assert named in printed.err and KEY not in printed.err and printed.out == ""
    assert server.counts.calls == 0
