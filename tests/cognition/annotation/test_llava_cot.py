"""LLaVA-CoT rows: every answer kept word for word in steps and without, or refused for one reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sicog_mcore.cognition.codec import parse
from sicog_mcore.cognition.prompts import find_prompt
from sicog_mcore.data.sources import open_sources
from tests.builders import tiny_experiment
from tests.tools.test_annotate import rows
from tools.annotate import main


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
        ({"turn": {"weight": 0.5}}, "key_unread"),
        ({"turn": {"image": "b.png"}}, "media_unread"),
        ({"choices": ["1", "2"]}, "key_unread"),
    ],
)
def test_a_row_whose_training_row_would_say_less_is_refused(more: dict[str, Any], reason: str, tmp_path: Path) -> None:
    found = tagged(2)
    if "turn" in more:
        more = more["turn"]
        found[1]["conversations"][0] |= more
    else:
        found[1] |= more
    assert convert(tmp_path, found) == 0
    (refused,) = rows(tmp_path / "out" / "refused.jsonl")
    assert (refused["reason"], refused["origin"]) == (reason, f"{tmp_path}/cot_in.jsonl:2")
    assert next(reversed(more)) in refused["detail"]


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
