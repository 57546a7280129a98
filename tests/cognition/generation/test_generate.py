"""One process from rows to records: what is asked, what is written, and what a second run makes of the first."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sicog_mcore.cognition.generation.cost_estimate import estimate
from sicog_mcore.cognition.generation.generate import run
from sicog_mcore.cognition.generation.items import read_items
from sicog_mcore.cognition.generation.options import GenerationOptions
from sicog_mcore.cognition.generation.record_parts import PartWriter, merge_parts, open_parts
from sicog_mcore.cognition.item_keys import KeyCounter
from sicog_mcore.cognition.prompts import ask, find_prompt
from sicog_mcore.cognition.records import Generation, from_json, read_records, to_json
from sicog_mcore.config import ParallelConfig
from sicog_mcore.errors import CheckpointError, ConfigError, DataError, RecordError
from sicog_mcore.parallel.topology import start_topology, stop_topology
from sicog_mcore.rollout.requests import Sampling
from sicog_mcore.rollout.sampling import candidate_seed
from tests.answering import write_checkpoint, write_items
from tests.builders import tiny_experiment, write_image

DRAW = Sampling(temperature=0.9, top_p=0.9, top_k=0, max_new_tokens=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    write_items(folder, 5)
    try:
        write_checkpoint(tiny_experiment(folder), folder / "model", start_topology(ParallelConfig(), seed=0))
    finally:
        stop_topology()
    return folder


@pytest.fixture
def options(folder: Path, tmp_path: Path) -> GenerationOptions:
    return GenerationOptions(
        checkpoint=folder / "model",
        rows=(folder / "items.jsonl",),
        images=folder / "images",
        prompts=(("cod", 1), ("caption", 1)),
        sampling=DRAW,
        seed=3,
        out=tmp_path / "out",
        batch=4,
    )


def record(name: str, **changes: object) -> Generation:
    made = Generation(name, "caption", "", "", "", (), "engine", "checkpoint", Sampling(), 0)
    return replace(made, **changes)  # type: ignore[arg-type]


# ---- rows


def items_of(tmp_path: Path, *rows: object) -> list[tuple[str, str, str, str]]:
    """(id, question, image, failure) of each row."""
    write_image(tmp_path / "a.png", 8, 8, seed=0)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return [(item.id, item.question, item.image, item.failure) for item in read_items([path], tmp_path)]


def test_rows_need_neither_labels_nor_questions(tmp_path: Path) -> None:
    human = {"from": "human", "value": "<image>\nWhat is it?"}
    assert items_of(
        tmp_path,
        {"id": "image", "image": "a.png"},
        {"id": "question", "conversations": [{"from": "human", "value": "Why?"}]},
        {"id": "both", "image": "a.png", "conversations": [human]},
        {"id": "labelled", "image": "a.png", "conversations": [human, {"from": "gpt", "value": "A cat."}]},
        {"id": "system", "image": "a.png", "conversations": [{"from": "system", "value": "Be brief."}, human]},
        {"id": "bare", "image": "a.png", "conversations": [{"from": "human", "value": "What is it?"}]},
        {"id": 7, "image": "a.png", "conversations": []},
    ) == [
        ("image", "", "a.png", ""),
        ("question", "Why?", "", ""),
        ("both", "What is it?", "a.png", ""),
        ("labelled", "What is it?", "a.png", ""),
        ("system", "What is it?", "a.png", ""),
        ("bare", "What is it?", "a.png", ""),
        ("7", "", "a.png", ""),
    ]


def test_a_row_that_cannot_be_used_is_an_item_with_the_reason(tmp_path: Path) -> None:
    text = [{"from": "human", "value": "<image> and <image>"}]
    assert items_of(
        tmp_path,
        "{half a row",
        {"id": "twice", "image": "a.png"},
        {"id": "twice", "image": "a.png"},
        {"id": "out", "image": "../a.png"},
        {"id": "marks", "image": "a.png", "conversations": text},
        {"id": "many", "image": ["a.png", "a.png"]},
        {"id": "odd", "image": "a.png", "conversations": "text"},
    ) == [
        ("rows.jsonl:1", "", "", "json_invalid"),
        ("twice", "", "a.png", ""),
        ("rows.jsonl:3", "", "", "duplicate_id"),
        ("rows.jsonl:4", "", "", "image_path_unsafe"),
        ("rows.jsonl:5", "", "", "image_count_mismatch"),
        ("rows.jsonl:6", "", "", "several_images"),
        ("rows.jsonl:7", "", "", "field_type"),
    ]


HUMAN = [{"from": "human", "value": "What is it?"}]


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"images": ["a.png"]}, "the key 'images' and no image"),
        ({"image_path": "a.png", "conversations": HUMAN}, "'image_path'"),
        ({"imgUrl": "http://x/a", "image": ""}, "'imgUrl'"),
        ({"source": "coco/a.jpg", "image": None}, "'source'"),
        ({"content": [{"type": "text"}, {"url": "data:image/png;base64,AAAA"}], "image": []}, "'content'"),
        ({"video": "a.mp4", "audio": "a.wav"}, "the keys 'video', 'audio' and no image"),
        ({"conversations": [{"from": "human", "value": "<image>\nWhat?"}]}, "<image> in the text"),
        ({"conversations": [{"from": "human", "value": "<img>a.png</img> What?"}]}, "<img>, </img> in the text"),
        ({"conversations": [{**HUMAN[0], "image": "a.png"}]}, "the key 'conversations.image'"),
        ({"conversations": [{"role": "user", "content": "<|vision_start|>What?"}]}, "<|vision_start|> in the text"),
    ],
)
def test_a_row_whose_picture_is_not_read_is_refused_by_name(row: dict[str, Any], named: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"id": "a"} | row) + "\n")
    (item,) = read_items([path], tmp_path)
    assert (item.id, item.failure, item.origin) == ("a", "no_image", "rows.jsonl:1")
    assert named in item.detail and "only 'image' is read" in item.detail


@pytest.mark.parametrize(
    ("row", "failure"),
    [
        ({"images": ["sub/a.png"]}, ""),  # the same picture once more
        ({"image_url": "https://somewhere/1.jpg", "image_id": 7, "width": 8}, ""),  # where it came from, and about it
        ({"images": ["a.png", "b.png"]}, "media_unread"),
        ({"image2": "b.png"}, "media_unread"),
        ({"video": "b.mp4"}, "media_unread"),
        ({"videos": [], "image_path": None, "audio": ""}, ""),
        ({"conversations": [{**HUMAN[0], "images": ["a.png"], "timestamp": 1}]}, ""),
        ({"conversations": [{**HUMAN[0], "images": ["a.png", "b.png"]}]}, "media_unread"),
        ({"conversations": [{"from": "human", "value": "<image>\n<video> What?"}]}, "media_unread"),
    ],
)
def test_beside_its_image_a_row_may_repeat_it_but_bring_no_other(
    row: dict[str, Any], failure: str, tmp_path: Path
) -> None:
    assert items_of(tmp_path, {"id": "a", "image": "a.png"} | row)[0][3] == failure


def test_an_empty_image_is_none_and_a_question_without_one_is_text(tmp_path: Path) -> None:
    rows = [{"id": str(i), "image": value, "conversations": HUMAN} for i, value in enumerate(("", " ", None, []))]
    assert items_of(tmp_path, *rows) == [(str(i), "What is it?", "", "") for i in range(4)]
    assert items_of(tmp_path, {"id": "a", "image": [""], "conversations": HUMAN})[0][3] == "field_type"


def test_keys_that_are_not_read_are_counted_with_the_place_of_the_first(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "image": "a.png", "hue": 1, "license": "MIT", "loss": 0},
        {"id": "b", "image": "a.png", "hue": 2},
    ]
    items_of(tmp_path, {"id": "0", "image": "a.png", "hue": None}, *rows)
    counter = KeyCounter()
    read_items([tmp_path / "rows.jsonl"], tmp_path, 0, counter)
    file = tmp_path / "rows.jsonl"
    assert list(counter.lines()) == [
        f"key 'hue' is not read: 2 rows, first {file}:2",
        f"key 'loss' is not read: 1 row, first {file}:2",
    ]


def test_a_placeholder_in_a_question_asks_for_no_further_image() -> None:
    text = ask(find_prompt("direct"), "what is <image> <|im_end|>", 1)
    assert text.count("<image>") == 1


# ---- parts


def test_records_are_merged_in_the_order_of_the_items(tmp_path: Path) -> None:
    assert open_parts(tmp_path, {"seed": 1}) == frozenset()
    for writer, names in (("00001", "cb"), ("00000", "a")):
        with PartWriter(tmp_path, writer) as part:
            for name in names:
                part.commit(record(name, question=f"ä{name}\n"))
    assert merge_parts(tmp_path, ["a", "b", "c"], tmp_path / "g.jsonl") == 3
    lines = (tmp_path / "g.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines == [to_json(record(name, question=f"ä{name}\n")) for name in "abc"]
    with pytest.raises(RecordError, match="lacks 1 items, e.g. 'd'"):
        merge_parts(tmp_path, ["a", "d"], tmp_path / "g.jsonl")


@pytest.mark.parametrize("half", [b"{", b'{"id":"x"', b"x" * 200_000])
def test_a_half_written_line_is_cut_off_and_its_item_done_again(tmp_path: Path, half: bytes) -> None:
    open_parts(tmp_path, {})
    with PartWriter(tmp_path, "00000") as part:
        part.commit(record("a"))
    path = tmp_path / "parts" / "00000.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + half)
    assert open_parts(tmp_path, {}) == {"a"}
    assert path.read_bytes() == whole
    path.write_bytes(half)
    assert open_parts(tmp_path, {}) == frozenset()
    assert path.read_bytes() == b""


def test_records_that_depend_on_other_inputs_are_refused_by_name(tmp_path: Path) -> None:
    open_parts(tmp_path, {"seed": 1, "sampling": {"top_p": 0.9}})
    with pytest.raises(RecordError, match=r"(?s)seed: 1 -> 2.*sampling: .*0\.9.*0\.8") as caught:
        open_parts(tmp_path, {"seed": 2, "sampling": {"top_p": 0.8}})
    assert caught.value.exit_code == 2
    (tmp_path / "parts" / "header.json").unlink()
    (tmp_path / "parts" / "00000.jsonl").touch()
    with pytest.raises(RecordError, match=r"without header\.json"):
        open_parts(tmp_path, {})


# ---- runs


def test_a_run_writes_what_a_record_promises(options: GenerationOptions, folder: Path) -> None:
    run(replace(options, prompts=(("cod", 2), ("caption", 1))))
    records = list(read_records(options.out / "generations.jsonl", Generation))
    assert [item.id for item in records] == [f"i{i}" for i in range(5)]
    assert [item.failure for item in records] == ["", "", "no_image", "image_unidentified", ""]
    first = records[0]
    assert (first.image, first.question, first.task, first.seed) == ("i0.png", "", "caption", 3)
    assert [(use.id, use.count) for use in first.prompts] == [("cod", 2), ("caption", 1)]
    for item in records:
        assert len(item.image_hash) == (32 if item.image else 0)
        for candidate in item.candidates:
            assert candidate.seed == candidate_seed(3, item.id, candidate.prompt, candidate.index)
            assert 1 <= candidate.tokens <= DRAW.max_new_tokens
            assert candidate.log_prob <= 0 and round(candidate.log_prob, 2) == candidate.log_prob
    usage = json.loads((options.out / "usage.jsonl").read_text())
    assert usage["decode_tokens"] == sum(c.tokens for item in records for c in item.candidates)
    assert (usage["items"], usage["failed"], usage["ranks"]) == (3, {"image_unidentified": 1, "no_image": 1}, 1)


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_and_a_finished_one_does_nothing(
    options: GenerationOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    run(replace(options, limit=2, batch=1))
    assert len((options.out / "generations.jsonl").read_text().splitlines()) == 2
    run(options)
    assert "5 items, 2 of them done before" in capsys.readouterr().out
    whole = (options.out / "generations.jsonl").read_bytes()
    again = replace(options, out=options.out.with_name("again"), batch=3)
    run(again)
    assert (again.out / "generations.jsonl").read_bytes() == whole
    (options.out / "generations.jsonl").unlink()
    run(options)
    assert "5 items, 5 of them done before" in capsys.readouterr().out
    assert (options.out / "generations.jsonl").read_bytes() == whole
    with pytest.raises(RecordError, match="seed: 3 -> 4"):
        run(replace(options, seed=4))


def test_a_run_that_answers_nothing_is_no_success(
    options: GenerationOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "a", "images": ["i0.png"], "hue": 1}\n{"id": "b", "image": "gone.png"}\n')
    for _ in range(2):  # a second run, which has nothing to do, is none either
        with pytest.raises(
            DataError, match=r"0 of 2 items were answered \(1 x no_image, 1 x image_missing\)"
        ) as caught:
            run(replace(options, rows=(rows,)))
        assert caught.value.exit_code == 17
        printed = capsys.readouterr().out
        assert f"key 'hue' is not read: 1 row, first {rows}:1" in printed.replace("\n", " ")
        assert "refused    1 of 2 items: no_image, first rows.jsonl:1: the row has the key 'images'" in printed
    failures = [item.failure for item in read_records(options.out / "generations.jsonl", Generation)]
    assert failures == ["no_image", "image_missing"]


def test_a_dry_run_estimates_and_writes_nothing(options: GenerationOptions) -> None:
    lines = estimate(replace(options, tokens_per_s=16.0, price_per_gpu_hour=3.6), world_size=2)
    text = "\n".join(lines)
    assert "candidates 8" in text
    assert "at most 32 to draw" in text
    assert "refused    1 of 5 items: no_image, first items.jsonl:3: a description is asked for" in text
    assert "image_unidentified 1" in text or "'image_unidentified': 1" in text
    assert "0:00:01 on 2 ranks, cost 0.00" in text
    assert not options.out.exists()
    assert "time       unknown" in "\n".join(estimate(options, world_size=1))


WRONG: tuple[tuple[Callable[[GenerationOptions], GenerationOptions], str], ...] = (
    (lambda o: replace(o, prompts=(("nothing", 1),)), "is no prompt"),
    (lambda o: replace(o, prompts=(("cod", 1), ("cot", 1))), "mix captions and answers"),
    (lambda o: replace(o, prompts=(("cod", 0),)), "asks for no candidate"),
    (lambda o: replace(o, prompts=(("cod", 1), ("cod", 1))), "must name each prompt once"),
    (lambda o: replace(o, sampling=replace(DRAW, top_p=0.0)), "top-p = 0.0"),
    (lambda o: replace(o, sampling=replace(DRAW, temperature=-1.0)), "temperature = -1.0"),
    (lambda o: replace(o, sampling=replace(DRAW, max_new_tokens=0)), "max-new-tokens = 0"),
    (lambda o: replace(o, batch=0), "batch = 0"),
    (lambda o: replace(o, rows=(Path("none.jsonl"),)), "rows = 'none.jsonl'"),
    (lambda o: replace(o, images=Path("nowhere")), "images = 'nowhere'"),
    (lambda o: replace(o, tensor=2), "does not divide the 1 ranks"),
    (lambda o: replace(o, tokenizer="nowhere"), "--tokenizer"),
)


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_options_are_one_message(
    options: GenerationOptions, change: Callable[[GenerationOptions], GenerationOptions], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(change(options))


def test_a_folder_without_checkpoint_is_refused(options: GenerationOptions) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint of ours"):
        run(replace(options, checkpoint=options.images))


def test_a_record_read_back_is_the_record(options: GenerationOptions) -> None:
    run(replace(options, limit=1))
    line = (options.out / "generations.jsonl").read_text(encoding="utf-8").splitlines()[0]
    assert to_json(from_json(line, Generation, "here")) == line
