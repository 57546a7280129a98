"""A place in the data is taken up again only where it means what it meant: nothing is lost or repeated without a word."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from sicog_mcore.config import DataConfig, Experiment, SourceConfig
from sicog_mcore.data.fingerprint import HARMLESS, ORDER, ORDER_VERSION, TOKENIZER, mark_files, stream_settings
from sicog_mcore.data.index.index_settings import index_folder
from sicog_mcore.data.loader import Loader
from sicog_mcore.data.quarantine import Quarantine
from sicog_mcore.data.resume import NOT_COMPARED, LoaderState, OpenRows, open_rows, reopen_rows
from sicog_mcore.data.rows import build_sample
from sicog_mcore.data.sources import index_sources, new_survey
from sicog_mcore.errors import EXIT_CONFIG, CheckpointError
from tests.builders import ANSWERS, QUESTIONS, tiny_experiment, write_image
from tests.builders import TOKENIZER as TOKENIZER_FILE

NUM_ROWS = 60


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rows of text alone, of many lengths: decoding pixels takes long."""
    write_image(tmp_path / "images" / "picture.jpg", 32, 32, seed=0)
    rows = []
    for i in range(NUM_ROWS):
        turns = [{"from": "human", "value": QUESTIONS[i % 3]}, {"from": "gpt", "value": " ".join(ANSWERS[: 1 + i % 4])}]
        rows.append(json.dumps({"id": f"s{i}", "conversations": turns}))
    write_rows(tmp_path / "data.jsonl", rows)
    return tmp_path


def experiment_on(folder: Path, train: dict[str, Any] | None = None, **data: Any) -> Experiment:
    given = {"window_samples": 8, "max_bad_rate": 1.0, "token_budget": 256, **data}
    return tiny_experiment(folder, data=given, train={"packs_per_step": 1, **(train or {})})


def open_loader(experiment: Experiment, opened: OpenRows) -> Loader:
    quarantine = Quarantine(Path(experiment.output) / "q.jsonl", 1.0, 10_000, opened.bad)
    return Loader(experiment, 0, 1, quarantine, opened.start, opened=opened)


def run(experiment: Experiment, opened: OpenRows, steps: int = 0) -> tuple[list[str], LoaderState, dict[str, Any]]:
    """Consumes some steps, or the rest of the epoch (0): ids, the place behind them, what a checkpoint holds of the data."""
    loader = open_loader(experiment, opened)
    ids: list[str] = []
    done = 0
    while done < steps if steps else loader.state().epoch == opened.start.epoch:
        ids += next(loader).sample_ids
        while not loader.ends_step:
            ids += next(loader).sample_ids
        done += 1
    saved = opened.state(loader.state(), loader.rows_left, loader.bad_rows.state())
    loader.close()
    return ids, loader.state(), json.loads(json.dumps(saved))


def rows_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


def write_rows(path: Path, rows: Sequence[str]) -> None:
    path.write_text("\n".join(rows) + "\n")


def new_row(name: str) -> str:
    turns = [{"from": "human", "value": "Is it new?"}, {"from": "gpt", "value": "Yes, it is."}]
    return json.dumps({"id": name, "conversations": turns})


def edit(rows: list[str]) -> list[str]:
    return [rows[0].replace("The circle is red.", "The circle is blue."), *rows[1:]]


