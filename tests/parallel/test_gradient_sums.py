"""Gradients of replicated parts are summed over tensor-parallel ranks in place: the same numbers, and no copy of them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sicog_mcore.config import Experiment
from tests.builders import tiny_experiment
from tests.dist import Rank, run_ranks

VARIANTS: dict[str, tuple[dict[str, Any], int | None]] = {
    "one bucket": ({}, None),
    "a bucket for almost every tensor": ({"parallel": {"overlap_grad_reduce": True}}, 5_000),
    "decoder frozen": ({"optim": {"freeze": ("decoder",)}}, None),
    "tower frozen, trained positions": (
        {"optim": {"freeze": ("tower",)}, "model": {"resampler": {"train_positions": True}}},
        None,
    ),
    "both frozen": ({"optim": {"freeze": ("tower", "resampler")}}, None),
    "bf16 weights": ({"train": {"precision": "bf16"}}, None),
}
PADDING = 0.01  # of the summed gradients: odd sizes are padded to 64


class Allocations(TorchDispatchMode):
    """Counts the bytes of every tensor that an operator makes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.num_bytes += tensor.untyped_storage().nbytes()
        return result


def _through_a_copy(grads: list[Tensor], group: Any) -> None:
    """The sum as it was taken before: all gradients side by side in a new tensor."""
    flat = torch.cat([grad.flatten() for grad in grads])
    torch.distributed.all_reduce(flat, group=group)
    for grad, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(total.view_as(grad))


def _sum(rank: Rank, experiments: list[tuple[Experiment, int | None]]) -> list[dict[str, Any]]:
    import sicog_mcore.parallel.ddp as ddp
    from sicog_mcore.build import build_model, plan_build
    from sicog_mcore.parallel.gradient_sums import replicated_stretches, sum_replicated_grads

    topology = rank.start(experiments[0][0].parallel)
    original, seen = ddp.DistributedDataParallelConfig, []
    for experiment, bucket in experiments:
        ddp.DistributedDataParallelConfig = functools.partial(original, bucket_size=bucket)  # type: ignore[misc]
        model = build_model(plan_build(experiment), topology)
        chunk: Any = model.chunks[0]
        grads = {n: vars(p)["main_grad"] for n, p in chunk.named_parameters() if p.requires_grad}
        generator = torch.Generator().manual_seed(rank.rank)
        for grad in grads.values():
            grad.copy_(torch.randn(grad.shape, generator=generator))
        expected = {name: grad.clone() for name, grad in grads.items()}
        replicated = [n for n in grads if not n.startswith("language_model.")]
        before, after = Allocations(), Allocations()
        if replicated:
            with before:
                _through_a_copy([expected[name] for name in replicated], topology.groups.tp)
        with after:
            sum_replicated_grads([chunk], topology.groups.tp)
        seen.append(
            {
                "differing": [name for name in grads if not torch.equal(grads[name], expected[name])],
                "bytes": sum(grads[name].nbytes for name in replicated),
                "allocated": (before.num_bytes, after.num_bytes),
                "calls": len(replicated_stretches(chunk)),
                "summed": sum(stretch.nbytes for stretch in replicated_stretches(chunk)),
            }
        )
    return seen


@pytest.mark.slow
def test_the_sum_is_the_same_to_the_last_bit_and_costs_no_memory() -> None:
    experiments = []
    for overrides, bucket in VARIANTS.values():
        parallel = {"tensor": 2, "sequence": True} | overrides.get("parallel", {})
        experiment = tiny_experiment(Path("unused"), **(overrides | {"parallel": parallel}))
        experiments.append((experiment, bucket))
    for results in run_ranks(_sum, 2, experiments):
        for name, seen in zip(VARIANTS, results, strict=True):
            before, after = seen["allocated"]
            assert seen["differing"] == [], name
            assert before >= seen["bytes"] and after <= seen["bytes"] / 1000, name
            assert seen["bytes"] <= seen["summed"] <= (1 + PADDING) * seen["bytes"], name
            assert seen["calls"] == (0 if name == "both frozen" else 1), name
