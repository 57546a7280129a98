"""An index holds of the rows the numbers that reading and measuring each of them gives, and opening it reads none.

Tested with it: block_rows.py, block_table.py.
"""

from __future__ import annotations

import builtins
import io
import json
import pickle
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sicog_mcore.config import Experiment, SourceConfig
from sicog_mcore.data.encode import Encoder
from sicog_mcore.data.fingerprint import mark_files
from sicog_mcore.data.index import build_index as build_module
from sicog_mcore.data.index import index_store, row_blocks
from sicog_mcore.data.index import indexed_files as open_module
from sicog_mcore.data.index.build_index import IndexOptions, build_index
from sicog_mcore.data.index.indexed_files import open_index
from sicog_mcore.data.quarantine import Rejection
from sicog_mcore.data.resume import OpenRows, open_rows
from sicog_mcore.data.rows import build_sample
from sicog_mcore.data.sources import SampleIndex, index_sources, new_survey, open_sources
from sicog_mcore.errors import ConfigError, SampleError
from tests.builders import TOKENIZER, tiny_experiment, write_image
from tests.data.zoo import IMAGES_FOLDER, ROWS_FILE, build_zoo


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_blocks, "BLOCK_ROWS", 8)
    monkeypatch.setattr(row_blocks, "ENDS_ONE_IN", 4)


def on_sources(folder: Path, *sources: SourceConfig, **data: Any) -> Experiment:
    return tiny_experiment(folder, data={"sources": sources, "tokenizer": TOKENIZER, **data})


def measured(experiment: Experiment) -> list[tuple[int, int, int, bool] | Rejection]:
    """Every row, read and measured by itself; in an epoch 3."""
    samples = open_sources(experiment.data.sources, experiment.data)
    encoder = Encoder(experiment.model, experiment.data)
    outcomes: list[tuple[int, int, int, bool] | Rejection] = []
    for row in range(len(samples)):
        name = f"row {row}"
        try:
            sample = samples.read(row)
            name = sample.id
            found = encoder.measure(sample)
            outcomes.append((found.num_tokens, found.num_slices, found.attention, found.is_truncated))
        except SampleError as error:
            outcomes.append(Rejection(name, samples.origin(row), error.reason, error.detail, 3))
    return outcomes


def indexed(opened: OpenRows) -> list[tuple[int, int, int, bool] | Rejection]:
    """The same from the index."""
    sizes, samples = opened.sizes, opened.rows.all
    columns = (sizes.num_tokens, sizes.num_slices, sizes.attention, sizes.is_truncated)
    outcomes: list[tuple[int, int, int, bool] | Rejection] = []
    for row in range(len(sizes)):
        values = tuple(column[row].item() for column in columns)
        if sizes.reason[row]:
            assert values == (0, 0, 0, False)
            rejection = samples.rejection(row, 3)
            assert rejection.reason == sizes.reasons[sizes.reason[row]]
            outcomes.append(rejection)
        else:
            outcomes.append(values)  # type: ignore[arg-type]
    return outcomes


def same_rows(one: SampleIndex, other: SampleIndex) -> None:
    assert len(one) == len(other) and one.notes == other.notes
    for row in range(len(one)):
        assert one.origin(row) == other.origin(row)
        found = []
        for samples in (one, other):
            try:
                found.append(samples.read(row))
            except SampleError as error:
                found.append(str(error))
        assert found[0] == found[1]


@pytest.fixture
def zoo(tmp_path: Path) -> Experiment:
    build_zoo(tmp_path / "data")
    rows = tmp_path / "data" / ROWS_FILE
    # Over again as a list: their ids are repeated, their bytes are not, and none of its rows is broken JSON.
    kept = []
    for line in rows.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        try:
            kept.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    listed = tmp_path / "data" / "listed.json"
    listed.write_text(json.dumps([row for row in kept if isinstance(row, dict)], indent=1))
    images = str(tmp_path / "data" / IMAGES_FOLDER)
    return on_sources(tmp_path, *(SourceConfig(path=str(path), images=images) for path in (rows, listed)))


@pytest.mark.parametrize("duplicate_ids", ["quarantine", "keep"])
def test_the_zoo_is_indexed_as_it_is_read(zoo: Experiment, duplicate_ids: Any) -> None:
    experiment = replace(zoo, data=replace(zoo.data, duplicate_ids=duplicate_ids))
    opened = open_rows(experiment)
    expected = measured(experiment)
    assert indexed(opened) == expected
    rejected = [outcome for outcome in expected if isinstance(outcome, Rejection)]
    assert len({rejection.reason for rejection in rejected}) > 20 and len(expected) - len(rejected) > 20
    assert ("duplicate_id" in {rejection.reason for rejection in rejected}) == (duplicate_ids == "quarantine")
    same_rows(opened.rows.all, open_sources(experiment.data.sources, experiment.data))
    files = index_sources(experiment.data.sources, new_survey(build_sample))
    assert opened.mark.files == mark_files(files)  # a checkpoint of before is compared with an index of now


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def write_shards(folder: Path) -> None:
    """Two shards of samples with and without ids, a caption, a foreign member, an image that is none."""
    folder.mkdir()
    write_image(folder.parent / "one.jpg", 120, 90, seed=1)
    jpeg = (folder.parent / "one.jpg").read_bytes()
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A square."}]
    for name in "ab":
        with tarfile.open(folder / f"{name}.tar", "w") as archive:
            for number in range(5):
                row = {"conversations": turns, **({"id": f"{name}{number}"} if number % 2 else {}), "extra_key": 3}
                _add(archive, f"{number}.json", json.dumps(row).encode())
                _add(archive, f"{number}.jpg", jpeg if number != 3 else b"no image at all")
            _add(archive, "caption.jpg", jpeg)
            _add(archive, "caption.txt", b"A square.")
            _add(archive, "film.txt", b"A film.")
            _add(archive, "film.mp4", b"x")
            _add(archive, "cut.jpg", b"")
            _add(archive, "cut.txt", b"Nothing.")