def test_the_same_data_goes_on_exactly_wherever_it_lies(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    experiment = experiment_on(folder)
    whole, *_ = run(experiment, open_rows(experiment))
    first, place, saved = run(experiment, open_rows(experiment), steps=3)
    assert place.is_inside and saved["rows_left"] == NUM_ROWS - len(first)
    moved = tmp_path_factory.mktemp("moved")
    shutil.copytree(folder / "images", moved / "pictures")
    shutil.copy(folder / "data.jsonl", moved / "other.jsonl")
    source = SourceConfig(path=str(moved / "other.jsonl"), images=str(moved / "pictures"))
    elsewhere = experiment_on(folder, sources=(source,), workers=0, worker_timeout_s=7)
    for now in (experiment, elsewhere, experiment_on(folder, train={"packs_per_step": 4})):
        opened = reopen_rows(now, place, saved)
        assert opened.notes == () and opened.rows.earlier is None
        rest, *_ = run(now, opened)
        assert (first + rest)[:NUM_ROWS] == whole[:NUM_ROWS]


def test_other_line_ends_blank_lines_and_no_last_line_end_are_the_same_rows(folder: Path) -> None:
    experiment, path = experiment_on(folder), folder / "data.jsonl"
    _, place, saved = run(experiment, open_rows(experiment), steps=2)
    rows = rows_of(path)
    for text in ("\r\n".join(rows), "\n\n".join(rows), "\n".join(rows)):
        path.write_bytes(text.encode())
        assert reopen_rows(experiment, place, saved).notes == ()
    (folder / "data.json").write_text("[" + ",\n".join(rows) + "]")  # another format of the same rows
    listed = experiment_on(folder, sources=(replace(experiment.data.sources[0], path=str(folder / "data.json")),))
    assert reopen_rows(listed, place, saved).notes == ()


CHANGES: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "reordered": (lambda rows: rows[::-1], "its 60 rows are in another order"),
    "two rows swapped": (lambda rows: [rows[1], rows[0], *rows[2:]], "its 60 rows are in another order"),
    "first row deleted": (lambda rows: rows[1:], "1 of its 60 rows are gone, or more of them and others are new"),
    "cut at the end": (lambda rows: rows[:50], "10 of its 60 rows are gone, or more of them and others are new"),
    "edited": (edit, "rows were edited: it still has 60, but with other content"),
    "one letter case": (lambda rows: [*rows[:-1], rows[-1].replace("s59", "S59")], "rows were edited"),
    "put in front": (
        lambda rows: [new_row("n"), *rows],
        "it has 61 rows instead of 60, and the first 60 are not the same any more",
    ),
    "reordered and longer": (
        lambda rows: [*rows[::-1], new_row("n")],
        "its 60 rows are in another order; 1 more follow",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_rows_are_refused_in_words(name: str, folder: Path) -> None:
    change, words = CHANGES[name]
    experiment, path = experiment_on(folder), folder / "data.jsonl"
    ids, place, saved = run(experiment, open_rows(experiment), steps=3)
    rows = rows_of(path)
    write_rows(path, change(rows))
    with pytest.raises(CheckpointError) as caught:
        reopen_rows(experiment, place, saved)
    title, changed, remedy = str(caught.value).splitlines()
    assert changed.startswith(f"  - {path}: {words}")
    left = NUM_ROWS - len(ids)
    assert f"data.on_change=restart_epoch, which goes on at the beginning of epoch 1 ({left} rows of epoch 0" in remedy
    assert caught.value.exit_code == EXIT_CONFIG
    write_rows(path, rows)  # the remedy helps
    assert reopen_rows(experiment, place, saved).notes == ()


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "token_budget": ({"token_budget": 512}, "data.token_budget: 256 -> 512"),
    "window": ({"window_samples": 9}, "data.window_samples: 8 -> 9"),
    "slice_budget": ({"slice_budget": 40}, "data.slice_budget: 32 -> 40"),
    "prompt": ({"system_prompt": "Be kind."}, "data.system_prompt: 'You are a helpful assistant.' -> 'Be kind.'"),
    "template": ({"template": "plain"}, "data.template: 'chatml' -> 'plain'"),
    "too_long": ({"too_long": "truncate"}, "data.too_long: 'quarantine' -> 'truncate'"),
    "duplicate_ids": ({"duplicate_ids": "keep"}, "data.duplicate_ids: 'quarantine' -> 'keep'"),
    "max_image_px": ({"max_image_px": 10_000}, "data.max_image_px: 50000000 -> 10000"),
    "max_aspect": ({"max_aspect": 2.0}, "data.max_aspect: 200.0 -> 2.0"),
    "seed": ({"train": {"seed": 43}}, "train.seed: 42 -> 43"),
    "samples_per_step": ({"train": {"samples_per_step": 5}}, "train.samples_per_step: 0 -> 5"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_changed_settings_are_refused_in_words(name: str, folder: Path) -> None:
    changes, words = SETTINGS[name]
    experiment = experiment_on(folder)
    _, place, saved = run(experiment, open_rows(experiment), steps=2)
    with pytest.raises(CheckpointError) as caught:
        reopen_rows(experiment_on(folder, **changes), place, saved)
    assert f"  - {words}" in str(caught.value).splitlines()


def test_every_setting_of_the_data_counts_unless_it_is_known_to_be_harmless(folder: Path) -> None:
    experiment = experiment_on(folder)
    named = {name.removeprefix("data.") for name in stream_settings(experiment)}
    assert {field.name for field in fields(DataConfig)} == (named & {f.name for f in fields(DataConfig)}) | set(
        HARMLESS
    )
    harmless = {"workers": 3, "worker_timeout_s": 9, "on_change": "restart_epoch", "max_bad_rate": 0.5, "bad_window": 9}
    assert stream_settings(experiment_on(folder, **harmless)) == stream_settings(experiment)
    dpo = replace(experiment, objective="dpo")
    sliced = replace(
        experiment, model=replace(experiment.model, slicing=replace(experiment.model.slicing, max_slices=3))
    )
    for other in (dpo, sliced):
        assert stream_settings(other) != stream_settings(experiment)
    plain = [stream_settings(experiment_on(folder, template="plain", system_prompt=text)) for text in ("a", "b")]
    assert plain[0] == plain[1]  # a template that writes no system turn


def test_another_tokenizer_file_is_refused_and_a_copy_is_not(folder: Path) -> None:
    experiment = experiment_on(folder)
    _, place, saved = run(experiment, open_rows(experiment), steps=2)
    copy = folder / "copy" / "tokenizer.json"
    copy.parent.mkdir()
    shutil.copy(TOKENIZER_FILE, copy)
    assert reopen_rows(experiment_on(folder, tokenizer=str(copy.parent)), place, saved).notes == ()
    copy.write_text(copy.read_text() + " ")
    with pytest.raises(CheckpointError, match=f"- {TOKENIZER}: "):
        reopen_rows(experiment_on(folder, tokenizer=str(copy.parent)), place, saved)


def test_an_older_order_of_packs_ends_with_its_epoch(folder: Path) -> None:
    experiment = experiment_on(folder)
    _, place, saved = run(experiment, open_rows(experiment), steps=2)
    del saved["settings"][ORDER], saved["settings"]["train.samples_per_step"]  # as versions before wrote it
    saved["settings"]["data.window_samples"] = 512
    with pytest.raises(CheckpointError) as caught:
        reopen_rows(experiment, place, saved)
    _, *changes, remedy = str(caught.value).splitlines()
    assert changes == ["  - data.window_samples: 512 -> 8", f"  - {ORDER}: 1 -> {ORDER_VERSION}"]
    assert "data.on_change=restart_epoch, which goes on at the beginning of epoch 1" in remedy
    opened = reopen_rows(experiment, LoaderState(1, 0, 0), saved)
    assert opened.notes == () and opened.start == LoaderState(1, 0, 0)


def test_other_blocks_of_rows_are_another_order(folder: Path) -> None:
    experiment = experiment_on(folder)
    ids, place, saved = run(experiment, open_rows(experiment), steps=2)
    saved["shards"] = "of other blocks"
    with pytest.raises(CheckpointError, match=r"other blocks of rows(.|\n)*data.on_change=restart_epoch"):
        reopen_rows(experiment, place, saved)
    opened = reopen_rows(experiment_on(folder, on_change="restart_epoch"), place, saved)
    assert (
        opened.start == LoaderState(1, 0, 0) and f"{NUM_ROWS - len(ids)} rows of epoch 0 are skipped" in opened.notes[0]
    )
    assert reopen_rows(experiment, LoaderState(1, 0, 0), saved).notes == ()


def test_an_image_that_came_or_went_inside_a_window_is_refused_in_words(folder: Path) -> None:
    path, late = folder / "data.jsonl", folder / "images" / "late.jpg"
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A circle."}]
    given = [json.dumps({"id": f"late{i}", "image": "late.jpg", "conversations": turns}) for i in range(4)]
    write_rows(path, [*rows_of(path), *given])
    experiment = experiment_on(folder, window_samples=64)
    _, inside, saved = run(experiment, open_rows(experiment), steps=2)
    _, begins, saved_before = run(experiment, open_rows(experiment))
    write_image(late, 32, 32, seed=1)
    with pytest.raises(CheckpointError, match=r"images of the rows that are packed together(.|\n)*restart_epoch"):
        reopen_rows(experiment, inside, saved)
    opened = reopen_rows(experiment_on(folder, window_samples=64, on_change="restart_epoch"), inside, saved)
    assert opened.start == LoaderState(1) and "images of the rows" in opened.notes[0]
    assert reopen_rows(experiment, begins, saved_before).notes == ()  # packs of a window that begins may be any
    late.unlink()
    shutil.rmtree(index_folder(experiment))  # otherwise the image is missed only when it is decoded
    assert reopen_rows(experiment, inside, saved).start == inside


@pytest.mark.parametrize("num_new", [1, 50])
def test_appended_rows_join_after_the_epoch_under_way(num_new: int, folder: Path) -> None:
    experiment, path = experiment_on(folder), folder / "data.jsonl"
    old, new = {f"s{i}" for i in range(NUM_ROWS)}, {f"n{i}" for i in range(num_new)}
    whole, *_ = run(experiment, open_rows(experiment))
    first, place, saved = run(experiment, open_rows(experiment), steps=2)
    write_rows(path, [*rows_of(path), *(new_row(name) for name in sorted(new))])
    opened = reopen_rows(experiment, place, saved)
    assert opened.notes == (
        f"rows were appended since the checkpoint: {path} has {NUM_ROWS + num_new} rows instead of 60; "
        "epoch 0 is finished on the 60 rows it began with, they join in epoch 1",
    )
    second, place, saved = run(experiment, opened, steps=2)
    again = reopen_rows(experiment, place, saved)  # from a checkpoint inside the same epoch
    assert again.notes == () and place.epoch == 0
    rest, place, saved = run(experiment, again)
    epoch = (first + second + rest)[:NUM_ROWS]
    assert Counter(epoch) == Counter(old) and epoch == whole[:NUM_ROWS]
    later, *_ = run(experiment, reopen_rows(experiment, place, saved))
    begun = (first + second + rest)[NUM_ROWS:] + later  # a step may have begun the next epoch
    assert set(begun[: NUM_ROWS + num_new]) == old | new and saved["begun_with"] == []


def test_rows_appended_twice_and_to_the_first_of_two_files_leave_the_epoch_alone(folder: Path) -> None:
    rows = rows_of(folder / "data.jsonl")
    write_rows(folder / "a.jsonl", rows[:12])
    write_rows(folder / "b.jsonl", rows[12:])
    source = SourceConfig(path="", images=str(folder / "images"))
    sources = [replace(source, path=str(folder / name)) for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    experiment = experiment_on(folder, sources=tuple(sources[:2]), duplicate_ids="keep")
    whole, *_ = run(experiment, open_rows(experiment))
    ids, place, saved = run(experiment, open_rows(experiment), steps=1)
    # Its id is that of a row of the second file, which stays the first with that id as long as the epoch lasts.
    write_rows(folder / "a.jsonl", [*rows[:12], new_row("s20")])
    more, place, saved = run(experiment, reopen_rows(experiment, place, saved), steps=1)
    write_rows(folder / "c.jsonl", [new_row("c")])
    longer = experiment_on(folder, sources=tuple(sources), duplicate_ids="keep")
    opened = reopen_rows(longer, place, saved)
    assert f"{folder}/c.jsonl is new, with 1 rows" in opened.notes[0] and "the 60 rows it began with" in opened.notes[0]
    rest, *_ = run(longer, opened)
    assert (ids + more + rest)[:NUM_ROWS] == whole[:NUM_ROWS]
    opened = replace(opened, rows=pickle.loads(pickle.dumps(opened.rows)))  # workers have it too
    assert len(opened.rows.all) == 62 and len(opened.rows.of(0)) == 60 and len(opened.rows.of(1)) == 62


def test_rows_appended_between_two_epochs_join_at_once(folder: Path) -> None:
    experiment, path = experiment_on(folder, window_samples=80, token_budget=16384), folder / "data.jsonl"
    experiment = replace(experiment, train=replace(experiment.train, packs_per_step=1))
    _, place, saved = run(experiment, open_rows(experiment))
    assert place == LoaderState(1, 0, 0) and saved["rows_left"] == NUM_ROWS
    write_rows(path, [*rows_of(path), new_row("n")])
    opened = reopen_rows(experiment, place, saved)
    assert opened.notes[0].endswith("they belong to epoch 1, which begins now")
    assert "n" in run(experiment, opened)[0]


def test_an_epoch_starts_anew_where_that_is_wanted(folder: Path) -> None:
    experiment, path = experiment_on(folder), folder / "data.jsonl"
    ids, place, saved = run(experiment, open_rows(experiment), steps=3)
    write_rows(path, rows_of(path)[1:])
    wanted = experiment_on(folder, on_change="restart_epoch", token_budget=200)
    opened = reopen_rows(wanted, place, saved)
    assert opened.start == LoaderState(1, 0, 0) and opened.bad == ()
    (note,) = opened.notes
    assert "data.token_budget: 256 -> 200" in note and "1 of its 60 rows are gone" in note
    assert note.endswith(f"the data starts anew at epoch 1; {NUM_ROWS - len(ids)} rows of epoch 0 are skipped")
    rest, place, saved = run(wanted, opened)
    assert set(rest) == {f"s{i}" for i in range(1, NUM_ROWS)}
    assert reopen_rows(wanted, place, saved).notes == ()  # the option stays, and does nothing more


def test_sources_in_another_order_or_gone_are_refused(folder: Path) -> None:
    rows = rows_of(folder / "data.jsonl")
    for name, part in (("a", rows[:10]), ("b", rows[10:15]), ("c", rows[15:])):
        write_rows(folder / f"{name}.jsonl", part)
    a, b, c = (SourceConfig(path=str(folder / f"{name}.jsonl"), images=str(folder / "images")) for name in "abc")
    experiment = experiment_on(folder, sources=(a, b, c))
    _, place, saved = run(experiment, open_rows(experiment), steps=2)

    def refusal(*sources: SourceConfig) -> str:
        with pytest.raises(CheckpointError) as caught:
            reopen_rows(experiment_on(folder, sources=sources), place, saved)
        return str(caught.value).replace(f"{folder}/", "")

    order = "the data sets are in another order: a.jsonl, b.jsonl, c.jsonl -> a.jsonl, c.jsonl, b.jsonl"
    assert order in refusal(a, c, b)
    assert "  - b.jsonl with 5 rows is gone\n" in refusal(a, c)
    write_rows(folder / "c.jsonl", rows[15:][::-1])
    assert "  - c.jsonl: its 45 rows are in another order\n" in refusal(a, b, c)
    assert reopen_rows(experiment_on(folder, sources=(a, b)), LoaderState(), saved | {"files": saved["files"][:2]})


def test_a_checkpoint_without_a_fingerprint_is_taken_with_a_notice(folder: Path) -> None:
    experiment = experiment_on(folder)
    opened = reopen_rows(experiment, LoaderState(0, 1, 0), {})
    assert opened.notes == (NOT_COMPARED,) and opened.start == LoaderState(0, 1, 0)


def write_shard(path: Path, groups: Sequence[tuple[str, dict[str, bytes]]]) -> None:
    with tarfile.open(path, "w") as archive:
        for key, members in groups:
            for extension, content in members.items():
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def test_shards_are_recognised_by_texts_names_and_sizes(folder: Path) -> None:
    (folder / "shards").mkdir()
    shard = folder / "shards" / "s.tar"
    picture = (folder / "images" / "picture.jpg").read_bytes()
    groups = [(f"k{i}", {"jpg": picture, "txt": f"caption {i}".encode()}) for i in range(6)]
    write_shard(shard, groups)
    experiment = experiment_on(folder, sources=(SourceConfig(path=str(folder / "shards")),), window_samples=4)
    opened = open_rows(experiment)
    saved, place = opened.state(LoaderState(0, 1, 0), 2, []), LoaderState(0, 1, 0)

    def outcome(groups: Sequence[tuple[str, dict[str, bytes]]]) -> str:
        write_shard(shard, groups)
        try:
            return "".join(reopen_rows(experiment, place, saved).notes)
        except CheckpointError as error:
            return str(error)

    assert outcome(groups) == ""
    assert "in another order" in outcome(groups[::-1])
    assert "1 of its 6 rows are gone" in outcome(groups[1:])
    assert "rows were edited" in outcome([("k0", {"jpg": picture, "txt": b"caption x"}), *groups[1:]])
    assert "rows were edited" in outcome([("k0", {"jpg": picture + b"\0", "txt": b"caption 0"}), *groups[1:]])
    assert "rows were appended" in outcome([*groups, ("k6", {"jpg": picture, "txt": b"caption 6"})])
    write_shard(folder / "shards" / "a.tar", groups[:1])  # a new shard, first by name
    assert "a.tar is new, with 1 rows" in outcome(groups)


def test_a_mark_costs_no_second_reading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = index_sources(experiment_on(folder).data.sources, new_survey(build_sample))
    monkeypatch.setattr("builtins.open", lambda *_: pytest.fail("a file was opened again"))
    (mark,) = mark_files(files)
    assert mark.rows == NUM_ROWS
