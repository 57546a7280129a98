"""A frozen decoder passes gradients on without computing any for its own weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from sicog_mcore.config import Experiment
from tests.builders import tiny_experiment
from tests.dist import Rank, run_ranks

FLOPS = 1e-3  # relative: products smaller than a weight's are not told apart


def _flops(rank: Rank, experiments: list[Experiment]) -> list[int]:
    """FLOPs of all matrix products of one forward and backward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    from sicog_mcore.build import build_chunks, plan_build
    from sicog_mcore.parallel.param_groups import freeze_parts
    from tests.batches import random_batches

    topology = rank.start(experiments[0].parallel)
    totals = []
    for experiment in experiments:
        (chunk,) = build_chunks(plan_build(experiment), topology)
        for parameter in chunk.parameters():
            parameter.data.fill_(0.01)
        freeze_parts([chunk], experiment.optim.freeze)
        with FlopCounterMode(display=False) as counter:
            chunk(random_batches(experiment, 1)[0]).sum().backward()
        totals.append(counter.get_total_flops())
    return totals


@pytest.mark.slow
def test_a_frozen_decoder_runs_no_weight_gradient_products() -> None:
    from sicog_mcore.train.flops import WorkCounts, decoder_forward
    from tests.batches import random_batches

    trained = tiny_experiment(Path("unused"), data={"token_budget": 512})
    frozen = tiny_experiment(Path("unused"), data={"token_budget": 512}, optim={"freeze": ("decoder",)})
    ((all_products, without),) = run_ranks(_flops, 1, [trained, frozen])
    (batch,) = random_batches(trained, 1)
    positions = WorkCounts(
        tokens=512, supervised_tokens=WorkCounts.of(batch).supervised_tokens
    )  # padding runs through too
    weight_gradients = decoder_forward(trained.model.decoder, positions).linear
    assert all_products - without == pytest.approx(weight_gradients, rel=FLOPS)