def test_shards_are_indexed_as_they_are_read_wherever_they_lie(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    experiment = on_sources(tmp_path, SourceConfig(path=str(tmp_path / "shards")))
    opened = open_rows(experiment)
    assert indexed(opened) == measured(experiment)
    same_rows(opened.rows.all, open_sources(experiment.data.sources, experiment.data))
    assert opened.sizes.shards.tolist() == [0, 8, 16] and "key 'extra_key' is not used" in opened.rows.all.notes[-1]
    (tmp_path / "shards").rename(tmp_path / "moved")
    elsewhere = on_sources(tmp_path, SourceConfig(path=str(tmp_path / "moved")))
    assert build_index(elsewhere, IndexOptions(processes=1)).built_rows == 0
    assert indexed(open_rows(elsewhere)) == measured(elsewhere)


def test_rows_without_ids_have_those_of_their_place(tmp_path: Path) -> None:
    row = json.dumps({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}]})
    named = json.dumps({**json.loads(row), "id": "other-3"})
    (tmp_path / "one.jsonl").write_text(f"{row}\n" * 40)
    experiment = on_sources(tmp_path, SourceConfig(path=str(tmp_path / "one.jsonl"), images=str(tmp_path)))
    assert open_rows(experiment).rows.all.read(33).id == "one-33"
    # The same blocks in another file, and in front of them a row whose id one of theirs takes.
    (tmp_path / "named.jsonl").write_text(named)
    (tmp_path / "one.jsonl").rename(tmp_path / "other.jsonl")
    sources = [SourceConfig(path=str(tmp_path / name), images=str(tmp_path)) for name in ("named.jsonl", "other.jsonl")]
    experiment = on_sources(tmp_path, *sources)
    opened = open_rows(experiment)
    assert indexed(opened) == measured(experiment)
    assert opened.rows.all.repeated.tolist() == [4]


def test_a_warm_index_opens_without_reading_rows(zoo: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_store, "RESTED_NS", -1)
    expected = indexed(open_rows(zoo))
    opened, files = builtins.open, []

    def watching(path: Any, *arguments: Any, **options: Any) -> Any:
        files.append(str(path))
        return opened(path, *arguments, **options)

    for module in (build_module, open_module):
        monkeypatch.setattr(module, "cut_blocks", None)  # reading rows would fail
    monkeypatch.setattr(builtins, "open", watching)
    monkeypatch.setattr(io, "open", watching)
    assert indexed(open_rows(zoo)) == expected
    assert files and not any(IMAGES_FOLDER in name for name in files)


def test_workers_get_names_of_files_and_no_arrays(zoo: Experiment) -> None:
    opened = open_rows(zoo)
    samples = opened.rows.without_sizes()
    sent = pickle.dumps(samples)
    assert len(sent) < 60_000 and b"numpy" not in pickle.dumps(open_index(zoo).files[0].indexed.source)
    same_rows(pickle.loads(sent).all, opened.rows.all)


def test_blocks_are_the_shards_that_rows_are_shuffled_by(tmp_path: Path) -> None:
    rows = [
        {"id": f"{i}", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": f"{i}"}]}
        for i in range(100)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows[:30]))
    sources = [SourceConfig(path=str(tmp_path / name), images=str(tmp_path)) for name in ("a.jsonl", "b.json")]
    sizes = open_rows(on_sources(tmp_path, *sources, duplicate_ids="keep")).sizes
    assert sizes.shards[0] == 0 and sizes.shards[-1] == len(sizes) == 130 and 100 in sizes.shards
    lengths = np.diff(sizes.shards)
    assert len(lengths) >= 8 and lengths.max() <= 16


def test_rows_without_an_index_are_refused(tmp_path: Path, zoo: Experiment) -> None:
    with pytest.raises(ConfigError, match="its rows have no index in .*; build it with: sicog index"):
        open_index(zoo)


TEXTS = st.text(alphabet="ab <imagé>\n😀", max_size=40)
TURN = st.builds(lambda role, text: {"from": role, "value": text}, st.sampled_from(("human", "gpt", "system")), TEXTS)
PAIR = st.builds(lambda q, a: [{"from": "human", "value": q}, {"from": "gpt", "value": a}], TEXTS, TEXTS)
ROW = st.fixed_dictionaries(
    {"conversations": st.one_of(PAIR, st.lists(TURN, max_size=3))},
    optional={
        "id": st.one_of(st.integers(0, 5), st.text(max_size=3), st.none()),
        "image": st.one_of(
            st.sampled_from(("one.jpg", "two.png", "no.jpg", "../x", "")), st.just(["one.jpg", "two.png"])
        ),
        "system": TEXTS,
        "strange": st.just(1),
    },
)
LINE = st.one_of(ROW.map(json.dumps), st.just(""), st.text(alphabet='{}[]":,a1 ', max_size=12))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    write_image(folder / "one.jpg", 200, 90, seed=1)
    write_image(folder / "two.png", 60, 300, seed=2)
    yield folder


@given(lines=st.lists(LINE, min_size=1, max_size=60), budget=st.sampled_from((40, 120, 4096)))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows_are_indexed_as_they_are_read(
    lines: list[str], budget: int, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "any.jsonl").write_text("\n".join(["{}", *lines]), encoding="utf-8")
    source = SourceConfig(path=str(folder / "any.jsonl"), images=str(pictures))
    experiment = on_sources(folder, source, token_budget=budget, too_long="truncate", system_prompt="")
    assert indexed(open_rows(experiment)) == measured(experiment)
