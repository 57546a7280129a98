"""First weights for a model this narrow, as a checkpoint that runs start from.

In: model.yaml, a seed   Out: a checkpoint folder for ``init.checkpoint``
Megatron's rule, normal(0, 0.02), is meant for widths of thousands: at a width of 64 every layer would pass on a sixth of
what it gets, and the digits are not learnt within 800 steps. 0.1 is about 1 / sqrt(64).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from sicog_mcore.build import build_chunks, plan_build
from sicog_mcore.checkpoint.part_writer import save_weights
from sicog_mcore.cli import load_experiment
from sicog_mcore.model.initialise import STD, initialise
from sicog_mcore.parallel.topology import start_topology, stop_topology

NARROW_STD = 0.1


def write_first_weights(config: Path, seed: int, out: Path) -> None:
    """Draws the framework's first weights, scales the matrices of tower and decoder, and commits the checkpoint."""
    experiment = load_experiment(["--config", str(config)], 1)
    topology = start_topology(experiment.parallel, seed)
    try:
        chunks = build_chunks(plan_build(experiment), topology)
        initialise(chunks, seed)
        with torch.no_grad():
            for parameter in (
                p for chunk in chunks for part in ("tower", "decoder") for p in chunk.parameters_of(part)
            ):
                parameter.mul_(NARROW_STD / STD if parameter.dim() == 2 else 1)  # norms and biases are vectors
        save_weights(chunks, experiment, topology, out)
    finally:
        stop_topology()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    sys.exit(write_first_weights(options.config, options.seed, options.out))
