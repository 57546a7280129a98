"""The screen of rank 0: a banner, the progress, notices, a summary. Every other rank is silent.

In: Experiment, StepStats, Summary   Out: text
On a terminal the progress is a bar; elsewhere (a log file, a batch job) one plain line per interval.
The functions build text and know nothing of the screen; Console puts it there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median

from rich.console import Console as Screen
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from sicog_mcore import __version__
from sicog_mcore.config import Experiment, ModelPart
from sicog_mcore.errors import printable
from sicog_mcore.train.flops import CONVENTION
from sicog_mcore.train.metrics import METRICS_FILE, TENSORBOARD_FOLDER, StepStats, Summary
from sicog_mcore.train.schedule import warmup_steps

ETA_WINDOW_STEPS = 20
LABEL_WIDTH = 11
RESUME = "resume"


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """The facts about a run that its configuration does not say.

    Attributes:
        parameters: number of parameters of each part, over all ranks.
        num_rows: rows of the data set.
        world_size: ranks.
        device: name of the device, or "cpu".
        layers: whose transformer layers are used, and why.
        attention: back end of packed attention, and why.
        memory: what the run needs on one device, by arithmetic.
    """

    parameters: Mapping[ModelPart, int]
    num_rows: int
    world_size: int
    device: str
    layers: str
    attention: str
    memory: str


def count_text(number: int) -> str:
    """A count of parameters in the unit that leaves up to four digits: 303.5 M, 7.616 B."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return str(number)


def duration_text(seconds: float) -> str:
    """H:MM:SS, days in front."""
    return str(timedelta(seconds=round(seconds)))


def _labelled(label: str, text: str) -> str:
    return f"{label:<{LABEL_WIDTH}}{text}"


def start_lines(experiment: Experiment, facts: RunFacts) -> list[str]:
    """The banner: a title, then one line per topic."""
    model, data, parallel, train = experiment.model, experiment.data, experiment.parallel, experiment.train
    parts = " + ".join(
        f"{part} {count_text(number)}{' (frozen)' if part in experiment.optim.freeze else ''}"
        for part, number in facts.parameters.items()
    )
    side = model.slicing.resolution_px
    # model_size: ranks of one replica of the model.
    replicas = facts.world_size // parallel.model_size
    layout = f"TP {parallel.tensor} x PP {parallel.pipeline} x DP {replicas} on {facts.world_size} ranks"
    extras = [f"virtual stages {parallel.virtual_pipeline}"] if parallel.virtual_pipeline > 1 else []
    extras += ["sequence parallel"] if parallel.sequence else []
    peak = f"peak lr {experiment.optim.lr:g} after {warmup_steps(experiment.optim, train.steps)} warm-up steps"
    return [
        f"sicog_mcore {__version__} · {experiment.preset}",
        _labelled("model", f"{parts} = {count_text(sum(facts.parameters.values()))} parameters"),
        _labelled(
            "slices",
            f"at most {model.slicing.max_slices} and an overview;"
            f" about {side} x {side} px and {model.resampler.queries} visual tokens each",
        ),
        _labelled("data", f"{facts.num_rows:,} rows from {len(data.sources)} source{'s' * (len(data.sources) != 1)}"),
        _labelled("step", _global_batch(experiment)),
        _labelled("schedule", f"{train.steps:,} steps, {peak}"),
        _labelled("layout", ", ".join([layout, *extras])),
        _labelled("device", f"{facts.device}, {train.precision}"),
        _labelled("layers", facts.layers),
        _labelled("attention", facts.attention),
        _labelled("memory", facts.memory),
        _labelled("counting", CONVENTION),
        _labelled("output", experiment.output),
    ]


def _global_batch(experiment: Experiment) -> str:
    data, packs = experiment.data, experiment.packs_per_step
    pack = f"packs of {data.token_budget:,} tokens and {data.slice_budget} slices"
    if not packs:
        return f"{experiment.train.samples_per_step} samples in {pack}"
    return f"{packs} {pack} = {packs * data.token_budget:,} tokens"


