"""Curation keeps exactly what it should, says why for the rest, and gives the same bytes however often it is killed."""

from __future__ import annotations

import base64
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from PIL import Image

from sicog_mcore import files
from sicog_mcore.cognition.curation import curated_round as module
from sicog_mcore.cognition.curation.conversations import TURN_QUESTIONS, PairBounds, find_rejected
from sicog_mcore.cognition.curation.curated_round import curate
from sicog_mcore.cognition.curation.datasets import open_writers
from sicog_mcore.cognition.curation.filters import PerPrompt
from sicog_mcore.cognition.curation.funnel import StarvedFunnel
from sicog_mcore.cognition.curation.selection import CandidateSource, ScoreFile
from sicog_mcore.cognition.prompts import ask, find_prompt
from sicog_mcore.cognition.records import Decision, PromptUse, read_by_id, read_records
from sicog_mcore.config import DataConfig, SourceConfig
from sicog_mcore.data.decode import decode_image, read_bytes
from sicog_mcore.data.pairs import build_pair
from sicog_mcore.data.sources import SampleIndex, open_sources
from sicog_mcore.errors import ConfigError, RecordError
from sicog_mcore.files import hash_file
from tests.curation import COD, Made, Said, chain, curation, failed, item, write_round

LAST = COD[-1]
GOOD = (Said("cod", LAST, 0.9), Said("cod", "A blue dog.", 0.3), Said("caption", "A cup.", 0.7))
BAD = (Said("cod", LAST, 0.5), Said("caption", "A dog.", 0.4))
ANSWERS = (Said("cot", "2", 0.95), Said("cot", "3", 0.2), Said("direct", "2", 0.94))
LONG = "A red cup with one handle stands on a wooden table in front of a window, and behind it a small dog sleeps on a mat."


def good(folder: Path, name: str, image: int | None, score: float = 0.9, text: str = LAST) -> Made:
    return item(folder, name, [Said("cod", text, score), *GOOD[1:]], image)


def decisions(out: Path) -> dict[str, Decision]:
    return read_by_id(out / "decisions.jsonl", Decision)


def reasons(out: Path) -> dict[str, str]:
    return {name: decision.reason for name, decision in decisions(out).items()}


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "curated/train.jsonl").read_text(encoding="utf-8").splitlines()]


def funnel(out: Path) -> dict[str, Any]:
    return json.loads((out / "funnel.json").read_text(encoding="utf-8"))


