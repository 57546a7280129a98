"""Gathers the numbers of one step over all ranks, and sends them to console, JSONL and TensorBoard.

In: StepResult, WorkCounts of this replica   Out: StepStats on rank 0's screen and disk   Next: metrics.py, console.py
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import astuple, fields
from pathlib import Path

import torch

from sicog_mcore.config import Experiment
from sicog_mcore.parallel.topology import Topology
from sicog_mcore.train.console import Console
from sicog_mcore.train.feed import Feed
from sicog_mcore.train.flops import WorkCounts, peak_tflops, step_flops
from sicog_mcore.train.health import SpikeWatch
from sicog_mcore.train.metrics import HeldOutStats, MetricsLog, StepStats, Summary
from sicog_mcore.train.step import StepResult

GIB = 2**30
KIB = 2**10


class Reporter:
    """Turns the events of each step into one line.

    Args:
        first_step: first step that this process runs.
    """

    def __init__(self, experiment: Experiment, topology: Topology, console: Console, first_step: int):
        self.experiment, self.topology, self.console = experiment, topology, console
        self.summary = Summary()
        self._spikes = SpikeWatch()
        self._log: MetricsLog | None = None
        if topology.is_main:
            self._log = MetricsLog(Path(experiment.output), first_step, experiment.train.tensorboard)
        self._peak = peak_tflops(device_name(topology.device), experiment.train)
        self._started = time.perf_counter()
        self._waited_s = 0.0
        self._next = first_step

    def report(self, step: int, lr: float, result: StepResult, feed: Feed, held_out: HeldOutStats | None = None) -> int:
        """Gathers and writes one step. Collective. Returns the samples that all ranks consumed in it.

        Args:
            held_out: what was measured after the step, on every rank.
        """
        own = feed.take(step)
        # One reduction for all counts: they are int64, so their sums are exact.
        sums = torch.tensor([*astuple(own), feed.num_quarantined, feed.num_truncated], device=self.topology.device)
        *totals, quarantined, truncated = self.topology.sum_over_world(sums).tolist()
        counts = WorkCounts(*totals[: len(fields(WorkCounts))])
        device = self.topology.device
        peak = self.topology.max_over_world(torch.tensor(_peak_memory_gib(device), device=device)).item()
        # Taken after the reductions, which wait for the slowest rank: the time is that of the whole job, on any rank.
        now = time.perf_counter()
        paused_s = held_out.held_out_s if held_out else 0.0
        step_s, self._started = now - self._started - paused_s, now
        # The feed's clock runs through the whole run; a step's share is the difference.
        waited_s, self._waited_s = feed.wait_s - self._waited_s, feed.wait_s
        flops = step_flops(self.experiment.model, self.experiment.optim.freeze, counts)
        tflops = flops / step_s / self.topology.world_size / 1e12
        stats = StepStats(
            step=step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=lr,
            step_s=step_s,
            data_wait_s=waited_s,
            samples=counts.samples,
            decoder_tokens=counts.tokens,
            supervised_tokens=counts.supervised_tokens,
            images=counts.images,
            slices=counts.slices,
            pack_fill=counts.tokens / counts.positions,
            quarantined=quarantined,
            truncated=truncated,
            peak_memory_gib=peak,
            tflops=tflops,
            mfu=tflops / self._peak if self._peak else None,
            preferences=result.preferences,
            held_out=held_out,
        )
        self.summary.add(stats)
        if self._log:
            self._log.write(stats)
        self.console.step(stats, self.experiment.train.steps)
        if warning := self._spikes.see(step, result.loss):
            self.console.notice(warning)
        self._next = step + 1
        self.topology.watch.beat(f"step {self._next}")
        return counts.samples

    def restart_clock(self) -> None:
        """Leaves the time since the last step (of a checkpoint) out of the next step's time."""
        self._started = time.perf_counter()
        self.topology.watch.beat(f"step {self._next}")

    def close(self) -> None:
        if self._log:
            self._log.close()
        self.console.close()


def device_name(device: torch.device) -> str:
    """Marketing name of the device, as the table of peaks knows it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _peak_memory_gib(device: torch.device) -> float:
    """Most memory this process ever held: allocated on the device, or resident where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else KIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
