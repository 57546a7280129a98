"""The loop demonstration data (loop_demo_data.py): rows that training and generation accept, apart, the same every time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sicog_mcore.cognition.codec import parse
from sicog_mcore.cognition.generation.items import read_items
from sicog_mcore.config import DataConfig, SourceConfig
from sicog_mcore.data.sources import open_sources

PROJECT = Path(__file__).parents[2]
TRAINED = ("labelled", "cod", "caption", "cot", "direct")


def prepare(out: Path) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(PROJECT), str(PROJECT / "kernels")])
    command = [sys.executable, str(PROJECT / "tools/prepare_loop_demo.py"), "--out", str(out)]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "loop_demo"
    assert prepare(out).returncode == 0
    return out


def rows(demo: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (demo / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", TRAINED)
def test_every_training_row_is_accepted(demo: Path, name: str) -> None:
    samples = open_sources([SourceConfig(path=str(demo / f"{name}.jsonl"), images=str(demo))], DataConfig())
    assert len([samples.read(number) for number in range(len(samples))]) >= 64


@pytest.mark.parametrize("name", ["cod", "cot"])
def test_annotated_answers_have_all_their_steps(demo: Path, name: str) -> None:
    answers = [row["conversations"][1]["value"] for row in rows(demo, name)]
    assert all(parse(answer, name).steps for answer in answers)


def test_every_item_can_be_asked_and_has_an_id_of_its_own(demo: Path) -> None:
    items = [item for name in ("unlabelled", "questions") for item in read_items([demo / f"{name}.jsonl"], demo)]
    assert not any(item.failure for item in items)
    assert len({item.id for item in items}) == len(items) == 210
    assert sum(not item.image.startswith("images/shape_") for item in items) == 18  # photographs


def test_no_image_of_the_evaluation_is_trained_on_or_asked_about(demo: Path) -> None:
    images = {name: {row["image"] for row in rows(demo, name)} for name in (*TRAINED, "unlabelled", "evaluation")}
    others = set().union(*(found for name, found in images.items() if name != "evaluation"))
    assert len(images["evaluation"]) == 60 and not images["evaluation"] & others
    assert not images["unlabelled"] & set().union(*(images[name] for name in TRAINED))


def test_a_caption_says_where_the_shape_is(demo: Path) -> None:
    words = {"upper": (0, 1), "middle": (1, 2), "lower": (2, 3), "left": (0, 1), "centre": (1, 2), "right": (2, 3)}
    for row in rows(demo, "caption")[:20]:
        *_, vertical, horizontal = row["conversations"][1]["value"].rstrip(".").split()
        with Image.open(demo / row["image"]) as image:
            colours = image.convert("RGB")
        box = (
            words[horizontal][0] * 64 // 3,
            words[vertical][0] * 64 // 3,
            words[horizontal][1] * 64 // 3,
            words[vertical][1] * 64 // 3,
        )
        assert colours.crop(box).getcolors(4096) != colours.crop((0, 0, 1, 1)).resize((21, 21)).getcolors(4096)


def test_it_is_the_same_every_time_and_spares_what_is_not_its_own(demo: Path, tmp_path: Path) -> None:
    assert prepare(tmp_path / "again").returncode == 0
    for path in (path for path in demo.rglob("*") if path.is_file()):
        assert (tmp_path / "again" / path.relative_to(demo)).read_bytes() == path.read_bytes()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").touch()
    refused = prepare(tmp_path / "mine")
    assert refused.returncode == 2 and "is not this data" in refused.stderr
