"""Annotation against a server that fails: nothing lost, nothing twice, and the ledger is what the server counted."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from sicog_mcore.cognition.annotation.annotate import LEDGER_FILE
from sicog_mcore.cognition.codec import parse
from sicog_mcore.cognition.prompts import ask, find_prompt
from sicog_mcore.data.sources import open_sources
from tests.builders import tiny_experiment, write_image
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


def tagged(count: int) -> list[dict[str, Any]]:
    """Rows as LLaVA-CoT-100k has them: no placeholder, four tags."""
    return [
        {
            "id": f"q{i}",
            "image": f"sqa/{i}.png",
            "conversations": [
                {"from": "human", "value": f"What is {i} + 1?\nAnswer the question using a single word or phrase."},
                {
                    "from": "gpt",
                    "value": f"<SUMMARY> Add. </SUMMARY>\n\n<CAPTION> A sum. </CAPTION>\n\n"
                    f"<REASONING> {i} and one. </REASONING>\n\n<CONCLUSION> {i + 1} </CONCLUSION>",
                },
            ],
        }
        for i in range(count)
    ]


def convert(folder: Path, found: list[dict[str, Any]], *more: str) -> int:
    path = folder / "cot_in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return main(["cot", "--rows", str(path), "--images", str(folder), "--out", str(folder / "out"), *more])


def test_long_and_short_rows_are_independent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tagged(6)
    found[1]["conversations"][1]["value"] = found[1]["conversations"][1]["value"].replace("<CAPTION>", "")
    found[2]["conversations"][1]["value"] *= 2
    found[4]["conversations"][1]["value"] = "\n".join(found[4]["conversations"][1]["value"].split("\n\n")[::-1])
    assert convert(tmp_path, found) == 0
    out = tmp_path / "out"
    reasons = "1 x missing_tag, 1 x duplicate_tag, 1 x misordered_tag"
    assert capsys.readouterr().out == f"{out}: 3 rows each in cot.jsonl and direct.jsonl; refused: {reasons}\n"
    long, short = rows(out / "cot.jsonl"), rows(out / "direct.jsonl")
    assert [row["id"] for row in long] == ["q0#cot", "q3#cot", "q5#cot"]
    assert [row["id"] for row in short] == ["q0#direct", "q3#direct", "q5#direct"]
    assert long[1]["conversations"][0]["value"] == f"<image>\nWhat is 3 + 1?\n{find_prompt('cot').text}"
    assert parse(long[1]["conversations"][1]["value"], "cot").steps == ("Add.", "A sum.", "3 and one.", "4")
    expected = "<image>\nWhat is 3 + 1?\nAnswer the question using a single word or phrase."
    assert [turn["value"] for turn in short[1]["conversations"]] == [expected, "4"]
    named = [(row["id"], row["origin"], row["reason"]) for row in rows(out / "refused.jsonl")]
    file = tmp_path / "cot_in.jsonl"
    assert named[0] == ("q1", f"{file}:2", "missing_tag") and named[2] == ("q4", f"{file}:5", "misordered_tag")


REASONINGS = (
    "Step 1: Look at it.\nStep 2: Count.",
    "**Step 1:** Look.\n\n**Step 2:** Count.",
    "### Step 3\nLook.\n- Step 4. Count.",
    "\u6b65\u9aa41\uff1a\u770b\u56fe\u3002\n\u6b65\u9aa42\uff1a\u6570\u6570\u3002",
    "1. Look.\n2. As Step 1 says, count.",
    "step 12 - Look.\r\nStep 7) Count.",
)


def test_reasoning_with_numbered_steps_of_its_own_is_kept_word_for_word(tmp_path: Path) -> None:
    found = tagged(len(REASONINGS))
    for row, text in zip(found, [f"<REASONING> {text} </REASONING>" for text in REASONINGS], strict=True):
        answer = row["conversations"][1]
        head, _, tail = answer["value"].partition("<REASONING>")
        answer["value"] = head + text + tail.partition("</REASONING>")[2]
    assert convert(tmp_path, found) == 0
    long, short = rows(tmp_path / "out" / "cot.jsonl"), rows(tmp_path / "out" / "direct.jsonl")
    assert len(long) == len(short) == len(REASONINGS)
    for number, (row, text) in enumerate(zip(long, REASONINGS, strict=True)):
        steps = parse(row["conversations"][1]["value"], "cot").steps
        assert steps is not None and (steps[0], steps[3]) == ("Add.", str(number + 1))
        written = steps[2]
        for quoted in re.findall(r"\((step [0-9]+)\)", written, re.IGNORECASE):
            written = written.replace(f"({quoted})", quoted)
        assert written == text.replace("\r\n", "\n")


def test_an_answer_without_tags_is_kept_beside_one_with_them(tmp_path: Path) -> None:
    (row,) = tagged(1)
    row["conversations"] += [{"from": "human", "value": "Which colour?"}, {"from": "gpt", "value": "Step 1: blue"}]
    assert convert(tmp_path, [row]) == 0
    (long,), (short,) = rows(tmp_path / "out" / "cot.jsonl"), rows(tmp_path / "out" / "direct.jsonl")
    asked_of = [[turn["value"] for turn in row["conversations"]] for row in (long, short)]
    assert asked_of[0][0].endswith(find_prompt("cot").text) and asked_of[0][2:] == ["Which colour?", "Step 1: blue"]
    assert asked_of[1][1:] == ["1", "Which colour?", "Step 1: blue"]


def test_tags_in_small_letters_are_read_unless_there_are_others_in_capitals(tmp_path: Path) -> None:
    found = tagged(2)
    answer = found[0]["conversations"][1]
    answer["value"] = answer["value"].replace("A sum.", "A sum in a <caption>.")
    found[1]["conversations"][1]["value"] = found[1]["conversations"][1]["value"].lower()
    assert convert(tmp_path, found) == 0
    written = [row["conversations"][1]["value"] for row in rows(tmp_path / "out" / "cot.jsonl")]
    assert [parse(text, "cot").steps for text in written] == [
        ("Add.", "A sum in a <caption>.", "0 and one.", "1"),
        ("add.", "a sum.", "1 and one.", "2"),
    ]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("</CONCLUSION>", "", "missing_tag"),  # cut off
        ("<CAPTION>", "<CAPTION", "missing_tag"),
        (" 1 </CONCLUSION>", "</CONCLUSION>", "empty_tag"),
        ("<REASONING>", "Well: <REASONING>", "text_outside_tags"),
        ("<SUMMARY> Add. </SUMMARY>", "Add.", "missing_tag"),
    ],
)
def test_rows_without_a_whole_answer_are_no_success(
    old: str, new: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = tagged(1)
    row["conversations"][1]["value"] = row["conversations"][1]["value"].replace(old, new)
    assert convert(tmp_path, [row]) == 17
    printed = capsys.readouterr()
    assert f"0 rows each in cot.jsonl and direct.jsonl; refused: 1 x {reason}" in printed.out
    assert "no row can be used" in printed.err
    assert [entry["reason"] for entry in rows(tmp_path / "out" / "refused.jsonl")] == [reason]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"images": ["b.png"]}, "media_unread"),
        ({"image": None, "image_path": "a.png"}, "no_image"),
        ({"system": "Answer in capitals."}, "key_unread"),
        ({"loss": [0, 1]}, "key_unread"),
        ({"choices": ["1", "2"]}, "key_unread"),
    ],
)
def test_a_row_whose_training_row_would_say_less_is_refused(more: dict[str, Any], reason: str, tmp_path: Path) -> None:
    found = tagged(2)
    found[1] |= more
    assert convert(tmp_path, found) == 0
    (refused,) = rows(tmp_path / "out" / "refused.jsonl")
    assert (refused["reason"], refused["origin"]) == (reason, f"{tmp_path}/cot_in.jsonl:2")
    assert repr(next(reversed(more))) in refused["detail"]


def test_a_larger_subset_holds_the_smaller_one(tmp_path: Path) -> None:
    found = tagged(40)
    taken = []
    for more in (["--take", "5"], ["--take", "12"], ["--take", "12", "--seed", "1"]):
        assert convert(tmp_path, found, *more) == 0
        taken.append([row["id"] for row in rows(tmp_path / "out" / "cot.jsonl")])
    assert [len(ids) for ids in taken] == [5, 12, 12]
    assert set(taken[0]) < set(taken[1]) != set(taken[2])
    assert all(ids == sorted(ids, key=lambda name: int(name[1:-4])) for ids in taken)
    assert convert(tmp_path, found, "--take", "41") == 2


def test_both_files_can_be_trained_on_together(tmp_path: Path) -> None:
    assert convert(tmp_path, tagged(3)) == 0
    experiment = tiny_experiment(tmp_path)
    sources = [
        type(experiment.data.sources[0])(path=str(tmp_path / "out" / f"{name}.jsonl")) for name in ("cot", "direct")
    ]
    samples = open_sources(sources, experiment.data)
    assert [samples.read(i).id for i in range(6)] == [
        "q0#cot",
        "q1#cot",
        "q2#cot",
        "q0#direct",
        "q1#direct",
        "q2#direct",
    ]
