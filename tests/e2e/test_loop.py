"""The whole loop as a user starts it: once straight, and killed at random moments. A loop of captions, short and tiny."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image, ImageDraw

from sicog_mcore.cognition.prompts import ask, find_prompt
from sicog_mcore.cognition.records import Decision, Generation, read_by_id
from tests.builders import TOKENIZER
from tests.e2e.runs import REPOSITORY

pytestmark = [pytest.mark.loop, pytest.mark.timeout(1500)]
COLOURS = ("red", "blue", "green", "yellow")
RESULTS = ("curated/train.jsonl", "decisions.jsonl", "pairs.jsonl")
SECONDS_BETWEEN_KILLS = (1.0, 12.0)
KILLS, SEED = 10, 20


def write_data(folder: Path) -> None:
    """Squares of four colours: rows with captions and answers, rows without, and a benchmark."""
    (folder / "images").mkdir(parents=True)
    caption, direct = find_prompt("caption"), find_prompt("direct")
    rows: dict[str, list[dict[str, Any]]] = {"labelled": [], "unlabelled": [], "benchmark": []}
    for number in range(16):
        colour, name = COLOURS[number % len(COLOURS)], f"images/{number}.png"
        image = Image.new("RGB", (48, 48), "white")
        ImageDraw.Draw(image).rectangle((number, 8, number + 24, 32), fill=colour)
        image.save(folder / name)
        if number < 8:
            turns = [(ask(caption, "", 1), f"{colour} square."), (ask(direct, "What color is it?", 1), colour)]
            for index, (question, answer) in enumerate(turns):
                talk = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
                rows["labelled"].append({"id": f"l{number}-{index}", "image": name, "conversations": talk})
        elif number < 14:
            rows["unlabelled"].append({"id": f"u{number}", "image": name})
        else:
            rows["benchmark"].append(
                {"id": f"b{number}", "image": name, "question": "What color is it?", "answer": colour}
            )
    rows["unlabelled"].append({"id": "gone", "image": "images/gone.png"})
    for file, content in rows.items():
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


def write_loop(path: Path, data: Path) -> None:
    labelled = {"data.sources": [{"path": f"{data}/labelled.jsonl", "images": str(data)}]}
    common = {
        "preset": "tiny",
        "data.tokenizer": TOKENIZER,
        "data.system_prompt": "",
        "data.token_budget": 256,
        "train.samples_per_step": 8,
        "train.tensorboard": False,
        "train.steps": 2,
        "optim.lr": 4e-3,
        "checkpoint.every_steps": 5,
    }
    values = {
        "output": "runs/loop",  # the same in every folder: it stands in the checkpoints
        "items": {"images": str(data), "captions": [f"{data}/unlabelled.jsonl"]},
        "stages": {
            "common": {"set": common},
            "align": {"set": labelled},
            "perception": {"set": labelled | {"train.steps": 30}},  # until it knows how to end an answer
            "finetune": {"set": labelled},
        },
        "generation": {"captions": {"caption": 3, "cod": 3}, "max_new_tokens": 24, "batch": 4},
        "curation": {"tau": [0.2], "image_radius": -1, "evaluation_radius": -1, "min_share": 0},
        "evaluation": {"benchmark": f"{data}/benchmark.jsonl", "images": str(data), "max_new_tokens": 4},
    }
    path.write_text(yaml.safe_dump(values))


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    """The command of a user in a folder, in a process group of its own."""
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / "launch/self_improve.py"), "--config", "loop.yaml", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def results(folder: Path) -> dict[str, bytes]:
    return {name: (folder / "runs/loop/round_1" / name).read_bytes() for name in RESULTS}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A loop that nobody disturbed: its folder, and what it said."""
    folder = tmp_path_factory.mktemp("straight")
    write_data(folder / "data")
    write_loop(folder / "loop.yaml", folder / "data")
    process = start(folder)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return folder, said


def test_the_loop_goes_from_labels_to_a_report_and_a_comparison(straight: tuple[Path, str]) -> None:
    folder, said = straight
    place = folder / "runs/loop/round_1"
    generations = read_by_id(place / "generations.jsonl", Generation)
    decisions = read_by_id(place / "decisions.jsonl", Decision)
    assert list(generations) == list(decisions) == [*(f"u{number}" for number in range(8, 14)), "gone"]
    assert {len(record.candidates) for record in generations.values()} == {6, 0}
    assert decisions["gone"].reason == generations["gone"].failure == "image_missing"
    rows = [json.loads(line) for line in (place / "curated/train.jsonl").read_text().splitlines()]
    assert {row["record"] for row in rows} == {name for name, decision in decisions.items() if decision.kept} != set()
    assert json.loads((place / "comparison.json").read_text())[0]["n"] == 2
    assert (place / "report.html").stat().st_size > 10_000
    assert "report: runs/loop/round_1/report.html" in said.replace("\n", "")
    ledger = json.loads((folder / "runs/loop/ledger.json").read_text())
    assert len(ledger) == 17
    assert [row["step"] for row in ledger if row["tokens"] and row["device_seconds"]] == [
        *(
            "stage1",
            "baseline.stage15",
            "baseline.stage2",
            "stage0.perception",
            "baseline.evaluation",
            "round_1.captions",
        ),
        *("round_1.stage15", "round_1.stage2", "round_1.evaluation"),
    ]


def test_a_finished_loop_has_nothing_to_do_and_a_new_threshold_generates_nothing(straight: tuple[Path, str]) -> None:
    folder, _ = straight
    said, _ = start(folder).communicate()
    assert "17 steps: 17 done" in said
    values = yaml.safe_load((folder / "loop.yaml").read_text())
    values["curation"]["tau"] = [0.21]
    (folder / "loop.yaml").write_text(yaml.safe_dump(values))
    said, _ = start(folder, "--plan").communicate()
    assert "17 steps: 10 done, 1 will run, 6 may run" in said


def test_killed_at_ten_random_moments_it_ends_with_the_same_curated_bytes(
    straight: tuple[Path, str], tmp_path: Path
) -> None:
    write_loop(tmp_path / "loop.yaml", straight[0] / "data")
    stamp, chance = tmp_path / "runs/loop/steps/round_1.curate.json", random.Random(SEED)
    killed_in: list[str] = []
    for kill in range(KILLS + 1):
        process = start(tmp_path)
        end = time.monotonic() + (chance.uniform(*SECONDS_BETWEEN_KILLS) if kill < KILLS else 600)
        while time.monotonic() < end and process.poll() is None and not is_finished(stamp):
            time.sleep(0.05)
        assert process.poll() in (None, 0), process.communicate()[0]
        os.killpg(process.pid, signal.SIGKILL)
        said = process.communicate()[0]
        killed_in.append(said.splitlines()[-1] if said else "before it said anything")
        if is_finished(stamp):
            break
    assert is_finished(stamp), killed_in
    assert len(killed_in) > KILLS / 2  # it did not end before most of them came
    assert results(tmp_path) == results(straight[0]), killed_in


def is_finished(stamp: Path) -> bool:
    return stamp.is_file() and json.loads(stamp.read_text())["is_finished"]
