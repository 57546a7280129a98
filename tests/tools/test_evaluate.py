"""The command: benchmark to rows, generations to results, two results to a table; bad input is one message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sicog_mcore.cognition.records import Generation, write_records
from tests.cognition.evaluation.test_judging import generation
from tools.evaluate import main

NUM_ITEMS = 6


@pytest.fixture
def benchmark(tmp_path: Path) -> str:
    rows = [f"{i}\twhat {i}?\tred\t{'ab'[i % 2]}" for i in range(NUM_ITEMS)]
    path = tmp_path / "b.tsv"
    path.write_text("\n".join(["index\tquestion\tanswer\tcategory", *rows]) + "\n")
    return str(path)


def generations(path: Path, right: range, prompt: str = "direct") -> str:
    """Answers of which some are right; the last item has none."""
    made: list[Generation] = [generation(str(i), "red" if i in right else "blue", prompt) for i in range(NUM_ITEMS - 1)]
    write_records(path, made)
    return str(path)


def score(benchmark: str, made: str, out: Path, *more: str) -> int:
    return main(["score", "--benchmark", benchmark, "--generations", made, "--out", str(out), *more])


def test_two_checkpoints_are_compared_item_by_item(
    benchmark: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "--benchmark", benchmark, "--out", str(tmp_path / "rows")]) == 0
    assert "rows.jsonl: 6 rows" in capsys.readouterr().out
    for name, right in (("first", range(0, 2)), ("second", range(1, 5))):
        made = generations(tmp_path / f"{name}.jsonl", right)
        assert score(benchmark, made, tmp_path / name) == 0
    assert "mean 0.6667" in (line := capsys.readouterr().out.splitlines()[1])
    assert line.endswith("6 items; 1 x no_generation")
    numbers = tmp_path / "compared.json"
    assert main(["compare", str(tmp_path / "first"), str(tmp_path / "second"), "--out", str(numbers)]) == 0
    header, overall, a, b = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["n", "metric", "first"]
    assert overall.split()[:6] == ["(all)", "6", "exact", "0.3333", "0.6667", "+0.3333"]
    assert overall.split()[-3:] == ["3", "1", "0.625"]  # 2 * (1 + 4) / 16
    assert (a.split()[:2], b.split()[:2]) == (["a", "3"], ["b", "3"])
    assert [entry["n"] for entry in json.loads(numbers.read_text())] == [6, 3, 3]


def test_the_same_files_give_the_same_results(benchmark: str, tmp_path: Path) -> None:
    made = generations(tmp_path / "g.jsonl", range(3))
    for name in ("one", "two"):
        assert score(benchmark, made, tmp_path / name) == 0
    for name in ("results.json", "results.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    summary = json.loads((tmp_path / "one" / "results.json").read_text())
    assert (summary["checkpoint"], summary["prompt"], summary["sampling"]["temperature"]) == ("c0", "direct", 0.0)


def test_other_items_are_not_compared(benchmark: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = generations(tmp_path / "g.jsonl", range(3))
    assert score(benchmark, made, tmp_path / "one") == 0
    lines = (tmp_path / "one" / "results.jsonl").read_text().splitlines()
    (tmp_path / "fewer.jsonl").write_text("\n".join(lines[1:]) + "\n")
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "fewer.jsonl")]) == 2
    caught = capsys.readouterr()
    assert caught.out == ""
    assert caught.err.startswith("evaluate: the item sets differ: '0' only in the first")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--metric", "attributes"], "needs --vocabulary"),
        (["--metric", "choice"], "has no options"),
        (["--tolerance", "5"], "expected a share"),
        (["--prompt", "sing"], "found prompt 'sing'"),
        (["--prompt", "cot"], "0 candidates of prompt 'cot'"),
        (["--metric", "attributes", "--vocabulary", "none.json"], "cannot be read"),
    ],
)
def test_a_mistake_is_one_message_and_nothing_written(
    benchmark: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    made = generations(tmp_path / "g.jsonl", range(3))
    assert score(benchmark, made, tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_attributes_take_their_vocabulary_from_a_file(benchmark: str, tmp_path: Path) -> None:
    vocabulary = tmp_path / "v.json"
    vocabulary.write_text(json.dumps({"colour": ["red", "blue"]}))
    made = generations(tmp_path / "g.jsonl", range(3))
    assert score(benchmark, made, tmp_path / "o", "--metric", "attributes", "--vocabulary", str(vocabulary)) == 0
    assert json.loads((tmp_path / "o" / "results.json").read_text())["mean"] == 0.5
    vocabulary.write_text('{"colour": "red"}')
    assert score(benchmark, made, tmp_path / "o", "--metric", "attributes", "--vocabulary", str(vocabulary)) == 2


def test_keys_that_nothing_reads_are_named_and_nothing_else_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": str(i), "question": "q", "answer": "red", "context": "c\x1b[2J"} for i in range(NUM_ITEMS)]
    path = tmp_path / "b.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["prepare", "--benchmark", str(path), "--out", str(tmp_path / "rows")]) == 0
    note = f"evaluate: note: {path}:1: the key 'context' is not read (6 rows have it); rename it if it matters\n"
    assert capsys.readouterr().err == note
    assert score(str(path), generations(tmp_path / "g.jsonl", range(3)), tmp_path / "o") == 0
    caught = capsys.readouterr()
    assert caught.err == note
    assert "5 read by whole, 6 items; 1 x no_generation" in caught.out
    outcomes = [json.loads(line) for line in (tmp_path / "o" / "results.jsonl").read_text().splitlines()]
    assert [row["rule"] for row in outcomes] == ["whole"] * 5 + [""]


def test_results_of_an_older_grammar_are_compared_with_a_note(
    benchmark: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = generations(tmp_path / "g.jsonl", range(3))
    assert score(benchmark, made, tmp_path / "new") == 0
    rows = [json.loads(line) for line in (tmp_path / "new" / "results.jsonl").read_text().splitlines()]
    old = tmp_path / "old.jsonl"
    old.write_text("".join(json.dumps({key: row[key] for key in row if key != "rule"}) + "\n" for row in rows))
    capsys.readouterr()
    for files in ([str(old), str(tmp_path / "new")], [str(tmp_path / "new"), str(old)]):
        assert main(["compare", *files]) == 0
        assert f"note: {old} does not say which rules" in capsys.readouterr().err
    assert main(["compare", str(old), str(old)]) == 0
    assert capsys.readouterr().err == ""
