"""Rows of every format become the same Samples, by random access; what is wrong is said with its place.

Tested with it: row_spans.py.
"""

from __future__ import annotations

import json
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sicog_mcore.config import DataConfig, SourceConfig
from sicog_mcore.data.sample import Turn
from sicog_mcore.data.sources import SampleIndex, open_sources
from sicog_mcore.errors import ConfigError, SampleError

DATA = DataConfig()
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A «square»."}]
TEXT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]


def _open(*paths: Path, images: Path | str = ".", data: DataConfig = DATA) -> SampleIndex:
    return open_sources([SourceConfig(path=str(path), images=str(images)) for path in paths], data)


def _jsonl(path: Path, *rows: Mapping[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _reason(index: SampleIndex, row: int) -> str:
    with pytest.raises(SampleError) as raised:
        index.read(row)
    return raised.value.reason


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_json_list_and_jsonl_give_the_same_samples(
    tmp_path: Path, indent: int | None, ascii_only: bool, mark: bytes
) -> None:
    rows = [
        {"id": "größe 図", "image": "a.png", "conversations": TURNS},
        {"conversations": TEXT},
        {"id": 17, "conversations": TEXT},
    ]
    (tmp_path / "a.png").touch()
    (tmp_path / "set.json").write_bytes(mark + json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode())
    lines = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\r\n\r\n" for row in rows)
    (tmp_path / "set.jsonl").write_bytes(mark + lines.encode())
    listed, lined = (_open(tmp_path / name, images=tmp_path) for name in ("set.json", "set.jsonl"))
    assert len(listed) == len(lined) == 3
    for row in (2, 0, 1):
        a, b = listed.read(row), lined.read(row)
        assert (a.id, a.turns, a.images) == (b.id, b.turns, b.images)
    assert [listed.read(row).id for row in range(3)] == ["größe 図", "set-1", "17"]
    assert listed.read(0).turns == (Turn("user", "<image>\nWhat?"), Turn("assistant", "A «square»."))
    assert listed.read(0).images[0].path == str((tmp_path / "a.png").resolve())
    assert [lined.origin(row) for row in range(3)] == [f"{tmp_path}/set.jsonl:{line}" for line in (1, 3, 5)]


def test_row_of_a_json_list_knows_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n{"conversations":\n []}, {"conversations": []},\n\n7]\n')
    index = _open(tmp_path / "a.json")
    assert [index.origin(row).rpartition(":")[2] for row in range(3)] == ["2", "3", "5"]
    assert [_reason(index, row) for row in range(3)] == ["turns_order", "turns_order", "field_type"]


def test_a_row_that_is_not_utf8_costs_only_itself_in_a_json_list(tmp_path: Path) -> None:
    good = json.dumps({"conversations": TEXT}).encode()
    (tmp_path / "a.json").write_bytes(b"[" + good + b', {"id": "\xfc"}, ' + good + b"]")
    index = _open(tmp_path / "a.json")
    assert index.read(2).id == "a-2" and _reason(index, 1) == "not_utf8"


@pytest.mark.parametrize("text", ["[]", " [ ] \n"])
def test_empty_json_list_has_no_rows(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    assert len(_open(tmp_path / "a.json")) == 0


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('[{"id": 1},\n {"id": }]', "line 2 column 9"),
        ('[{"id": 1}\n {"id": 2}]', "line 2 column 2"),
        ('[{"id": 1},\n]', "line 2 column 1"),
        ('[{"id": 1}', "line 1 column 11"),
        ('{"id": 1}', "line 1 column 1"),
        ('[{"id": 1}] x', "line 1 column 13"),
        (" ", "line 1 column 2"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_malformed_json_list_is_a_config_error_with_line_and_column(tmp_path: Path, text: str, place: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError, match=place) as raised:
        _open(tmp_path / "a.json")
    [problem] = raised.value.problems
    assert problem.path == "data.sources[0].path" and problem.value == str(tmp_path / "a.json")


def test_all_paths_that_cannot_be_opened_are_reported_together(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ConfigError) as raised:
        _open(tmp_path / "none.json", tmp_path / "a.txt", tmp_path, tmp_path / "a.jsonl", images=tmp_path / "no")
    assert [problem.path for problem in raised.value.problems] == [
        "data.sources[0].path",
        "data.sources[0].images",
        "data.sources[1].path",
        "data.sources[2].path",
        "data.sources[3].images",
    ]


TEXTS = st.text(alphabet='ax é図😀"\\\n,]}')
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["id", "x", "ü\n"]), inner, max_size=3),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(rows=st.lists(json_values, max_size=6), indent=st.sampled_from([None, 0, 3]), ascii_only=st.booleans())
def test_any_json_list_is_indexed_by_its_elements(
    tmp_path: Path, rows: list, indent: int | None, ascii_only: bool
) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode("utf-8"))
    index = _open(file, data=DataConfig(duplicate_ids="keep"))
    assert len(index) == len(rows)
    for row, value in enumerate(rows):
        expected = "field_missing" if isinstance(value, dict) else "field_type"
        assert _reason(index, row) == expected


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(lines=st.lists(st.binary(max_size=40).map(lambda line: line.replace(b"\n", b" ")), max_size=6))
def test_any_bytes_give_one_row_per_line_with_a_reason(tmp_path: Path, lines: list[bytes]) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join([*lines, b"\n"]))
    try:
        index = _open(file)
    except ConfigError as error:  # the first bytes may be those of an archive or another kind of file
        assert any(words in str(error) for words in ("is compressed", "is Parquet", "is UTF-16", "is a JSON list"))
        return
    assert len(index) == sum(bool(line.strip()) for line in lines)
    for row in range(len(index)):
        assert _reason(index, row) in ("json_invalid", "not_utf8", "field_type", "field_missing")