def resume_text(checkpoint: Path | None, step: int, steps: int, output: str) -> str:
    """Says which checkpoint was found at the start, and how the run goes on.

    Args:
        checkpoint: the one that was loaded; None if there was none.
        step: optimiser steps that it holds.
        steps: optimiser steps of the whole run.
        output: folder that was searched.
    """
    if checkpoint is None:
        return f"no checkpoint in {output}: starting at step 1 of {steps:,}"
    if step >= steps:
        return f"{checkpoint} holds all {steps:,} steps: this run is complete; raise train.steps to train on"
    return f"resuming from {checkpoint}: {step:,} of {steps:,} steps are done"


def step_line(stats: StepStats, steps_total: int, eta_s: float) -> str:
    """One step in one plain line."""
    width = len(f"{steps_total:,}")
    parts = [
        f"step {stats.step:>{width},}/{steps_total:,}",
        f"loss {stats.loss:.4f}",
        *preference_texts(stats),
        *held_out_texts(stats),
        f"grad norm {stats.grad_norm:.3g}",
        f"lr {stats.lr:.2e}",
        f"{stats.tokens_per_s:,.0f} tokens/s",
        f"{stats.images_per_s:,.1f} images/s",
        f"{stats.tflops:.3g} TFLOP/s" + ("" if stats.mfu is None else f" (MFU {stats.mfu:.1%})"),
        f"fill {stats.pack_fill:.0%}",
        f"data wait {stats.data_wait_s / stats.step_s:.0%}",
    ]
    if stats.peak_memory_gib > 0:
        parts.append(f"{stats.peak_memory_gib:.1f} GiB")
    if stats.quarantined:
        parts.append(f"quarantined {stats.quarantined:,}")
    return " | ".join([*parts, f"ETA {duration_text(eta_s)}"])


def preference_texts(stats: StepStats) -> list[str]:
    """Says how the pairs were judged; empty outside of preference training."""
    judged = stats.preferences
    return [f"preferred {judged.preference_accuracy:.0%}", f"margin {judged.reward_margin:.3g}"] if judged else []


def held_out_texts(stats: StepStats) -> list[str]:
    """Renders the results of held-out rows and questions; nothing after a step that was not measured."""
    found, texts = stats.held_out, []
    if found and found.held_out_loss is not None and found.held_out_perplexity is not None:
        texts.append(f"held-out loss {found.held_out_loss:.4f}, perplexity {found.held_out_perplexity:.4g}")
    if found and found.held_out_accuracy is not None:
        texts.append(f"accuracy {found.held_out_accuracy:.1%} of {found.held_out_questions:,}")
    return texts


def bar_text(stats: StepStats, eta_s: float) -> str:
    """The text behind the progress bar."""
    quarantined = f"  quarantined {stats.quarantined:,}" if stats.quarantined else ""
    mfu = "" if stats.mfu is None else f"  MFU {stats.mfu:.1%}"
    loss = "  ".join([f"loss {stats.loss:.4f}", *preference_texts(stats)])
    return f"{loss}  {stats.tokens_per_s:,.0f} tokens/s{mfu}{quarantined}  ETA {duration_text(eta_s)}"


