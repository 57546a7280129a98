"""The demo data: what it holds, that it is the same every time, and what happens when something is missing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import Tokenizer

from sicog_mcore.commands.demo_data import SPECIAL_TOKENS, VOCAB_SIZE
from sicog_mcore.commands.picture_sources import CAPTIONS
from tools.prepare_demo_data import main

NUM_SHAPES = 12
NUM_PHOTOS = 18


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "demo"
    assert main(["--out", str(out), "--vqa-images", str(NUM_SHAPES)]) == 0
    return out


@pytest.fixture
def rows(demo: Path) -> list[dict]:
    return [json.loads(line) for line in (demo / "train.jsonl").read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_rows_have_unique_ids_existing_images_and_alternating_turns(demo: Path, rows: list[dict]) -> None:
    assert len({row["id"] for row in rows}) == len(rows) == NUM_SHAPES + 3 * NUM_PHOTOS + 12
    for row in rows:
        speakers = [turn["from"] for turn in row["conversations"]]
        assert speakers == ["human", "gpt"] * (len(speakers) // 2)
        assert all(turn["value"].strip() for turn in row["conversations"])
        texts = [turn["value"] for turn in row["conversations"]]
        assert [text.count("<image>") for text in texts] == [int("image" in row)] + [0] * (len(texts) - 1)
        assert "image" not in row or (demo / row["image"]).is_file()


def test_rows_say_who_wrote_their_text(rows: list[dict]) -> None:
    for row in rows:
        expected = "easy-vqa" if row["id"].startswith("shape-") else "written for sicog_mcore"
        assert row["caption_source"] == expected


def test_most_photographs_are_large_enough_to_be_sliced(demo: Path) -> None:
    sizes = [Image.open(path).size for path in (demo / "images").iterdir() if not path.name.startswith("shape")]
    assert len(sizes) == NUM_PHOTOS
    assert sum(width * height > 336**2 for width, height in sizes) >= 16


def test_tokenizer_fits_the_tiny_preset_and_loses_nothing(demo: Path, rows: list[dict]) -> None:
    tokenizer = Tokenizer.from_file(str(demo / "tokenizer.json"))
    assert tokenizer.get_vocab_size() <= VOCAB_SIZE
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2]
    texts = [turn["value"] for row in rows for turn in row["conversations"]] + ["Grüße, 中文\n\t\x00"]
    assert all(tokenizer.decode(tokenizer.encode(text).ids) == text for text in texts)
    assert [len(tokenizer.encode(separator).ids) for separator in (",", "\n")] == [1, 1]


def test_readme_names_origin_and_licence_of_every_photograph(demo: Path) -> None:
    readme = (demo / "README.md").read_text(encoding="utf-8")
    captions = json.loads(CAPTIONS.read_text(encoding="utf-8"))
    for photo in captions["photos"]:
        assert f"| {Path(photo['file']).name} | {photo['origin']} | {photo['licence']} |" in readme


def test_second_run_recognises_a_complete_folder(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (demo / "manifest.json").stat().st_mtime_ns
    assert main(["--out", str(demo), "--vqa-images", str(NUM_SHAPES)]) == 0
    assert "already complete" in capsys.readouterr().out
    assert (demo / "manifest.json").stat().st_mtime_ns == before


def test_damaged_folder_is_made_again_with_the_same_bytes(demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    arguments = ["--out", str(out), "--vqa-images", str(NUM_SHAPES)]
    assert main(arguments) == 0
    (out / "images" / "coffee.png").write_bytes(b"damaged")
    (out / "stray.txt").write_text("left over")
    assert main(arguments) == 0
    assert contents(out) == contents(demo)
    assert list(tmp_path.iterdir()) == [out]


def test_folder_with_other_contents_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["--out", str(tmp_path)]) == 2
    assert "is not demo data" in capsys.readouterr().err
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


def test_missing_package_is_one_line_that_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "skimage" else find_spec(name))
    assert main(["--out", str(tmp_path / "demo")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "scikit-image is not installed" in error and "pip install -e .[demo]" in error
    assert not (tmp_path / "demo").exists()


def test_more_shapes_than_exist_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "demo"), "--vqa-images", "4001"]) == 2
    assert "easy-vqa has 4000 training images" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
