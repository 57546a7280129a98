"""Rank 0 shows the run on a terminal and in a log file."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console as Screen

from sicog_mcore.config import Experiment, OptimConfig, ParallelConfig, SourceConfig
from sicog_mcore.presets import tiny
from sicog_mcore.train.console import (
    Console,
    RunFacts,
    bar_text,
    count_text,
    duration_text,
    finish_lines,
    resume_text,
    start_lines,
    step_line,
)
from sicog_mcore.train.flops import CONVENTION
from sicog_mcore.train.metrics import HeldOutStats, StepStats, Summary

COMMAND = "torchrun --nproc-per-node 2 launch/pretrain_stage15.py --config examples/demo.yaml"
CHECKPOINT = Path("runs/tiny/step_60")


def stats(step: int, mfu: float | None = None, quarantined: int = 0) -> StepStats:
    return StepStats(
        step=step,
        loss=6.0 / step,
        grad_norm=1.25,
        lr=2e-3,
        step_s=0.5,
        data_wait_s=0.01,
        samples=10,
        decoder_tokens=2000,
        supervised_tokens=300,
        images=8,
        slices=30,
        pack_fill=0.9,
        quarantined=quarantined,
        truncated=0,
        peak_memory_gib=0.0,
        tflops=0.125,
        mfu=mfu,
    )


def screen(terminal: bool, width: int = 100) -> tuple[Screen, io.StringIO]:
    text = io.StringIO()
    return Screen(file=text, force_terminal=terminal, width=width, highlight=False, color_system=None), text


@pytest.fixture
def experiment() -> Experiment:
    base = tiny()
    return replace(
        base,
        data=replace(base.data, sources=(SourceConfig(path="data/demo/train.jsonl"),)),
        parallel=ParallelConfig(tensor=2, sequence=True),
        optim=OptimConfig(lr=1e-3, warmup_fraction=0.05, freeze=("tower",)),
    )


@pytest.fixture
def facts() -> RunFacts:
    parameters = {"tower": 303_500_000, "resampler": 69_000_000, "decoder": 7_616_000_000}
    return RunFacts(
        parameters=parameters,
        num_rows=366,
        world_size=4,
        device="cpu",
        layers="local",
        attention="sdpa (no CUDA device)",
        memory="about 0.1 GiB by arithmetic",
    )


def test_banner_names_parts_layout_device_attention_and_convention(experiment: Experiment, facts: RunFacts) -> None:
    banner = "\n".join(start_lines(experiment, facts))
    for expected in (
        "tower 303.5 M (frozen) + resampler 69 M + decoder 7.616 B = 7.989 B parameters",
        "366 rows from 1 source\n",
        "4 packs of 1,024 tokens and 32 slices",
        "60 steps, peak lr 0.001 after 3 warm-up steps",
        "TP 2 x PP 1 x DP 2 on 4 ranks, sequence parallel",
        "cpu, fp32",
        "sdpa (no CUDA device)",
        CONVENTION,
    ):
        assert expected in banner


def test_counts_and_durations_are_short() -> None:
    assert [count_text(n) for n in (12, 69_000, 303_500_000, 7_615_616_512)] == ["12", "69 k", "303.5 M", "7.616 B"]
    assert [duration_text(s) for s in (0.4, 83, 90_061)] == ["0:00:00", "0:01:23", "1 day, 1:01:01"]


def test_resume_text_says_what_was_found_and_what_happens() -> None:
    assert resume_text(None, 0, 60, "runs/x") == "no checkpoint in runs/x: starting at step 1 of 60"
    assert resume_text(CHECKPOINT, 20, 60, "runs/x") == f"resuming from {CHECKPOINT}: 20 of 60 steps are done"
    assert "this run is complete" in resume_text(CHECKPOINT, 60, 60, "runs/x")


def test_step_line_has_every_rate_and_the_time_left() -> None:
    assert step_line(stats(12), 600, eta_s=294) == (
        "step  12/600 | loss 0.5000 | grad norm 1.25 | lr 2.00e-03 | 4,000 tokens/s | 16.0 images/s | 0.125 TFLOP/s"
        " | fill 90% | data wait 2% | ETA 0:04:54"
    )
    assert "0.125 TFLOP/s (MFU 41.2%)" in step_line(stats(12, mfu=0.412), 600, 0)
    assert "quarantined 3" in step_line(stats(12, quarantined=3), 600, 0)
    assert bar_text(stats(12, 0.4, 3), 60) == "loss 0.5000  4,000 tokens/s  MFU 40.0%  quarantined 3  ETA 0:01:00"


def test_a_measured_step_says_what_was_found_whatever_the_interval() -> None:
    found = HeldOutStats(held_out_loss=2.0, held_out_perplexity=7.389, held_out_accuracy=0.25, held_out_questions=1200)
    target, text = screen(terminal=False)
    console = Console(is_main=True, log_every=10, screen=target)
    console.step(stats(3), 25)
    console.step(replace(stats(4), held_out=found), 25)
    (line,) = text.getvalue().splitlines()
    assert line.startswith(
        "step  4/25 | loss 1.5000 | held-out loss 2.0000, perplexity 7.389 | accuracy 25.0% of 1,200"
    )


def test_summary_names_results_places_and_the_command_that_resumes(experiment: Experiment) -> None:
    summary = Summary()
    for step in range(21, 61):
        summary.add(stats(step, quarantined=2))
    text = "\n".join(finish_lines(summary, experiment, CHECKPOINT, COMMAND))
    for expected in (
        "60 of 60 steps done, 40 of them now in 0:00:20",
        "0.2857 at step 21, 0.1000 at step 60",
        "4,000 decoder tokens/s, 16.0 images/s, 60.0 slices/s; median step 0.5 s",
        "400 samples, pack fill 90.0%, quarantined 2, truncated 0",
        str(CHECKPOINT),
        "runs/tiny/metrics.jsonl, runs/tiny/tensorboard",
        COMMAND,
    ):
        assert expected in text


def test_summary_of_a_finished_run_still_names_checkpoint_and_command(experiment: Experiment) -> None:
    lines = finish_lines(Summary(), experiment, CHECKPOINT, COMMAND)
    assert lines[0] == "nothing left to train"
    assert str(CHECKPOINT) in lines[1] and COMMAND in lines[-1]


def test_log_file_gets_one_whole_line_per_interval_and_the_last_step() -> None:
    target, text = screen(terminal=False, width=40)
    console = Console(is_main=True, log_every=10, screen=target)
    for step in range(1, 26):
        console.step(stats(step), 25)
    lines = text.getvalue().splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["step 10/25", "step 20/25", "step 25/25"]
    assert lines[0].endswith("ETA 0:00:08")  # 15 steps of 0.5 s


def test_terminal_gets_a_bar_with_loss_speed_and_time_left() -> None:
    target, text = screen(terminal=True)
    console = Console(is_main=True, screen=target)
    console.step(stats(1), 4)
    console.notice("checkpoint [saved]")
    console.step(stats(4), 4)
    console.finish(["done", "loss       1.0"])
    assert "step 4/4" in text.getvalue() and "loss 1.5000  4,000 tokens/s  ETA 0:00:00" in text.getvalue()
    assert "checkpoint [saved]" in text.getvalue()
    assert text.getvalue().endswith("loss       1.0\n")
    console.close()


@pytest.mark.parametrize("terminal", [False, True])
def test_other_ranks_are_silent(terminal: bool) -> None:
    target, text = screen(terminal)
    console = Console(is_main=False, screen=target)
    console.start(["title", "a line"])
    console.notice("note")
    console.step(stats(1), 1)
    console.finish(["title", "a line"])
    assert text.getvalue() == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_in_a_message_steers_the_terminal_or_is_taken_for_markup(terminal: bool) -> None:
    target, text = screen(terminal)
    console = Console(is_main=True, screen=target)
    console.start(["\x1b]0;PWN\x07", "output     \x1b[2Jruns/[bold]x[/bold]\u202e"])
    console.notice("ignored [red]step_1\x9b31m\r: its save was\n  interrupted")
    shown = text.getvalue()
    for raw in ("\x1b]", "\x1b[2J", "\x9b", "\u202e", "\x07"):
        assert raw not in shown
    for code in ("\\x1b]0;PWN\\x07", "\\x1b[2Jruns/[bold]x[/bold]\\u202e", "[red]step_1\\x9b31m\\r: its save was"):
        assert code in shown
    assert [line.rstrip() for line in shown.splitlines()][-1] == "  interrupted"


@pytest.mark.parametrize("terminal", [True, False])
def test_the_command_that_resumes_stays_one_line(terminal: bool, experiment: Experiment) -> None:
    command = 'python launch/a.py --data.sources \'[{"path": "' + "long/" * 30 + "rows.jsonl\"}]'"
    target, text = screen(terminal, width=60)
    Console(is_main=True, screen=target).finish(finish_lines(Summary(), experiment, CHECKPOINT, command))
    assert any(line.endswith(command) for line in text.getvalue().splitlines())
