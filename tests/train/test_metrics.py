"""Metrics are written for every step, and a run adds them up."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sicog_mcore.train.metrics import (
    METRICS_FILE,
    TENSORBOARD_FOLDER,
    TENSORBOARD_GROUPS,
    HeldOutStats,
    MetricsLog,
    StepStats,
    Summary,
)

STATS = StepStats(
    step=1,
    loss=4.0,
    grad_norm=1.5,
    lr=1e-3,
    step_s=2.0,
    data_wait_s=0.5,
    samples=8,
    decoder_tokens=3000,
    supervised_tokens=400,
    images=6,
    slices=20,
    pack_fill=0.75,
    quarantined=1,
    truncated=0,
    peak_memory_gib=0.5,
    tflops=0.25,
    mfu=None,
)


def at(step: int, **changes: float) -> StepStats:
    return replace(STATS, step=step, **changes)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def board(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / TENSORBOARD_FOLDER)).Reload()


def test_rates_are_counts_over_the_time_of_the_step() -> None:
    assert (STATS.tokens_per_s, STATS.images_per_s, STATS.slices_per_s) == (1500, 3, 10)


def test_every_step_is_one_line_that_can_be_read_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, first_step=1, tensorboard=False)
    log.write(at(1))
    log.write(at(2, loss=3.0))
    first, second = records(tmp_path)  # before the file is closed
    log.close()
    assert (first["loss"], second["loss"], second["step"], first["tokens_per_s"]) == (4.0, 3.0, 2, 1500.0)
    assert second["time"] >= first["time"] > 1.7e9
    assert not (tmp_path / TENSORBOARD_FOLDER).exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_null(tmp_path: Path, value: float) -> None:
    log = MetricsLog(tmp_path, first_step=1, tensorboard=False)
    log.write(at(1, loss=value))
    log.close()
    assert records(tmp_path)[0]["loss"] is None
    assert records(tmp_path)[0]["mfu"] is None


def test_resumed_run_replaces_the_steps_it_repeats(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, first_step=1, tensorboard=False)
    for step in (1, 2, 3):
        log.write(at(step))
    log.close()
    with (tmp_path / METRICS_FILE).open("a") as torn:
        torn.write('{"step": 4, "lo')
    log = MetricsLog(tmp_path, first_step=3, tensorboard=False)
    log.write(at(3, loss=1.0))
    log.close()
    assert [(record["step"], record["loss"]) for record in records(tmp_path)] == [(1, 4.0), (2, 4.0), (3, 1.0)]
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


def test_tensorboard_holds_every_group_and_continues_after_a_resume(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, first_step=1, tensorboard=True)
    for step in (1, 2, 3):
        log.write(at(step, grad_norm=math.nan))
    log.close()
    log = MetricsLog(tmp_path, first_step=3, tensorboard=True)
    log.write(at(3, loss=1.0, mfu=0.4))
    log.close()
    events = board(tmp_path)
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert events.Scalars("train/loss")[-1].value == 1.0
    assert [event.step for event in events.Scalars("train/grad_norm")] == [3]
    assert set(events.Tags()["scalars"]) == {
        f"{group}/{name}" for group, names in TENSORBOARD_GROUPS.items() for name in names
    }


def test_held_out_numbers_stand_in_the_step_they_were_measured_after(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, first_step=1, tensorboard=True)
    log.write(STATS)
    measured = HeldOutStats(held_out_loss=1.5, held_out_perplexity=math.inf, held_out_tokens=7, held_out_refused=1)
    log.write(replace(STATS, step=2, held_out=measured))
    log.close()
    first, second = records(tmp_path)
    assert not any(name.startswith("held_out") for name in first)
    assert (second["held_out_loss"], second["held_out_tokens"], second["held_out_refused"]) == (1.5, 7, 1)
    assert second["held_out_perplexity"] is None and second["held_out_accuracy"] is None
    events = board(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("held_out/held_out_loss")] == [(2, 1.5)]
    assert "held_out/held_out_accuracy" not in events.Tags()["scalars"]


def test_every_number_of_a_step_has_a_place_in_tensorboard() -> None:
    assert {name for names in TENSORBOARD_GROUPS.values() for name in names} == set(STATS.values()) - {"step"}


def test_summary_adds_up_what_the_steps_held() -> None:
    summary = Summary()
    for stats in (at(5), at(6, step_s=4.0, pack_fill=0.85), at(7, loss=2.0, step_s=3.0, pack_fill=0.8, quarantined=3)):
        summary.add(stats)
    assert summary.first is not None and summary.last is not None
    assert (summary.first.loss, summary.last.loss, summary.last.quarantined) == (4.0, 2.0, 3)
    assert (summary.samples, summary.decoder_tokens, summary.images, summary.slices) == (24, 9000, 18, 60)
    assert (summary.seconds, summary.median_step_s) == (9.0, 3.0)
    assert summary.mean_pack_fill == pytest.approx(0.8)