def finish_lines(summary: Summary, experiment: Experiment, checkpoint: Path, command: str) -> list[str]:
    """The summary of this process's steps: a title, then one line per topic. ``summary`` may be empty.

    Args:
        checkpoint: the newest one.
        command: what the user typed; the same command resumes.
    """
    output = Path(experiment.output)
    files = [str(output / METRICS_FILE)] + [str(output / TENSORBOARD_FOLDER)] * experiment.train.tensorboard
    places = [
        _labelled("checkpoint", str(checkpoint)),
        _labelled("logs", ", ".join(files)),
        _labelled(RESUME, command),
    ]
    first, last = summary.first, summary.last
    if first is None or last is None:
        return ["nothing left to train", *places]
    seconds = summary.seconds
    return [
        f"{last.step:,} of {experiment.train.steps:,} steps done, {last.step - first.step + 1:,} of them now"
        f" in {duration_text(seconds)}",
        _labelled("loss", f"{first.loss:.4f} at step {first.step:,}, {last.loss:.4f} at step {last.step:,}"),
        _labelled(
            "speed",
            f"{summary.decoder_tokens / seconds:,.0f} decoder tokens/s, {summary.images / seconds:,.1f} images/s,"
            f" {summary.slices / seconds:,.1f} slices/s; median step {summary.median_step_s:.3g} s",
        ),
        _labelled(
            "data",
            f"{summary.samples:,} samples, pack fill {summary.mean_pack_fill:.1%},"
            f" quarantined {last.quarantined:,}, truncated {last.truncated:,}",
        ),
        *places,
    ]


class Console:
    """The screen of a run.

    Args:
        is_main: whether this rank speaks; all methods of the others do nothing.
        log_every: steps between two lines where there is no terminal.
        screen: where to write; standard output if it is left out.
    """

    def __init__(self, is_main: bool, log_every: int = 1, screen: Screen | None = None) -> None:
        self._is_main = is_main
        self._log_every = log_every
        self._screen = screen or Screen(highlight=False)
        self._recent_step_s: deque[float] = deque(maxlen=ETA_WINDOW_STEPS)
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def start(self, lines: Sequence[str]) -> None:
        """Shows the banner; the first line is its title."""
        self._show_block(lines, "cyan")

    def notice(self, text: str) -> None:
        """Shows one message, above the bar if there is one."""
        if self._is_main:
            self._write(text)

    def step(self, stats: StepStats, steps_total: int) -> None:
        """Moves the bar, or writes a line if the interval is over; always for the last step."""
        if not self._is_main:
            return
        self._recent_step_s.append(stats.step_s)
        # The median: one step that waited for data or a disk does not move the estimate.
        eta_s = median(self._recent_step_s) * (steps_total - stats.step)
        if self._screen.is_terminal:
            self._move_bar(stats, steps_total, bar_text(stats, eta_s))
        elif stats.step % self._log_every == 0 or stats.step == steps_total or stats.held_out:
            self._write(step_line(stats, steps_total, eta_s))

    def finish(self, lines: Sequence[str]) -> None:
        """Shows the summary; the first line is its title."""
        self.close()
        self._show_block(lines, "green")

    def close(self) -> None:
        """Takes the bar off, so that the terminal is usable again; safe to call twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _write(self, text: str) -> None:
        # A log file must not be wrapped at the 80 columns that a missing terminal is taken for.
        self._screen.print(Text(printable(text)), soft_wrap=not self._screen.is_terminal)

    def _show_block(self, lines: Sequence[str], colour: str) -> None:
        if not self._is_main:
            return
        if not self._screen.is_terminal:
            self._write("\n".join(lines))
            return
        table = Table.grid()
        whole = [line for line in lines[1:] if line.startswith(RESUME)]  # it must stay one line to be pasted
        for line in (printable(line) for line in lines[1:] if line not in whole):
            table.add_row(Text(line[:LABEL_WIDTH], style="dim"), Text(line[LABEL_WIDTH:]))
        title = Text(printable(lines[0]), style=f"bold {colour}")
        self._screen.print(Rule(title, align="left", style=colour), table)
        for line in whole:
            self._screen.print(Text(printable(line)), soft_wrap=True)

    def _move_bar(self, stats: StepStats, steps_total: int, text: str) -> None:
        if self._progress is None:
            columns = (
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=None),
                # Without markup: rich would take brackets in a name for a style.
                TextColumn("{task.fields[text]}", markup=False),
            )
            self._progress = Progress(*columns, console=self._screen, expand=True)
            self._task = self._progress.add_task("", total=steps_total, completed=stats.step, text=text)
            self._progress.start()
        self._progress.update(self._task, completed=stats.step, text=text)
