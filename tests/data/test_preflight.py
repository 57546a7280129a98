from __future__ import annotations

import bz2
import gzip
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from sicog_mcore.config import SourceConfig
from sicog_mcore.data.preflight import check_inputs
from tests.builders import TOKENIZER, tiny_experiment, write_dataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path, 2)
    return tmp_path


def found(folder: Path, **overrides: Any) -> list[str]:
    return [str(problem) for problem in check_inputs(tiny_experiment(folder, **overrides))]


def test_good_inputs_have_no_problems(folder: Path) -> None:
    assert found(folder) == []


def test_all_problems_are_reported_together(folder: Path) -> None:
    (folder / "notes.txt").touch()
    (folder / "empty.jsonl").touch()
    (folder / "shards").mkdir()
    rows, images = str(folder / "data.jsonl"), str(folder / "images")
    sources = (
        SourceConfig(path=str(folder / "absent.json"), images=images),
        SourceConfig(path=str(folder / "notes.txt")),
        SourceConfig(path=str(folder / "shards")),
        SourceConfig(path=str(folder / "empty.jsonl"), images=images),
        SourceConfig(path=rows, images=str(folder / "absent")),
        SourceConfig(path=rows, images=rows),
    )
    problems = check_inputs(tiny_experiment(folder, data={"sources": sources, "tokenizer": str(folder / "none.json")}))
    assert [(problem.path, problem.problem) for problem in problems] == [
        ("data.sources[0].path", "does not exist"),
        ("data.sources[1].path", "is no known kind of data set"),
        ("data.sources[2].path", "is a folder without .tar shards"),
        ("data.sources[3].path", "is empty"),
        ("data.sources[4].images", "does not exist"),
        ("data.sources[5].images", "is not a folder"),
        ("data.tokenizer", "holds no tokenizer"),
    ]


def test_held_out_files_are_looked_at_where_they_are_measured(folder: Path) -> None:
    (folder / "empty.jsonl").touch()
    sources = tuple(SourceConfig(path=str(folder / name)) for name in ("absent.jsonl", "empty.jsonl"))
    held_out = {
        "sources": sources,
        "benchmark": str(folder / "absent.tsv"),
        "images": str(folder / "data.jsonl"),
    }
    problems = check_inputs(tiny_experiment(folder, held_out=held_out | {"every_steps": 2}))
    assert [(problem.path, problem.problem) for problem in problems] == [
        ("held_out.sources[0].path", "does not exist"),
        ("held_out.sources[1].path", "is empty"),
        ("held_out.benchmark", "is no file"),
        ("held_out.images", "is no folder"),
    ]
    assert found(folder, held_out=held_out) == []
    named = {"every_steps": 2, "benchmark": "easy-vqa:test", "images": str(folder)}
    assert found(folder, held_out=named) == []


CONTENTS = (
    ("a.json", b"[]", "holds no row"),
    ("a.json", b"\xef\xbb\xbf [ \n ] \n", "holds no row"),
    ("a.json", b" \n", "holds no row"),
    ("a.jsonl", b"\n" * 3_000_000, "holds no row"),
    ("a.jsonl", b"\xef\xbb\xbf\r\n", "holds no row"),
    ("a.jsonl", b"[]\n", "holds no row"),
    ("a.jsonl", b'[\n  {"id": 1},\n {"id": 2}]', "is a JSON list, expected one row per line"),
    ("a.jsonl", b'\xef\xbb\xbf[{"id": 1}]', "is a JSON list, expected one row per line"),
    ("a.jsonl", gzip.compress(b"{}", mtime=0), "is compressed (gzip)"),
    ("a.json", bz2.compress(b"[]"), "is compressed (bzip2)"),
    ("a.jsonl", b"PAR1\x15\x04", "is Parquet"),
    ("a.json", '[{"id": 1}]'.encode("utf-16"), "is UTF-16"),
    ("a.tar", b"", "is cut off or no tar: its 0 bytes do not end with the mark that closes an archive"),
    ("a.tar", b"x" * 700, "is cut off or no tar: its 700 bytes do not end with the mark that closes an archive"),
    (
        "a.tar",
        gzip.compress(bytes(1024), mtime=0),
        "is compressed (gzip), samples are read in place from a plain tar: unpack it",
    ),
)


