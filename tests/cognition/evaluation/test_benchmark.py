"""Benchmarks of every format to items, rows and images; bad rows by line; nothing evaluated, nothing written outside."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sicog_mcore.cognition.evaluation.benchmark import (
    LETTER_REQUEST,
    BenchmarkItem,
    prompt_text,
    read_items,
    write_rows,
)
from sicog_mcore.cognition.evaluation.cells import UnreadCells
from sicog_mcore.cognition.prompts import ask, find_prompt
from sicog_mcore.config import DataConfig, SourceConfig
from sicog_mcore.data.sources import open_sources
from sicog_mcore.errors import RecordError


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def tsv(path: Path, *rows: str) -> str:
    path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    return str(path)


def jsonl(path: Path, *rows: dict) -> str:
    return tsv(path, *(json.dumps(row) for row in rows))


PIXELS = [base64.b64encode(png(seed)).decode() for seed in range(2)]
CHOICE = "index\timage\tquestion\tA\tB\tC\tanswer\thint\tcategory"


def test_a_tsv_with_options_becomes_items_rows_and_images(tmp_path: Path) -> None:
    benchmark = tsv(
        tmp_path / "b.tsv",
        CHOICE,
        f'7\t{PIXELS[0]}\t"What ""is"" it?"\ta cat\ta dog\t\tB\tLook.\tanimals',
        "8\t7\tAnd now?\t1\t2\t3\tA\t\tcounts",
        f"9\t{PIXELS[1]}\tShow <image>?\tyes\tno\t\tA\t\tanimals",
    )
    items = read_items(benchmark)
    assert [item.id for item in items] == ["7", "8", "9"]
    assert items[0] == BenchmarkItem(
        id="7",
        question='What "is" it?',
        answers=("B",),
        options={"A": "a cat", "B": "a dog"},
        hint="Look.",
        category="animals",
        origin=f"{benchmark}:2",
    )
    assert prompt_text(items[0]) == f'Look.\nWhat "is" it?\nA. a cat\nB. a dog\n{LETTER_REQUEST}'
    out = tmp_path / "out"
    assert write_rows(benchmark, None, out) == 3
    samples = open_sources([SourceConfig(path=str(out / "rows.jsonl"), images=str(out))], DataConfig())
    first, second, third = (samples.read(row) for row in range(3))
    assert first.images == second.images != third.images  # the second row refers to the first one's image
    assert Path(first.images[0].path).read_bytes() == png(0)
    assert Path(third.images[0].path).read_bytes() == png(1)
    assert third.turns[0].text.count("<image>") == 1  # the one in the question is harmless
    assert [sample.turns[-1].text for sample in (first, second, third)] == ["B", "A", "A"]
    assert len(list((out / "images").iterdir())) == 2


def test_the_request_for_a_letter_gives_way_where_steps_are_asked_for() -> None:
    text = prompt_text(BenchmarkItem("1", "Which?", ("A",), {"A": "x", "B": "y"}))
    assert LETTER_REQUEST in ask(find_prompt("direct"), text, 1)
    assert LETTER_REQUEST not in ask(find_prompt("cot"), text, 1)


def test_jsonl_takes_paths_options_and_conversations(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for seed in range(2):
        (tmp_path / "pictures" / f"{seed}.png").write_bytes(png(seed))
    benchmark = jsonl(
        tmp_path / "b.jsonl",
        {"id": 1, "question": "How many?", "answer": 3, "image": ["0.png", "1.png"]},
        {"id": "x", "question": "Which?", "answer": "B", "options": ["one", "two"], "image": "0.png"},
        {"id": "y", "question": "Any?", "answer": ["yes", "Yeah"]},
        {
            "id": "z",
            "image": "1.png",
            "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dot."}],
        },
    )
    items = read_items(benchmark)
    assert [item.answers for item in items] == [("3",), ("B",), ("yes", "Yeah"), ("A dot.",)]
    assert items[1].options == {"A": "one", "B": "two"}
    assert items[3].question == "What?"
    assert write_rows(benchmark, tmp_path / "pictures", tmp_path / "out") == 4
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert rows[0]["conversations"][0]["value"] == "<image>\n<image>\nHow many?"
    assert "image" not in rows[2]
    assert rows[0]["image"][1] == rows[3]["image"][0]


def test_what_pandas_writes_for_an_empty_cell_is_empty(tmp_path: Path) -> None:
    benchmark = tsv(
        tmp_path / "b.tsv",
        "index\timage\tquestion\tA\tB\tC\tD\tanswer\thint\tcategory",
        f"1\t{PIXELS[0]}\tWhich?\tx\ty\tnan\tNaN\tA\tnan\tnan",
        "2\tnan\tWhich?\tNone\tnull\tN/A\t\tA\tnanometres\tx",
        "3\t\tWhich?\tx\tNan bread\t<NA>\t \tB\tNaN\tx",
    )
    items = read_items(benchmark)
    assert [item.options for item in items] == [
        {"A": "x", "B": "y"},
        {"A": "None", "B": "null", "C": "N/A"},
        {"A": "x", "B": "Nan bread"},
    ]
    assert [(item.hint, item.category) for item in items] == [("", ""), ("nanometres", "x"), ("", "x")]
    assert prompt_text(items[0]) == f"Which?\nA. x\nB. y\n{LETTER_REQUEST}"
    assert write_rows(benchmark, None, tmp_path / "out") == 3
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert ["image" in row for row in rows] == [True, False, False]


@pytest.mark.parametrize("row", ["1\tnan\tx\ty\tA", "1\tq\tx\ty\tnan", "nan\tq\tx\ty\tA", "1\tq\tx\tnan\tA"])
def test_a_row_that_lacks_something_is_refused(tmp_path: Path, row: str) -> None:
    benchmark = tsv(tmp_path / "b.tsv", "index\tquestion\tA\tB\tanswer", row)
    with pytest.raises(RecordError, match="1 of 1 rows cannot be used"):
        read_items(benchmark)


def test_nan_in_json_is_empty_too(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text('{"id": 1, "question": "q", "options": ["x", "y", NaN, null], "answer": "A", "hint": NaN}\n')
    (item,) = read_items(str(path))
    assert (item.options, item.hint) == ({"A": "x", "B": "y"}, "")


@pytest.mark.parametrize(
    ("fields", "letter"),
    [
        ({"choices": ["x", "y"], "answer": "B"}, "B"),
        ({"choices": {"A": "x", "B": "y"}, "answer": "b"}, "B"),
        ({"choices": ["x", "y"], "answer": 1}, "B"),
        ({"choices": ["x", "y"], "answer": "1"}, "B"),
        ({"choices": ["x", "y"], "answer": "y"}, "B"),
        ({"options": ["x", "y"], "answer": "Y."}, "B"),
        ({"options": {"a": "x", "b": "y"}, "answer": "(B)"}, "B"),
        ({"options": {"1": "x", "2": "y"}, "answer": 2}, "B"),
        ({"options": {"0": "x", "1": "y"}, "answer": "1"}, "B"),
        ({"choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answer": "B"}, "B"),
        ({"choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answer": "2"}, "B"),
        ({"choices": "['x', 'y']", "answer": "B"}, "B"),
        ({"choices": '{"A": "x", "B": "y"}', "answer": "B"}, "B"),
        ({"options": ["x", "y"], "choices": ["x", "y"], "answer": "B"}, "B"),
        ({"A": "x", "B": "y", "answer": "y"}, "B"),
        ({"options": [12, 7], "answer": 7}, "B"),
        ({"options": ["x", "y"], "choices": None, "answer": "B"}, "B"),
    ],
)
def test_options_and_their_answer_in_every_form(tmp_path: Path, fields: dict, letter: str) -> None:
    (item,) = read_items(jsonl(tmp_path / "b.jsonl", {"id": 1, "question": "q", **fields}))
    assert item.answers == (letter,)
    assert list(item.options) == ["A", "B"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"choices": ["x", "y"], "answer": 2}, "the letter, the text or the index"),
        ({"choices": ["x", "y"], "answer": "z"}, "the letter, the text or the index"),
        ({"choices": ["0", "1", "2", "1"], "answer": 2, "A": None}, None),
        ({"choices": ["1", "2", "3"], "answer": 1}, "give the letter"),
        ({"choices": ["x", "X"], "answer": "x."}, "give the letter"),
        ({"choices": ["x", "y"], "answer": ["A", "B"]}, "the letter of one"),
        ({"choices": ["x", "y"], "answer": True}, "field_type"),
        ({"choices": ["x"], "answer": "A"}, "expected two or more"),
        ({"choices": "A. x B. y", "answer": "A"}, "expected a list or an object"),
        ({"choices": ["x", ["y", "z"]], "answer": "A"}, "the text of one option"),
        ({"choices": {"one": "1", "two": "2"}, "answer": "one"}, "expected A to Z"),
        ({"choices": {"text": ["x"], "label": ["A", "B"]}, "answer": "A"}, "as many labels as texts"),
        ({"choices": ["x", "y"], "options": ["x", "z"], "answer": "A"}, "keep one of them"),
        ({"choices": ["x", "y"], "A": "x", "B": "y", "answer": "A"}, "keep one of them"),
        ({"options": {"a": "x", "A": "y"}, "answer": "A"}, "each of them once"),
        ({"options": ["x"] * 27, "answer": "A"}, "at most 26"),
        ({"Options": ["x", "y"], "answer": "A"}, "nothing reads 'Options'"),
        ({"option_a": "x", "option_b": "y", "answer": "A"}, "nothing reads 'option_a', 'option_b'"),
        ({"a": "x", "b": "y", "answer": "A"}, "nothing reads 'a', 'b'"),
        ({"distractors": ["x"], "answer": "A"}, "nothing reads 'distractors'"),
        ({"answer_choices": ["x", "y"], "answer": "A"}, "nothing reads 'answer_choices'"),
        ({"multi_choice_options": ["x", "y"], "answer": "A"}, "nothing reads 'multi_choice_options'"),
        ({"images": ["x.png"], "answer": "A"}, "nothing reads 'images'; name it image"),
        ({"image_1": "x.png", "answer": "A"}, "nothing reads 'image_1'"),
        ({"video": "x.mp4", "answer": "A"}, "nothing reads 'video'"),
    ],
)
def test_options_that_could_be_misread_are_refused(tmp_path: Path, fields: dict, message: str | None) -> None:
    benchmark = jsonl(tmp_path / "b.jsonl", {"id": 1, "question": "q", **fields})
    if message is None:
        assert read_items(benchmark)[0].answers == ("C",)  # 2 is the text and the index of the same option
        return
    with pytest.raises(RecordError, match=message) as caught:
        read_items(benchmark)
    assert f"{benchmark}:1: " in str(caught.value)


def test_every_key_is_read_or_irrelevant_or_named(tmp_path: Path) -> None:
    rows = [
        {"id": i, "question": "q", "options": ["x", "y"], "answer": i % 2, "source": "s", "split": "t"}
        for i in range(3)
    ]
    rows[1] |= {"context": "A long story.", "solution": ""}
    rows[2] |= {"context": "Another.", "candidates": ["z"]}
    benchmark = jsonl(tmp_path / "b.jsonl", *rows)
    for read in (
        lambda unread: read_items(benchmark, unread),
        lambda unread: write_rows(benchmark, None, tmp_path, unread),
    ):
        unread = UnreadCells()
        read(unread)
        assert list(unread.lines()) == [
            f"{benchmark}:3: the key 'candidates' is not read (1 rows have it); rename it if it matters",
            f"{benchmark}:2: the key 'context' is not read (2 rows have it); rename it if it matters",
            "3 answers are numbers, taken as indices of options from 0; give letters if they start at 1",
        ]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    benchmark = tsv(tmp_path / "b.tsv", "index\tquestion\tA\tA\tanswer", "1\tq\tx\ty\tA")
    with pytest.raises(RecordError, match=":1: two columns 'A'; rename"):
        read_items(benchmark)


def test_lists_of_references_are_read_and_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "run"
    cell = f"['a', __import__('pathlib').Path({str(marker)!r}).touch()]"
    benchmark = tsv(
        tmp_path / "b.tsv",
        "index\tquestion\tanswer",
        "1\tq\t['a', \"b\"]",
        f"2\tq\t{cell}",
        "3\tq\t[0, 5)",
        "4\tq\t['a'",
    )
    answers = [item.answers for item in read_items(benchmark)]
    assert answers == [("a", "b"), (cell,), ("[0, 5)",), ("['a'",)]
    assert not marker.exists()


def test_bad_rows_are_named_by_line_all_together(tmp_path: Path) -> None:
    benchmark = tsv(
        tmp_path / "b.tsv",
        "index\tquestion\tA\tB\tanswer",
        '1\t"two\nlines"\tx\ty\tA',
        "2\ttoo few",
        "1\tagain\tx\ty\tA",
        "4\tno reference\tx\ty\t",
        "5\tno such letter\tx\ty\tC",
        "6\tone option\tx\t\tA",
        "\tno index\tx\ty\tA",
        "8\t\tx\ty\tA",
    )
    with pytest.raises(RecordError) as caught:
        read_items(benchmark)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("7 of 8 rows cannot be used")
    found = [line.split(": ")[:2] for line in lines[1:-1]]
    expected = ["4", "5", "6", "7", "8"]  # lines of the file, the second row has two
    assert [place.rpartition(":")[2] for place, _ in found] == expected
    reasons = ["row_unreadable", "duplicate_id", "answer_empty", "options", "options"]
    assert [reason for _, reason in found] == reasons
    assert lines[-1] == "  - and 2 more"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"index\tquestion\n1\tq\n", ":1: no column answer"),
        (b"index\tquestion\tanswer\n1\tq\t\xff\n", ":2: not UTF-8"),
        (b"index\tquestion\tanswer\n", "has no rows"),
        (b"", "has no rows"),
        (b'index\tquestion\tanswer\n1\t"open\tx\n2\tq\ta\n', ":2: row_unreadable: unexpected end of data"),
    ],
)
def test_a_broken_tsv_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "b.tsv"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=message):
        read_items(str(path))


@pytest.mark.parametrize("name", ["none.tsv", "b.csv", "easy-vqa:all"])
def test_an_unknown_benchmark_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "b.csv").write_text("x")
    with pytest.raises(RecordError, match="expected easy-vqa:test|give one, or easy-vqa:test"):
        read_items(name if ":" in name else str(tmp_path / name))


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("../secret.png", "image_path_unsafe"),
        ("/etc/hostname", "image_path_unsafe"),
        ("https://example.org/a.png", "image_path_unsafe"),
        ("link/secret.png", "image_path_unsafe"),
        ("none.png", "image_missing"),
        ("text.png", "image_unidentified"),
    ],
)
def test_images_outside_their_folder_are_not_read(tmp_path: Path, image: str, reason: str) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (tmp_path / "secret.png").write_bytes(png(0))
    (images / "link").symlink_to(tmp_path)
    (images / "text.png").write_text("no image")
    benchmark = jsonl(tmp_path / "b.jsonl", {"id": 1, "question": "q", "answer": "a", "image": image})
    with pytest.raises(RecordError, match=reason):
        write_rows(benchmark, images, tmp_path / "out")
    assert not (tmp_path / "out" / "rows.jsonl").exists()
    assert list((tmp_path / "out" / "images").iterdir()) == []


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("!" * 80, "is not base64"),
        (PIXELS[0][:-1] + "?", "is not base64"),
        (base64.b64encode(b"x" * 90).decode(), "image_unidentified"),
        ("3", "no row before has the index '3'"),
        ("../../../etc/passwd", "no row before"),
    ],
)
def test_pixels_that_are_none_are_refused(tmp_path: Path, cell: str, reason: str) -> None:
    benchmark = tsv(tmp_path / "b.tsv", "index\timage\tquestion\tanswer", f"../../up\t{cell}\tq\ta")
    with pytest.raises(RecordError, match=reason):
        write_rows(benchmark, None, tmp_path / "out")


def test_an_index_is_never_a_path(tmp_path: Path) -> None:
    benchmark = tsv(tmp_path / "b.tsv", "index\timage\tquestion\tanswer", f"../../up\t{PIXELS[0]}\tq\ta")
    write_rows(benchmark, None, tmp_path / "deep" / "out")
    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert len(written) == 3
    assert written[1].startswith("deep/out/images/") and written[1].endswith(".png")
    assert written[2] == "deep/out/rows.jsonl"


@settings(deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), min_size=2, max_size=2)
)
def test_every_quoted_text_comes_back(texts: list[str]) -> None:
    import csv
    import tempfile

    question, hint = (text.replace("\r", " ").strip() for text in texts)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "b.tsv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerows([["index", "question", "hint", "answer"], ["1", question, hint, "a"]])
        if question and "\0" not in question + hint:
            (item,) = read_items(str(path))
            assert (item.question, item.hint) == (question, hint)


def test_easy_vqa_has_all_its_questions_by_kind(tmp_path: Path) -> None:
    pytest.importorskip("easy_vqa")
    items = read_items("easy-vqa:test")
    assert len(items) == 9673
    kinds = [item.category for item in items]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"yes/no": 7136, "shape": 1257, "colour": 1280}
