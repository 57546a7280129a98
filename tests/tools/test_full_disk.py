"""Every command of the loop on a full disk: one message, exit code 75, nothing half-written, and it goes on afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.builders import write_image
from tests.cognition.annotation.test_llava_cot import tagged
from tests.cognition.chat_server import ChatServer
from tests.curation import Said, item, write_round
from tests.disks import full_after
from tests.tools.test_annotate import command, rows, write_items
from tools import annotate, curate, evaluate, join_records, make_pairs, report, score

COUNT = 12


class Command(NamedTuple):
    """A command: its main function, its words for input and output, and the bytes after which the disk is full."""

    main: Callable[[list[str]], int]
    words: Callable[[Path, Path], list[object]]
    room: int = 2048


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs of all commands."""
    folder = tmp_path_factory.mktemp("work")
    words = [" ".join(f"{word}{number}" for word in "abcdefghijklmnopqrstuvwxyz") for number in range(COUNT)]
    made = [item(folder, str(n), [Said("cod", text, 0.9)], image=n) for n, text in enumerate(words)]
    write_round(folder, made)
    answers = [item(folder, str(n), [Said("direct", "a", 0.9)], question="q") for n in range(COUNT)]
    write_round(folder, answers, "answers")
    round_words = ["--round", str(folder / "round"), "--images", str(folder / "images")]
    assert curate.main([*round_words, "--tau", "0.8", "--image-radius", "-1", "--text-similarity", "0"]) == 0
    asked = [
        {"id": str(n), "image": f"i{n}.png", "question": "q " * 100, "answer": "a", "category": str(n)}
        for n in range(COUNT)
    ]
    turns = [{"from": "human", "value": "<image>\n" + "q " * 200}, {"from": "gpt", "value": "a"}]
    learnt = [{"id": str(n), "image": f"i{n}.png", "conversations": turns} for n in range(COUNT)]
    rejected = [{"id": str(n), "answer": "b"} for n in range(COUNT)]
    files = {"benchmark": asked, "learnt": learnt, "rejected": rejected, "tagged": tagged(COUNT)}
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    torch.save({"a": torch.zeros(5000)}, folder / "tensors.bin")
    write_image(folder / "images" / "large.png", 64, 64, seed=1)
    return folder


def unpickle(words: list[str]) -> int:
    from tools import convert

    return convert.main(words)


def curate_into(form: str) -> Command:
    def words(work: Path, out: Path) -> list[object]:
        out.mkdir()
        source = ["--source", work / "round" / "generations.jsonl", work / "round" / "scores.jsonl", "0.8"]
        alike = ["--image-radius", "-1", "--text-similarity", "0"]
        return ["--round", out, "--images", work / "images", *source, *alike, "--formats", form]

    return Command(curate.main, words)


COMMANDS = {
    "score": Command(
        score.main,
        lambda w, out: ["--generations", w / "round/generations.jsonl", "--out", out / "s", "--scorer", "vote"],
    ),
    **{f"curate {form}": curate_into(form) for form in ("json", "jsonl", "parquet", "webdataset")},
    "cot": Command(
        annotate.main, lambda w, out: ["cot", "--rows", w / "tagged.jsonl", "--images", w / "images", "--out", out]
    ),
    "prepare": Command(
        evaluate.main,
        lambda w, out: ["prepare", "--benchmark", w / "benchmark.jsonl", "--images", w / "images", "--out", out],
        100,
    ),
    "judge": Command(
        evaluate.main,
        lambda w, out: [
            *("score", "--benchmark", w / "benchmark.jsonl", "--out", out),
            *("--generations", w / "answers/generations.jsonl"),
        ],
        256,
    ),
    "report": Command(
        report.main,
        lambda w, out: ["--round", w / "round", "--images", w / "images", "--preset", "tiny", "--out", out / "r"],
    ),
    "join": Command(
        join_records.main,
        lambda w, out: [
            *("--generations", w / "round/generations.jsonl"),
            *("--scores", w / "round/scores.jsonl", "--out", out),
        ],
    ),
    "corrupt": Command(
        make_pairs.main,
        lambda w, out: ["corrupt", "--rows", w / "learnt.jsonl", "--images", w / "images", "--out", out],
        100,
    ),
    "pairs": Command(
        make_pairs.main,
        lambda w, out: [
            *("join", "--rows", w / "learnt.jsonl", "--images", w / "images"),
            *("--rejected", w / "rejected.jsonl", "--out", out / "p"),
        ],
    ),
    "unpickle": Command(
        unpickle, lambda w, out: ["unpickle", w / "tensors.bin", "--out", out.with_suffix(".safetensors")]
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_message_and_the_same_command_works_later(
    name: str, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, place = COMMANDS[name], tmp_path / "out"
    words = [str(word) for word in run.words(work, place)]
    capsys.readouterr()
    with full_after(run.room):
        assert run.main(words) == 75
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "cannot be written: " in message and "Traceback" not in message
    assert str(tmp_path) in message
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert run.main(words) == 0


def test_annotation_on_a_full_disk_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_items(tmp_path, COUNT)
    with ChatServer() as server:
        words = command(tmp_path, server, "--concurrency", "3")
        with full_after(3000):
            assert annotate.main(words) == 75
        (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("annotate: ")]
        assert "ledger.jsonl cannot be written: File too large; make room" in message
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"ledger.jsonl"}
        assert annotate.main(words) == 0
    assert [row["id"] for row in rows(tmp_path / "out" / "cod.jsonl")] == [f"s{i}#cod" for i in range(COUNT)]
    assert sum(server.counts.answers.values()) <= COUNT + 4  # those that could not be written down, and were under way