@pytest.mark.parametrize(("name", "content", "problem"), CONTENTS)
def test_file_without_usable_rows_is_seen_before_the_start(
    folder: Path, name: str, content: bytes, problem: str
) -> None:
    (folder / name).write_bytes(content)
    source = SourceConfig(path=str(folder / name), images=str(folder))
    [reported] = check_inputs(tiny_experiment(folder, data={"sources": (source,)}))
    assert (reported.path, reported.problem) == ("data.sources[0].path", problem)
    assert reported.fix == "rename it to .json" or "JSON list" not in problem


def test_every_bad_shard_of_a_folder_is_named(folder: Path) -> None:
    (folder / "sub").mkdir()
    for name in ("a", "b", "c"):
        with tarfile.open(folder / "sub" / f"{name}.tar", "w") as archive:
            archive.add(__file__, "x.txt")
    for name in ("a", "c"):
        file = folder / "sub" / f"{name}.tar"
        file.write_bytes(file.read_bytes()[:900])
    source = SourceConfig(path=str(folder / "sub"))
    problems = check_inputs(tiny_experiment(folder, data={"sources": (source,)}))
    assert [problem.value for problem in problems] == [str(folder / "sub" / f"{name}.tar") for name in ("a", "c")]
    [problem] = check_inputs(tiny_experiment(folder, data={"sources": (SourceConfig(path=str(folder)),)}))
    assert problem.fix == f"name the folder that holds them, e.g. {folder / 'sub'}"


def test_missing_data_set_is_a_problem(folder: Path) -> None:
    (problem,) = found(folder, data={"sources": ()})
    assert problem.startswith("data.sources = (): no data set is named; ")


def test_output_must_be_a_folder_that_can_be_created(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = folder / "data.jsonl"
    (problem,) = found(folder, output=str(rows / "run"))
    assert problem.startswith(f"output = '{rows}/run': {rows} is not a folder; ")
    assert found(folder, output=str(folder / "new" / "run")) == [] and not (folder / "new").exists()
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK or not mode & os.W_OK)
    (problem,) = found(folder, output=str(folder / "new"))
    assert problem.startswith(f"output = '{folder}/new': {folder} is not writable for this user; ")


def test_broken_tokenizer_is_named(folder: Path) -> None:
    broken = folder / "tokenizer.json"
    broken.write_text("{}")
    (problem,) = found(folder, data={"tokenizer": str(broken)})
    assert problem.startswith(f"data.tokenizer = {str(broken)!r}: cannot be used")


def test_vocabulary_must_fit_the_decoder(folder: Path) -> None:
    (problem,) = found(folder, model={"decoder": {"vocab_size": 512}})
    assert problem.startswith("model.decoder.vocab_size = 512: the tokenizer needs 600 tokens; make it at least 600")


def test_control_tokens_must_be_in_the_tokenizer(folder: Path) -> None:
    content = json.loads(Path(TOKENIZER).read_text())
    for token in content["added_tokens"]:
        token["content"] = token["content"].replace("im_start", "im_other")
    vocabulary = content["model"]["vocab"]
    vocabulary["<|im_other|>"] = vocabulary.pop("<|im_start|>")
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (problem,) = found(folder, data={"tokenizer": str(folder / "tokenizer.json")})
    assert problem.startswith("data.template = 'chatml': the tokenizer has no <|im_start|>;")


def test_legacy_separators_must_be_in_the_vocabulary(folder: Path) -> None:
    (problem,) = found(folder, model={"slicing": {"separators": "legacy"}})
    assert problem == "model.slicing.separators = 'legacy': needs token 29892, the decoder has 1024; use real"
