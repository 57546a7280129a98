"""The training loop. It knows steps, not ranks: Megatron stays behind step.py and parallel/.

In: a model, a feed, a checkpoint store, a reporter   Out: a finished run   Put together by run.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from sicog_mcore.checkpoint.store import CheckpointStore, RunState
from sicog_mcore.config import Experiment
from sicog_mcore.errors import TrainingError
from sicog_mcore.parallel.ddp import TrainableModel
from sicog_mcore.train.feed import Feed
from sicog_mcore.train.health import REMEDY, measure, require_sound, require_sound_start
from sicog_mcore.train.held_out_check import HeldOutCheck
from sicog_mcore.train.reporter import Reporter
from sicog_mcore.train.schedule import learning_rate
from sicog_mcore.train.step import Objective, StepResult, train_step


@dataclass
class Trainer:
    """Trains from ``state`` to the last step."""

    experiment: Experiment
    model: TrainableModel
    feed: Feed
    store: CheckpointStore
    reporter: Reporter
    state: RunState
    objective: Objective
    held_out: HeldOutCheck | None = None

    def fit(self) -> Path:
        """Runs all remaining steps. Returns the newest checkpoint.

        Raises:
            TrainingError: the loss or the gradient is not finite, or the weights have exploded; no checkpoint is written
                after that.
            DataError: the data cannot be used.
            MachineError: a checkpoint would not fit on the disk.
        """
        optim, steps = self.experiment.optim, self.experiment.train.steps
        if self.state.step < steps:
            self.store.require_space()
        # What the weights are compared with before they are committed; moves on with every checkpoint.
        sound = measure(self.model)
        require_sound_start(sound, self._last_good())
        self.reporter.restart_clock()
        while self.state.step < steps:
            batches = self.feed.next_step()
            lr = learning_rate(self.state.step, optim, steps)
            result = train_step(self.model, batches, lr, self.objective)
            step = self.state.step + 1
            held_out = self.held_out.measure() if self.held_out and self._is_measured(step, result) else None
            samples = self.reporter.report(step, lr, result, self.feed, held_out)
            # Reported before it is refused, so that the last line of the log shows the number that ended the run.
            self._require_finite(result, step)
            self.state = RunState(step, self.feed.state(), self.state.samples + samples, self.feed.data_state())
            # Looked at before saving: a checkpoint replaces an older one, so bad weights must not become one.
            if step % self.experiment.checkpoint.every_steps == 0 or step == steps:
                sound = require_sound(self.model, sound, f"step {step}", self._last_good())
                self.store.save(self.model, self.state)
                self.reporter.restart_clock()
        return self.store.folder(self.state.step)

    def _is_measured(self, step: int, result: StepResult) -> bool:
        """Whether held-out rows are due: not after a step that ends the run because it is not finite."""
        every = self.experiment.held_out.every_steps
        return result.applied and (step % every == 0 or step == self.experiment.train.steps)

    def _last_good(self) -> str:
        """The checkpoint from which the same command would go on, for messages."""
        newest = self.store.newest()
        if newest is None:
            return "there is no checkpoint yet, so the same command starts anew"
        return f"the last good checkpoint is {newest}, and the same command goes on from there"

    def _require_finite(self, result: StepResult, step: int) -> None:
        """Every rank has the same result, so all of them stop at the same step."""
        if result.count and not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            raise TrainingError(
                f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}; the step was not applied; "
                f"{self._last_good()}. {REMEDY}"
            )
