from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from sicog_mcore.config import Experiment
from sicog_mcore.data.batch import PackedBatch
from sicog_mcore.data.decode import read_bytes
from sicog_mcore.data.loader import Loader, LoaderState
from sicog_mcore.data.quarantine import Quarantine
from sicog_mcore.data.resume import open_rows
from sicog_mcore.data.sample import ImageRef
from sicog_mcore.errors import DataError
from tests.builders import tiny_experiment, write_dataset, write_image

NUM_SAMPLES = 20
START = LoaderState()
STEPS = 5  # more than one epoch of NUM_SAMPLES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write_dataset(path, NUM_SAMPLES)
    return path


def experiment_on(folder: Path, **data: Any) -> Experiment:
    return tiny_experiment(folder, data={"window_samples": 8, "max_bad_rate": 1.0, **data}, train={"packs_per_step": 2})


def open_loader(
    experiment: Experiment, report: Path, rank: int = 0, size: int = 1, state: LoaderState = START
) -> Loader:
    return Loader(
        experiment, rank, size, Quarantine(report, experiment.data.max_bad_rate, experiment.data.bad_window), state
    )


def content(batch: PackedBatch) -> list[object]:
    values = (vars(batch)[field.name] for field in fields(batch))
    return [(v.dtype, v.tolist()) if isinstance(v, torch.Tensor) else v for v in values]


def consumed(loader: Loader, batches: int) -> list[tuple[str, ...]]:
    return [batch.sample_ids for batch in islice(loader, batches)]


def test_two_runs_give_identical_streams(folder: Path, tmp_path: Path) -> None:
    runs = [open_loader(experiment_on(folder), tmp_path / "q.jsonl") for _ in range(2)]
    for _ in range(4):
        assert content(next(runs[0])) == content(next(runs[1]))


def test_each_epoch_has_every_sample_once_in_another_order(folder: Path, tmp_path: Path) -> None:
    loader = open_loader(experiment_on(folder), tmp_path / "q.jsonl")
    epochs: dict[int, list[str]] = {0: [], 1: []}
    for task, batch in _with_epoch(loader):
        if task > 1:
            break
        epochs[task] += batch.sample_ids
    everything = Counter(f"s{i}" for i in range(NUM_SAMPLES))
    assert Counter(epochs[0]) == Counter(epochs[1]) == everything
    assert epochs[0] != epochs[1]


def _with_epoch(loader: Loader) -> Iterator[tuple[int, PackedBatch]]:
    """Batches with their epoch; a repeated id starts a new epoch."""
    seen: set[str] = set()
    epoch = 0
    for batch in loader:
        if seen & set(batch.sample_ids):
            epoch, seen = epoch + 1, set()
        seen |= set(batch.sample_ids)
        yield epoch, batch


def test_another_seed_gives_another_stream(folder: Path, tmp_path: Path) -> None:
    other = tiny_experiment(folder, data={"window_samples": 8}, train={"packs_per_step": 2, "seed": 7})
    first, second = (open_loader(e, tmp_path / "q.jsonl") for e in (experiment_on(folder), other))
    assert consumed(first, 4) != consumed(second, 4)


def test_two_replicas_consume_the_packs_of_one(folder: Path, tmp_path: Path) -> None:
    alone = consumed(open_loader(experiment_on(folder), tmp_path / "q.jsonl"), 2 * STEPS)
    pair = [consumed(open_loader(experiment_on(folder), tmp_path / "q.jsonl", rank, 2), STEPS) for rank in range(2)]
    assert alone == [pack for step in zip(*pair, strict=True) for pack in step]


@pytest.mark.parametrize("size", [1, 2])
def test_resuming_at_any_step_gives_the_identical_next_batches(folder: Path, tmp_path: Path, size: int) -> None:
    experiment = experiment_on(folder)
    loader = open_loader(experiment, tmp_path / "q.jsonl")
    states, stream = [], []
    for _ in range(STEPS):
        states.append(LoaderState(**json.loads(json.dumps(asdict(loader.state())))))
        stream += [content(batch) for batch in islice(loader, 2)]
    assert states[-1].epoch >= 1
    for step, state in enumerate(states):
        replicas = [open_loader(experiment, tmp_path / "q.jsonl", rank, size, state) for rank in range(size)]
        resumed = [content(next(replicas[i % size])) for i in range(2)]
        assert resumed == stream[2 * step : 2 * step + 2]


@pytest.mark.parametrize("size", [1, 4])
def test_each_image_is_opened_by_one_replica_once_an_epoch(
    folder: Path, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[int, str]] = []  # replica, image
    replica = -1

    def read(image: ImageRef) -> bytes:
        opened.append((replica, image.path))
        return read_bytes(image)

    whole = tiny_experiment(folder, data={"token_budget": 512}, train={"samples_per_step": 20})  # a step an epoch
    rows = open_rows(whole)
    monkeypatch.setattr("sicog_mcore.data.encode.read_bytes", read)
    for replica in range(size):
        quarantine = Quarantine(tmp_path / "q.jsonl", 1.0, 10)
        loader = Loader(whole, replica, size, quarantine, opened=rows)
        while loader.state().epoch == 0:
            next(loader)
        loader.close()
    images = [image for _, image in opened]
    assert sorted(images) == sorted(str(path) for path in (folder / "images").iterdir())  # each once, by one replica
    assert len({number for number, _ in opened}) == size