def test_repeated_id_is_quarantined_and_names_the_first_row(tmp_path: Path) -> None:
    rows = [{"id": name, "conversations": TEXT} for name in ("x", "y", "x", 1, "1")]
    index = _open(_jsonl(tmp_path / "a.jsonl", *rows[:2]), _jsonl(tmp_path / "b.jsonl", *rows[2:]))
    assert [index.read(row).id for row in (0, 1, 3)] == ["x", "y", "1"]
    with pytest.raises(SampleError, match=r"duplicate_id: .*/a\.jsonl:1 has this id already"):
        index.read(2)
    assert _reason(index, 4) == "duplicate_id"


def test_repeated_id_is_kept_under_a_new_name(tmp_path: Path) -> None:
    file = _jsonl(tmp_path / "a.jsonl", *[{"id": "x", "conversations": TEXT}] * 3)
    index = _open(file, data=DataConfig(duplicate_ids="keep"))
    assert [index.read(row).id for row in range(3)] == ["x", "x#1", "x#2"]


def test_rows_without_id_in_files_of_one_name_do_not_collide(tmp_path: Path) -> None:
    files = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        files.append(_jsonl(tmp_path / folder / "train.jsonl", {"conversations": TEXT}, {"conversations": TEXT}))
    index = _open(*files)
    assert [index.read(row).id for row in range(4)] == ["train-0", "train-1", "train.1-0", "train.1-1"]


def test_index_is_picklable_and_reads_the_same_afterwards(tmp_path: Path) -> None:
    tarfile.open(tmp_path / "b.tar", "w").close()
    index = _open(_jsonl(tmp_path / "a.jsonl", {"conversations": TEXT}, {"conversations": TEXT}), tmp_path / "b.tar")
    copy = pickle.loads(pickle.dumps(index))
    assert [copy.read(row) for row in range(2)] == [index.read(row) for row in range(2)]


@pytest.mark.parametrize("row", [-1, 1])
def test_row_outside_the_data_is_an_index_error(tmp_path: Path, row: int) -> None:
    with pytest.raises(IndexError):
        _open(_jsonl(tmp_path / "a.jsonl", {"conversations": TEXT})).read(row)


def test_file_that_vanishes_during_the_run_costs_its_rows(tmp_path: Path) -> None:
    file = _jsonl(tmp_path / "a.jsonl", {"conversations": TEXT})
    index = _open(file)
    file.unlink()
    assert _reason(index, 0) == "row_unreadable"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("gap", [b"\n", b"\r\n\r\n"])
def test_rows_per_line_are_read_from_a_file_named_json(tmp_path: Path, mark: bytes, gap: bytes) -> None:
    rows = [json.dumps({"id": name, "conversations": TEXT}).encode() for name in "ab"]
    (tmp_path / "a.json").write_bytes(mark + gap.join([*rows, b"{broken", b""]))
    index = _open(tmp_path / "a.json")
    assert [index.read(row).id for row in (0, 1)] == ["a", "b"] and _reason(index, 2) == "json_invalid"
    assert index.notes == (f"read as one row per line (.jsonl), which it is: 1 file, first at {tmp_path}/a.json:1",)


@pytest.mark.parametrize("text", ['{"id": 1}\n', '{"data": [\n{"id": 1},\n{"id": 2}]}', '{"id": 1}\n[2]', "{\n{"])
def test_object_that_is_no_row_per_line_is_told_the_names(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError, match="found one object: name the file .jsonl if it holds a row per line"):
        _open(tmp_path / "a.json")


def test_repeated_ids_are_said_with_their_share(tmp_path: Path) -> None:
    files = [
        _jsonl(tmp_path / f"{name}.jsonl", *[{"id": f"{name}{i // 2}", "conversations": TEXT} for i in range(5)])
        for name in "ab"
    ]
    index = _open(*files)
    assert index.notes == (
        f"refused: 4 of 10 rows (40.0%) repeat the id of an earlier row, first {files[0]}:2 that of {files[0]}:1;"
        " set data.duplicate_ids=keep to train on them under new ids",
    )
    assert _open(*files, data=DataConfig(duplicate_ids="keep")).notes == ()
