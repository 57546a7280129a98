"""Learning rate of every step, as a function of the step alone: nothing to save, nothing to restore.

In: OptimConfig, number of steps   Out: learning rate before the factors of the parts   Next: step.py
"""

from __future__ import annotations

import math

from sicog_mcore.config import OptimConfig


def warmup_steps(config: OptimConfig, steps: int) -> int:
    """Steps of the linear warm-up; at least one, so that the first step already learns."""
    return max(1, math.ceil(config.warmup_fraction * steps))


def learning_rate(step: int, config: OptimConfig, steps: int) -> float:
    """Linear warm-up to the peak, then half a cosine down to the minimum, which the last step reaches.

    Args:
        step: 0-based.
        config: peak, minimum and share of the warm-up.
        steps: optimiser steps of the whole run.
    """
    warmup = warmup_steps(config, steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    # One step ahead, so that the last step, number steps - 1, has a progress of 1.
    progress = min(1.0, (step + 1 - warmup) / (steps - warmup))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_fraction + (1.0 - config.min_lr_fraction) * cosine)