def test_state_inside_a_step_is_its_start(folder: Path, tmp_path: Path) -> None:
    loader = open_loader(experiment_on(folder), tmp_path / "q.jsonl")
    next(loader)
    assert loader.state() == LoaderState(0, 0, 0)
    next(loader)
    assert loader.state() != LoaderState(0, 0, 0)


@pytest.mark.slow
def test_workers_give_the_batches_of_the_main_process(folder: Path, tmp_path: Path) -> None:
    random_state = torch.get_rng_state()
    alone = open_loader(experiment_on(folder), tmp_path / "q.jsonl")
    shared = open_loader(experiment_on(folder, workers=2), tmp_path / "q.jsonl")
    for _ in range(6):
        assert content(next(alone)) == content(next(shared))
        assert alone.state() == shared.state()
    assert torch.equal(torch.get_rng_state(), random_state)
    shared.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "timeout_s", "message"),
    [(signal.SIGKILL, 120, "decoding stopped"), (signal.SIGSTOP, 20, "no batch within .* is .*stuck")],
)
def test_dead_or_stopped_worker_is_a_clear_error(
    folder: Path, tmp_path: Path, fault: int, timeout_s: int, message: str
) -> None:
    others = set(multiprocessing.active_children())
    loader = open_loader(experiment_on(folder, workers=1, worker_timeout_s=timeout_s), tmp_path / "q.jsonl")
    next(loader)
    (worker,) = set(multiprocessing.active_children()) - others
    assert worker.pid is not None
    time.sleep(0.5)  # the worker has further batches ready, which only a living one can hand over
    os.kill(worker.pid, fault)
    with pytest.raises(DataError, match=message):
        for _ in loader:
            pass
    loader.close()


def spoil(folder: Path) -> dict[str, str]:
    """Makes three samples bad in three ways; returns the reason of each."""
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    (folder / "images" / rows[3]["image"]).unlink()  # seen when planning
    damaged = folder / "images" / rows[6]["image"]  # seen when decoding
    damaged.write_bytes(damaged.read_bytes()[:-200])
    rows[8]["conversations"][-1]["value"] = "yes " * 2000  # seen when planning
    (folder / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return {"s3": "image_missing", "s6": "image_truncated", "s8": "too_long"}


def reported(*reports: Path) -> list[tuple[str, str, int]]:
    lines = [json.loads(line) for report in reports if report.exists() for line in report.read_text().splitlines()]
    return sorted((line["id"], line["reason"], line["epoch"]) for line in lines)


@pytest.mark.parametrize("size", [1, 2])
def test_bad_samples_are_left_out_and_reported_once_an_epoch(tmp_path: Path, size: int) -> None:
    write_dataset(tmp_path, NUM_SAMPLES)
    reasons = spoil(tmp_path)
    experiment = experiment_on(tmp_path)
    reports = [tmp_path / f"q{rank}.jsonl" for rank in range(size)]
    replicas = [open_loader(experiment, reports[rank], rank, size) for rank in range(size)]
    ids: list[str] = []
    while replicas[0].state().epoch < 1:
        for i in range(2):
            ids += next(replicas[i % size]).sample_ids
    first_epoch = [entry for entry in reported(*reports) if entry[2] == 0]
    assert first_epoch == sorted((name, reason, 0) for name, reason in reasons.items())
    assert set(ids) == {f"s{i}" for i in range(NUM_SAMPLES)} - set(reasons)


def test_restart_reports_no_bad_sample_twice(tmp_path: Path) -> None:
    write_dataset(tmp_path, NUM_SAMPLES)
    reasons = spoil(tmp_path)
    experiment, report = experiment_on(tmp_path), tmp_path / "q.jsonl"
    state = LoaderState()
    while state.epoch < 1:
        loader = open_loader(experiment, report, state=state)
        consumed(loader, 2)
        state = loader.state()
    assert [entry[0] for entry in reported(report) if entry[2] == 0] == sorted(reasons)


def test_hole_of_a_bad_image_moves_nothing_else(tmp_path: Path) -> None:
    write_dataset(tmp_path, NUM_SAMPLES)
    whole = consumed(open_loader(experiment_on(tmp_path), tmp_path / "q.jsonl"), 8)
    damaged = next((tmp_path / "images").glob("s6.*"))
    damaged.write_bytes(damaged.read_bytes()[:-200])
    holed = consumed(open_loader(experiment_on(tmp_path), tmp_path / "q.jsonl"), 8)
    assert holed == [tuple(name for name in pack if name != "s6") for pack in whole] != whole


def test_too_many_bad_samples_stop_the_run(tmp_path: Path) -> None:
    write_dataset(tmp_path, NUM_SAMPLES)
    spoil(tmp_path)
    loader = open_loader(experiment_on(tmp_path, max_bad_rate=0.05, window_samples=20), tmp_path / "q.jsonl")
    with pytest.raises(DataError) as caught:
        next(loader)  # before anything is trained on: planning knows
    first, *reasons, advice = str(caught.value).splitlines()
    assert first == (
        "too many bad rows: 2 of 20 rows are bad, a share of 0.1, in epoch 0; limit 0.05 (data.max_bad_rate): "
        "at most 1 of the set's 20 rows"
    )
    places = {"image_missing": 4, "too_long": 9}
    starts = [f"  - 1 x {code}, first met at {tmp_path}/data.jsonl:{line}: " for code, line in places.items()]
    assert all(line.startswith(start) for line, start in zip(sorted(reasons), starts, strict=True))
    assert advice == f"all are listed in {tmp_path}/q.jsonl; repair the data or raise data.max_bad_rate"
    assert reported(tmp_path / "q.jsonl") == [("s3", "image_missing", 0), ("s8", "too_long", 0)]


def test_few_bad_rows_end_no_long_run(tmp_path: Path) -> None:
    write_dataset(tmp_path, NUM_SAMPLES)
    spoil(tmp_path)
    loader = open_loader(experiment_on(tmp_path, max_bad_rate=0.15, bad_window=10_000), tmp_path / "q.jsonl")
    while loader.state().epoch < 12:
        next(loader)
        for plan, rejection in loader.found:
            loader.bad_rows.add(plan.epoch, plan.window, rejection)
        loader.found.clear()
        assert loader.bad_rows.verdict() == ""  # 3 of 20 in every pass
    assert len(reported(tmp_path / "q.jsonl")) >= 3 * 12


def test_a_long_stream_of_bad_rows_is_not_read_to_its_end(tmp_path: Path) -> None:
    row = {"image": "lost.jpg", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]}
    (tmp_path / "images").mkdir()
    (tmp_path / "data.jsonl").write_text((json.dumps(row) + "\n") * 3_000)
    experiment = experiment_on(tmp_path, max_bad_rate=0.2, bad_window=1_000, window_samples=16)
    with pytest.raises(DataError, match="too many bad rows: 1[0-9] of the last 1[0-9] rows are bad, a share of 1, "):
        next(open_loader(experiment, tmp_path / "q.jsonl"))
    assert len(reported(tmp_path / "q.jsonl")) == 16


