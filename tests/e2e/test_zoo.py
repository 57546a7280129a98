"""Bad samples cost only themselves: each is written down with its reason, counted, and a run full of them is stopped."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from sicog_mcore.config import Experiment, SourceConfig
from sicog_mcore.data.loader import Loader
from sicog_mcore.data.quarantine import Quarantine
from sicog_mcore.errors import EXIT_GIVE_UP
from tests.builders import tiny_experiment, write_dataset
from tests.data.zoo import IMAGES_FOLDER, OK, ROWS_FILE, ZooCase, build_zoo
from tests.e2e.runs import PATIENCE_S, consumed_ids, read_metrics, start_launcher

STEPS = 3
NUM_GOOD_ROWS = 20


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[ZooCase]]:
    """A folder with ordinary rows in ``data.jsonl`` and the zoo in ``zoo``."""
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, NUM_GOOD_ROWS)
    return folder, build_zoo(folder / "zoo")


def _zoo_source(folder: Path) -> SourceConfig:
    return SourceConfig(path=str(folder / "zoo" / ROWS_FILE), images=str(folder / "zoo" / IMAGES_FOLDER))


def _with_sources(experiment: Experiment, *sources: SourceConfig) -> Experiment:
    return replace(experiment, data=replace(experiment.data, sources=sources))


def _quarantined(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in output.glob("quarantine-*.jsonl") for line in path.read_text().splitlines()]


def _expected(folder: Path, cases: list[ZooCase]) -> dict[str, tuple[tuple[str, str], str]]:
    """Origin of each bad row -> what it may be called, and its reason; rows stand in every other line."""
    path = folder / "zoo" / ROWS_FILE
    return {
        f"{path}:{2 * case.row + 1}": ((case.name, f"row {case.row}"), case.expected)
        for case in cases
        if case.expected != OK
    }


def _consumed(cases: list[ZooCase]) -> list[str]:
    """Ids of the good rows; the last one brings none."""
    return [
        f"zoo-{case.row}" if case.name == "good_after_all_that" else case.name for case in cases if case.expected == OK
    ]


def test_each_bad_row_has_its_reason_and_each_good_one_is_consumed(
    zoo: tuple[Path, list[ZooCase]], tmp_path: Path
) -> None:
    folder, cases = zoo
    experiment = _with_sources(tiny_experiment(folder, train={"packs_per_step": 1}), _zoo_source(folder))
    loader = Loader(experiment, 0, 1, Quarantine(tmp_path / "quarantine-0.jsonl", 1.0, 1000))
    ids: list[str] = []
    while loader.state().epoch == 0:
        ids += next(loader).sample_ids
    loader.close()
    assert sorted(ids) == sorted(_consumed(cases))
    lines, expected = _quarantined(tmp_path), _expected(folder, cases)
    assert len(lines) == len(expected) > 40
    for line in lines:
        names, reason = expected[line["origin"]]
        assert line["id"] in names and line["reason"] == reason and line["detail"] and line["epoch"] == 0


def _launch(experiment: Experiment, folder: Path, ranks: int) -> tuple[int, str]:
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(experiment.to_dict()))
    process = start_launcher(["--config", str(config)], ranks)
    printed, _ = process.communicate(timeout=PATIENCE_S)
    return process.returncode, printed


@pytest.mark.slow
def test_training_goes_on_and_counts_what_it_left_out(zoo: tuple[Path, list[ZooCase]], tmp_path: Path) -> None:
    folder, cases = zoo
    output = tmp_path / "run"
    experiment = tiny_experiment(
        folder,
        output=str(output),
        parallel={"tensor": 2},
        train={"steps": STEPS, "packs_per_step": 2, "tensorboard": False},
        data={"max_bad_rate": 1.0},
    )
    experiment = _with_sources(experiment, *experiment.data.sources, _zoo_source(folder))
    code, printed = _launch(experiment, tmp_path, ranks=2)
    assert code == 0, printed
    lines, metrics = _quarantined(output), read_metrics(output)
    first_epoch = {line["origin"]: line["reason"] for line in lines if line["epoch"] == 0}
    assert first_epoch == {origin: reason for origin, (_, reason) in _expected(folder, cases).items()}
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert all(line["loss"] > 0 for line in metrics)
    assert metrics[-1]["quarantined"] == len(lines)
    assert f"quarantined {len(lines)}," in printed.splitlines()[-4] and "Traceback" not in printed
    consumed = {name for ids in consumed_ids(output).values() for name in ids}
    assert consumed == {*_consumed(cases), *(f"s{i}" for i in range(NUM_GOOD_ROWS))}


def _write_mostly_bad(folder: Path) -> None:
    """120 bad rows in four ways, 20 good ones, in ``bad.jsonl``."""
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    shown = next(row for row in rows if "image" in row)
    lines = [json.dumps({**rows[i], "id": f"good-{i}"}) for i in range(20)]
    lines += [json.dumps({**shown, "id": f"lost-{i}", "image": f"lost-{i}.jpg"}) for i in range(60)]
    lines += ["{" for _ in range(40)]
    lines += [json.dumps({"id": f"empty-{i}"}) for i in range(15)]
    lines += [json.dumps({**shown, "id": f"early-{i}", "conversations": []}) for i in range(5)]
    (folder / "bad.jsonl").write_text("\n".join(lines))


@pytest.mark.slow
def test_more_than_one_percent_of_the_set_stops_the_run_before_it_is_trained_on(
    zoo: tuple[Path, list[ZooCase]], tmp_path: Path
) -> None:
    folder, _ = zoo
    _write_mostly_bad(folder)
    experiment = tiny_experiment(
        folder, output=str(tmp_path / "run"), parallel={"tensor": 2}, data={"window_samples": 256}
    )
    assert (experiment.data.max_bad_rate, experiment.data.bad_window) == (0.01, 10_000)
    bad = SourceConfig(path=str(folder / "bad.jsonl"), images=str(folder / "images"))
    code, printed = _launch(_with_sources(experiment, bad), tmp_path, ranks=2)
    ours = printed[: printed.index("torch/distributed/elastic")]  # what follows is the report of torchrun
    assert code != 0 and f"exitcode  : {EXIT_GIVE_UP} " in printed and "Traceback" not in ours
    message = ours[ours.index("error: ") :].splitlines()
    assert printed.count("error: ") == 1 and message[0] == (
        "error: too many bad rows: 120 of 140 rows are bad, a share of 0.8571, in epoch 0; limit 0.01 (data.max_bad_rate): "
        "at most 1 of the set's 140 rows"
    )
    reasons = [re.match(r"  - (\d+) x (\w+), first met at .*/bad\.jsonl:\d+: ", line) for line in message[1:4]]
    assert [match and match[2] for match in reasons] == ["image_missing", "json_invalid", "field_missing"]
    report = tmp_path / "run" / "quarantine-0.jsonl"
    assert message[4] == "  - 5 x turns_order"
    assert message[5].startswith(f"all are listed in {report}; repair the data or raise data.max_bad_rate")
    assert len(report.read_text().splitlines()) == 120 and not (tmp_path / "run" / "checkpoints").exists()