def everything(out: Path) -> dict[str, bytes]:
    """All that curation writes, as bytes by name."""
    names = ("decisions.jsonl", "pairs.jsonl", "funnel.json", "curated")
    files = [file for name in names for file in [out / name, *(out / name).rglob("*")] if file.is_file()]
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def loaded(path: Path, images: Path) -> SampleIndex:
    return open_sources([SourceConfig(path=str(path), images=str(images))], DataConfig())


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Seven items: kept, failed, below the threshold, a repeated image, an answer, changed image, text only."""
    items = [
        good(tmp_path, "kept", 0),
        failed("failed"),
        item(tmp_path, "low", BAD, 1),
        good(tmp_path, "again", 0, score=0.89),
        item(tmp_path, "answer", ANSWERS, 0, question="How many cups are there?"),
        good(tmp_path, "changed", 2),
        item(tmp_path, "words", ANSWERS, None, question="What is one and one?"),
    ]
    changed = replace(items[5].generation, image_hash="0" * 32)
    return write_round(tmp_path, [*items[:5], replace(items[5], generation=changed), items[6]])


EXPECTED = {
    "kept": "kept",
    "failed": "image_missing",
    "low": "below_threshold",
    "again": "near_duplicate_image",
    "answer": "kept",
    "changed": "image_changed",
    "words": "kept",
}


def test_every_item_gets_one_decision_in_its_place_and_the_funnel_adds_up(mixed: Path, tmp_path: Path) -> None:
    curate(curation(tmp_path, [mixed]), mixed)
    assert reasons(mixed) == EXPECTED
    assert list(reasons(mixed)) == list(EXPECTED)
    found = funnel(mixed)
    assert (found["in"], found["kept"], found["share"]) == (7, 3, round(3 / 7, 6))
    assert found["in"] == found["kept"] + sum(step["count"] for step in found["dropped"])
    assert [(step["stage"], step["reason"]) for step in found["dropped"]] == [
        ("item", "image_missing"),
        ("score", "below_threshold"),
        ("image", "image_changed"),
        ("duplicate", "near_duplicate_image"),
    ]
    for task in ("caption", "answer"):
        dropped = sum(step[task] for step in found["dropped"])
        assert found["tasks"][task]["in"] == found["tasks"][task]["kept"] + dropped
    assert found["rows"] == {"chain": 3}
    again = decisions(mixed)["again"]
    assert again.detail == "same bytes as i0.png of 'kept'" and again.rows == ()


def test_a_row_is_the_question_of_generation_and_the_whole_chain(mixed: Path, tmp_path: Path) -> None:
    curate(curation(tmp_path, [mixed]), mixed)
    caption, answer, words = rows(mixed)
    assert caption == {
        "id": "kept#chain",
        "image": "i0.png",
        "conversations": [
            {"from": "human", "value": ask(find_prompt("cod"), "", 1)},
            {"from": "gpt", "value": chain("cod", LAST)},
        ],
        "record": "kept",
        "form": "chain",
        "prompt": "cod@1",
    }
    assert answer["conversations"] == [
        {"from": "human", "value": ask(find_prompt("cot"), "How many cups are there?", 1)},
        {"from": "gpt", "value": chain("cot", "2")},
    ]
    assert "image" not in words and words["record"] == "words"
    assert decisions(mixed)["kept"].rows == ("kept#chain",)


def test_markup_of_the_model_is_not_learnt(tmp_path: Path) -> None:
    wild = "\n".join(f"**Step {i}**: {step}" for i, step in enumerate(COD, 1))
    made = item(tmp_path, "a", [Said("cod", LAST, 0.9)])
    candidate = replace(made.generation.candidates[0], text="Sure!\n" + wild)
    made = replace(made, generation=replace(made.generation, candidates=(candidate,)))
    folder = write_round(tmp_path, [made])
    curate(curation(tmp_path, [folder]), folder)
    assert rows(folder)[0]["conversations"][1]["value"] == chain("cod", LAST)


def test_an_item_may_give_a_chain_a_plain_answer_and_a_conversation(mixed: Path, tmp_path: Path) -> None:
    curate(curation(tmp_path, [mixed], forms=("chain", "plain", "turns")), mixed)
    found = {row["id"]: row["conversations"] for row in rows(mixed)}
    assert list(found)[:3] == ["kept#chain", "kept#plain", "kept#turns"]
    assert [name for name in found if name.startswith("answer")] == ["answer#chain", "answer#plain"]
    plain = ask(find_prompt("caption"), "", 1)
    assert found["kept#plain"] == [{"from": "human", "value": plain}, {"from": "gpt", "value": LAST}]
    assert found["answer#plain"][0]["value"] == "<image>\nHow many cups are there?"
    assert found["answer#plain"][1]["value"] == "2"
    turns = found["kept#turns"]
    assert [turn["value"] for turn in turns[1::2]] == list(COD)
    assert [turn["value"] for turn in turns[::2]] == [f"<image>\n{TURN_QUESTIONS[0]}", *TURN_QUESTIONS[1:]]
    assert funnel(mixed)["rows"] == {"chain": 3, "plain": 3, "turns": 1}


def test_an_item_of_which_no_row_can_be_made_is_dropped(tmp_path: Path) -> None:
    spoiled = [Said("caption", "See <image> here.", 0.9)]
    folder = write_round(
        tmp_path,
        [item(tmp_path, "a", spoiled), item(tmp_path, "b", ANSWERS, 1), good(tmp_path, "c", 2)],
    )
    curate(curation(tmp_path, [folder], forms=("turns",)), folder)
    assert reasons(folder) == {"a": "image_token_in_answer", "b": "no_form", "c": "kept"}


def test_the_best_of_alike_images_stays_whatever_the_order_of_files(tmp_path: Path) -> None:
    made = [good(tmp_path, name, 0, score) for name, score in (("c", 0.9), ("a", 0.85), ("b", 0.9), ("d", 0.81))]
    made.append(good(tmp_path, "other", 1, 0.8))
    for order in range(4):
        folder = write_round(tmp_path, random.Random(order).sample(made, len(made)), f"round{order}")
        curate(curation(tmp_path, [folder]), folder)
        assert sorted(name for name, reason in reasons(folder).items() if reason == "kept") == ["b", "other"]


def test_the_same_image_with_another_question_is_no_duplicate(tmp_path: Path) -> None:
    questions = {"a": "How many?", "b": "how many", "c": "Which colour?"}
    folder = write_round(tmp_path, [item(tmp_path, name, ANSWERS, 0, q) for name, q in questions.items()])
    curate(curation(tmp_path, [folder]), folder)
    assert reasons(folder) == {"a": "kept", "b": "near_duplicate_image", "c": "kept"}


def test_long_texts_that_repeat_each_other_are_dropped_and_short_ones_are_not(tmp_path: Path) -> None:
    texts = {"a": LONG, "b": LONG.replace("red", "RED"), "c": LONG.replace("red", "blue"), "d": LAST, "e": LAST}
    made = [good(tmp_path, name, number, text=text) for number, (name, text) in enumerate(texts.items())]
    folder = write_round(tmp_path, made)
    curate(curation(tmp_path, [folder]), folder)
    assert reasons(folder) == dict.fromkeys("acde", "kept") | {"b": "near_duplicate_text"}
    curate(curation(tmp_path, [folder], text_similarity=0.7), folder)
    assert [name for name, reason in reasons(folder).items() if reason != "kept"] == ["b", "c"]
    curate(curation(tmp_path, [folder], text_similarity=0.0), folder)
    assert set(reasons(folder).values()) == {"kept"}


def test_images_of_the_evaluation_are_never_learnt(tmp_path: Path) -> None:
    made = [good(tmp_path, name, number) for number, name in enumerate(("same", "saved", "tsv", "free"))]
    folder = write_round(tmp_path, made)
    owned = tmp_path / "evaluation/deep"
    owned.mkdir(parents=True)
    shutil.copy(tmp_path / "images/i0.png", owned / "a.png")
    Image.open(tmp_path / "images/i1.png").save(owned / "b.jpg", quality=60)
    (owned / "notes.txt").write_text("no image")
    encoded = base64.b64encode((tmp_path / "images/i2.png").read_bytes()).decode()
    table = tmp_path / "bench.tsv"
    table.write_text(f"index\timage\tquestion\n0\t{encoded}\tWhat?\n1\t0\tWhy?\n")
    curate(curation(tmp_path, [folder], evaluation=(tmp_path / "evaluation", table)), folder)
    assert reasons(folder) == dict.fromkeys(("same", "saved", "tsv"), "evaluation_image") | {"free": "kept"}
    assert decisions(folder)["same"].detail == "same bytes as a.png"
    assert decisions(folder)["tsv"].detail == "same bytes as bench.tsv:2"
    assert funnel(folder)["evaluation_images"] == {"images": 3, "known_by_bytes_alone": 0}
    for empty in (tmp_path / "nowhere", tmp_path / "round"):
        with pytest.raises(ConfigError, match="--evaluation"):
            curate(curation(tmp_path, [folder], evaluation=(empty,)), folder)


def text_rows(folder: Path, count: int) -> Path:
    turns = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello."}]
    lines: list[dict[str, Any]] = [{"id": f"t{i}", "conversations": turns} for i in range(count)]
    picture = [{"from": "human", "value": "<image>\nWhat?"}, turns[1]]
    lines += [{"id": "t0", "conversations": turns}, {"id": "seen", "image": "x.png", "conversations": picture}]
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_rows_are_mixed_in_the_wanted_ratio_and_drawn_by_id(tmp_path: Path) -> None:
    captions = [good(tmp_path, f"c{i}", i) for i in range(6)]
    answers = [item(tmp_path, f"a{i}", ANSWERS, i) for i in range(3)]
    folder, text = write_round(tmp_path, [*captions, *answers]), text_rows(tmp_path, 4)
    wanted = {"forms": ("chain", "turns"), "mix": (("caption", 4), ("answer", 2), ("text", 1)), "text": text}
    curate(curation(tmp_path, [folder], **wanted), folder)
    # Three answers are scarce: 1.5 rows to a part. Captions come in twos, so six rows are three of them.
    assert funnel(folder)["rows"] == {"chain": 6, "turns": 3, "text": 1}
    assert funnel(folder)["text"] == {"duplicate_id": 1, "has_image": 1, "kept": 1, "mix": 3}
    taken = {name for name, reason in reasons(folder).items() if reason == "kept"}
    assert len(taken) == 6 and {"a0", "a1", "a2"} <= taken
    assert funnel(folder)["share"] == 1.0  # what the mix leaves out has passed
    turned = write_round(tmp_path, [*answers[::-1], *captions[::-1]], "turned")
    curate(curation(tmp_path, [turned], **wanted), turned)
    assert {name for name, reason in reasons(turned).items() if reason == "kept"} == taken
    curate(curation(tmp_path, [turned], **wanted, seed=1), turned)
    assert {name for name, reason in reasons(turned).items() if reason == "kept"} != taken
    curate(curation(tmp_path, [folder], text=text), folder)
    assert funnel(folder)["rows"] == {"chain": 9, "text": 4}
    assert rows(folder)[-1] == {
        "id": "t3#text",
        "conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello."}],
        "record": "t3",
        "form": "text",
        "prompt": "",
    }


def test_pairs_have_one_form_and_similar_length(tmp_path: Path) -> None:
    said = {
        "plain loser": [Said("cod", LAST, 0.9), Said("caption", "A dog.", 0.1)],
        "cut": [Said("cod", LAST, 0.9), Said("cod", "A dog.", 0.1, finish="length")],
        "close": [Said("cod", LAST, 0.9), Said("cod", "A dog.", 0.86)],
        "short": [Said("cod", LAST, 0.9), Said("cod", "A dog.", 0.1, tokens=13)],
        "fits": [Said("cod", LAST, 0.9), Said("cod", "A dog.", 0.1, tokens=14), Said("cod", "A cup.", 0.8)],
    }
    folder = write_round(tmp_path, [item(tmp_path, name, one, i) for i, (name, one) in enumerate(said.items())])
    curate(curation(tmp_path, [folder]), folder)
    expected = ["pair_alone", "pair_unreadable", "pair_no_worse", "pair_length", "written"]
    assert funnel(folder)["pairs"] == dict.fromkeys(sorted(expected), 1)
    found = decisions(folder)
    assert [found[name].rejected for name in said] == [-1, -1, -1, -1, 1]
    assert [found[name].detail.rpartition(": ")[2] for name in said][:4] == expected[:4]
    assert funnel(folder)["mean_log_length_ratio"] == 0.3567  # ln(20 / 14)
    pair = json.loads((folder / "pairs.jsonl").read_text())
    assert pair == {
        "id": "fits#pair",
        "image": "i4.png",
        "prompt": ask(find_prompt("cod"), "", 1),
        "chosen": chain("cod", LAST),
        "rejected": chain("cod", "A dog."),
        "record": "fits",
    }
    source = SourceConfig(path=str(folder / "pairs.jsonl"), images=str(tmp_path / "images"))
    sample = open_sources([source], DataConfig(), build_pair).read(0)
    assert (sample.id, sample.answers) == ("fits#pair", (chain("cod", "A dog."),))


def test_the_rejected_one_is_drawn_from_the_lower_half_by_id(tmp_path: Path) -> None:
    scores = (0.9, 0.5, 0.1, 0.2, 0.4)
    made = [item(tmp_path, f"i{n}", [Said("cod", f"Cup {s}.", s) for s in scores], None) for n in range(30)]
    drawn = [find_rejected(one.generation, one.scores, PairBounds(), 7) for one in made]
    assert set(drawn) == {(2, ""), (3, "")}
    assert drawn == [find_rejected(one.generation, one.scores, PairBounds(), 7) for one in made]
    assert drawn != [find_rejected(one.generation, one.scores, PairBounds(), 8) for one in made]


def test_our_loader_reads_every_format_with_equal_content(mixed: Path, tmp_path: Path) -> None:
    wanted = {"forms": ("chain", "turns"), "formats": ("json", "jsonl", "parquet", "webdataset")}
    curate(curation(tmp_path, [mixed], text=text_rows(tmp_path, 2), **wanted), mixed)
    folder, images = mixed / "curated", tmp_path / "images"
    names = sorted(file.name for file in folder.iterdir())
    assert names == ["train-000000.tar", "train.json", "train.jsonl", "train.parquet"]
    parsed = rows(mixed)
    assert [row["id"] for row in parsed] == [
        "kept#chain",
        "kept#turns",
        *(f"{i}#chain" for i in ("answer", "words")),
    ] + [
        "t0#text",
        "t1#text",
    ]
    assert json.loads((folder / "train.json").read_text(encoding="utf-8")) == parsed
    table = pyarrow.parquet.read_table(folder / "train.parquet").to_pylist()
    assert [{name: value for name, value in row.items() if value is not None} for row in table] == parsed
    sources = [loaded(folder / name, images) for name in ("train.json", "train.jsonl", "")]
    assert [len(source) for source in sources] == [6, 6, 6]
    for row in range(6):
        samples = [source.read(row) for source in sources]
        assert len({(sample.id, sample.turns) for sample in samples}) == 1
        assert len({tuple(read_bytes(image) for image in sample.images) for sample in samples}) == 1
        assert len(samples[0].images) == ("image" in parsed[row])


def test_shards_are_cut_by_size_and_hold_only_formats_that_others_read(tmp_path: Path) -> None:
    made = [good(tmp_path, f"a.{i}/b", i) for i in range(3)]
    picture = Image.open(tmp_path / "images/i1.png")
    picture.save(tmp_path / "images/i1.bmp")
    other = replace(made[1].generation, image="i1.bmp", image_hash=hash_file(tmp_path / "images/i1.bmp"))
    folder = write_round(tmp_path, [made[0], replace(made[1], generation=other), made[2]])
    curate(curation(tmp_path, [folder]), folder)
    from sicog_mcore.cognition.curation.conversations import make_rows

    target = tmp_path / "shards"
    target.mkdir()
    with open_writers(target, ["webdataset"], tmp_path / "images", shard_bytes=1) as (writer,):
        for one in (made[0], replace(made[1], generation=other), made[2]):
            writer.write(make_rows(one.generation, one.generation.candidates[0], ["chain"])[0])
    assert [file.name for file in sorted(target.iterdir())] == [f"train-{i:06d}.tar" for i in range(3)]
    shards, lines = loaded(target, tmp_path), loaded(folder / "curated/train.jsonl", tmp_path / "images")
    for row in range(3):
        ours, theirs = (source.read(row) for source in (shards, lines))
        assert (ours.id, ours.turns) == (theirs.id, theirs.turns) and ours.id == f"a.{row}/b#chain"
        pixels = [decode_image(read_bytes(sample.images[0]), DataConfig()) for sample in (ours, theirs)]
        assert (pixels[0] == pixels[1]).all()
    assert read_bytes(shards.read(1).images[0]).startswith(b"\x89PNG")


def test_several_sources_have_their_own_thresholds_and_share_one_funnel(tmp_path: Path) -> None:
    captions = write_round(tmp_path, [good(tmp_path, "a", 0, 0.85), good(tmp_path, "b", 1, 0.95)], "captions")
    answers = write_round(tmp_path, [item(tmp_path, "c", ANSWERS, 0)], "answers")
    both = curation(tmp_path, [captions, answers])
    strict = replace(both.sources[0].scores[0], threshold=PerPrompt(0.9))
    both = replace(both, sources=(replace(both.sources[0], scores=(strict,)), both.sources[1]))
    curate(both, tmp_path / "out")
    assert reasons(tmp_path / "out") == {"a": "below_threshold", "b": "kept", "c": "kept"}
    with pytest.raises(RecordError, match="'a' occurs twice"):
        curate(curation(tmp_path, [captions, captions]), tmp_path / "out")


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    one, two = good(tmp_path, "a", 0), good(tmp_path, "b", 1)
    folder, other = write_round(tmp_path, [one, two]), write_round(tmp_path, [two, one], "other")
    short = write_round(tmp_path, [one], "short")
    for scores, message in ((other, "found item 'b', expected 'a'"), (short, "found item None, expected 'b'")):
        source = CandidateSource(folder / "generations.jsonl", (ScoreFile(scores / "scores.jsonl", PerPrompt(0)),))
        with pytest.raises(RecordError, match=message):
            curate(replace(curation(tmp_path, []), sources=(source,)), folder)
    fewer = replace(one, scores=replace(one.scores, scores=(0.9,)))
    newer = replace(one, generation=replace(one.generation, prompts=(PromptUse("cod", 2, 2),)))
    for made, message in ((fewer, "do not fit the 3 candidates"), (newer, "prompt 'cod' in version 2, expected 1")):
        with pytest.raises(RecordError, match=message):
            curate(curation(tmp_path, [write_round(tmp_path, [made])]), folder)
    assert not (folder / "funnel.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.99}, "0 rows are left, at least 1 expected"),
        ({"min_rows": 4}, "3 rows are left, at least 4"),
        ({"min_share": 0.5}, "42.9% of the items passed, 50.0% to 100.0% expected"),
        ({"max_share": 0.4}, "42.9% of the items passed, 5.0% to 40.0%"),
        ({"mix": (("caption", 1), ("text", 1))}, "0 rows are left"),
    ],
)
def test_a_funnel_that_starves_is_refused_and_nothing_changes(
    options: dict[str, Any], message: str, mixed: Path, tmp_path: Path
) -> None:
    curate(curation(tmp_path, [mixed]), mixed)
    before = everything(mixed)
    with pytest.raises(StarvedFunnel, match=message) as error:
        curate(curation(tmp_path, [mixed], **options), mixed)
    assert error.value.exit_code == 17 and error.value.funnel.items.total() == 7
    assert everything(mixed) == before and not (mixed / module.TEMPORARY).exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"image_radius": 30, "evaluation_radius": -2}, ["--image-radius", "--evaluation-radius"]),
        ({"text_similarity": 1.5, "min_rows": 0}, ["--text-similarity", "--min-kept"]),
        ({"min_share": 0.9, "max_share": 0.5}, ["--min-share"]),
        ({"mix": (("caption", -1),)}, ["--mix"]),
        ({"mix": (("caption", 0),)}, ["--mix"]),
        ({"mix": (("caption", 1), ("caption", 2))}, ["--mix"]),
        ({"forms": ("chain", "chain")}, ["--forms"]),
        ({"formats": ()}, ["--formats"]),
        ({"pairs": PairBounds(0.0, 0.5)}, ["--pair-margin", "--pair-length-ratio"]),
    ],
)
def test_options_that_cannot_work_are_all_named(
    options: dict[str, Any], named: list[str], mixed: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        curate(curation(tmp_path, [mixed], **options), mixed)
    assert all(name in str(error.value) for name in named)


def test_equal_inputs_give_equal_bytes_wherever_they_lie(mixed: Path, tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"forms": ("chain", "turns"), "formats": ("json", "jsonl", "parquet", "webdataset")}
    curate(curation(tmp_path, [mixed], **wanted), mixed)
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "images", moved / "images")
    folder = shutil.copytree(mixed, moved / "elsewhere")
    for name in ("curated", "decisions.jsonl", "funnel.json", "pairs.jsonl"):
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    curate(curation(moved, [folder], **wanted, workers=1), folder)
    assert everything(folder) == everything(mixed) and len(everything(mixed)) == 7


class Killed(Exception):
    """The process ends here."""


def killing(call: Callable[..., Any], after: int) -> Callable[..., Any]:
    """A function that works so often and then never again."""
    calls = iter(range(after))

    def run(*arguments: Any, **options: Any) -> Any:
        if next(calls, None) is None:
            raise Killed
        return call(*arguments, **options)

    return run


@pytest.mark.parametrize(
    ("place", "after"), [("_keep", 0), ("_keep", 2), *(("replace", number) for number in range(5)), ("rmtree", 1)]
)
def test_killed_anywhere_it_ends_with_the_same_bytes(
    place: str, after: int, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = curation(tmp_path, [mixed], tau=0.93), curation(tmp_path, [mixed], formats=("json", "webdataset"))
    curate(new, mixed)
    expected = everything(mixed)
    curate(old, mixed)
    before = everything(mixed)
    assert before != expected
    target = {"_keep": module, "replace": files.os, "rmtree": module.shutil}[place]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(target, place, killing(vars(target)[place], after))
        curate(new, mixed)
    # Where the funnel stands, all files are of one run.
    if (mixed / "funnel.json").exists():
        assert everything(mixed) == (expected if place == "rmtree" else before)
    curate(new, mixed)
    assert everything(mixed) == expected and not (mixed / module.TEMPORARY).exists()


def test_ids_of_rows_are_unique_even_if_items_look_like_rows(tmp_path: Path) -> None:
    made = [good(tmp_path, name, number) for number, name in enumerate(("a", "a#chain", "a#plain"))]
    folder = write_round(tmp_path, made)
    curate(curation(tmp_path, [folder], forms=("chain", "plain")), folder)
    ids = [row["id"] for row in rows(folder)]
    assert len(ids) == 6 == len(set(ids))
    assert [row for one in read_records(folder / "decisions.jsonl", Decision) for row in one.rows] == ids