def test_nothing_usable_in_an_epoch_stops_the_run(tmp_path: Path) -> None:
    write_dataset(tmp_path, NUM_SAMPLES)
    loader = open_loader(experiment_on(tmp_path, token_budget=16), tmp_path / "q.jsonl")
    with pytest.raises(DataError, match="no sample of a whole epoch can be used"):
        next(loader)
    assert len(reported(tmp_path / "q.jsonl")) == NUM_SAMPLES


def test_truncated_samples_are_kept_and_counted(tmp_path: Path) -> None:
    write_dataset(tmp_path, NUM_SAMPLES)
    spoil(tmp_path)
    quarantine = Quarantine(tmp_path / "q.jsonl", 1.0, 10_000)
    loader = Loader(experiment_on(tmp_path, too_long="truncate"), 0, 1, quarantine)
    while loader.state().epoch < 1:
        next(loader)
    assert quarantine.num_truncated >= 1 and "too_long" not in quarantine.reasons


def test_waiting_time_is_measured(folder: Path, tmp_path: Path) -> None:
    loader = open_loader(experiment_on(folder), tmp_path / "q.jsonl")
    next(loader)
    assert loader.wait_s > 0


def test_an_image_that_was_replaced_since_it_was_indexed_is_a_bad_row(tmp_path: Path) -> None:
    write_dataset(tmp_path, NUM_SAMPLES)
    experiment = experiment_on(tmp_path)
    opened = open_rows(experiment)
    changed = next(row for row in range(NUM_SAMPLES) if opened.rows.all.read(row).images)
    sample = opened.rows.all.read(changed)
    write_image(Path(sample.images[0].path), 600, 600, seed=1)
    loader = open_loader(experiment, tmp_path / "q.jsonl")  # opens the index that is there
    ids = [name for epoch, batch in islice(_with_epoch(loader), 30) if epoch == 0 for name in batch.sample_ids]
    assert len(ids) == NUM_SAMPLES - 1 and sample.id not in ids
    first, *_ = (json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines())
    tokens, slices = opened.rows.all.measures(changed) or (0, 0)
    assert (first["reason"], first["id"]) == ("row_changed", sample.id)
    assert f"the index has {tokens} tokens and {slices} slices" in first["detail"]
