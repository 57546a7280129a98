"""Ruined numbers are neither learned nor kept: finiteness is judged before the step, explosion before the commit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sicog_mcore.build import build_model, plan_build
from sicog_mcore.checkpoint.commit import committed_steps
from sicog_mcore.errors import EXIT_GIVE_UP, CheckpointError, TrainingError
from sicog_mcore.parallel.topology import Topology, start_topology, stop_topology
from sicog_mcore.train.health import Soundness, SpikeWatch, measure, require_sound, require_sound_start
from sicog_mcore.train.run import train
from sicog_mcore.train.step import NextToken, train_step
from tests.batches import random_batches
from tests.builders import tiny_experiment, write_dataset
from tests.dist import Rank, run_ranks

GOOD = "the last good checkpoint is X"


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    yield start_topology(tiny_experiment(Path("unused")).parallel, seed=0)
    stop_topology()


def new_model(topology: Topology, precision: str = "fp32", **parallel: Any) -> Any:
    experiment = tiny_experiment(
        Path("unused"), data={"token_budget": 512}, train={"precision": precision}, parallel=parallel
    )
    return build_model(plan_build(experiment), topology), random_batches(experiment, 2)


def tensors(model: Any) -> dict[str, Tensor]:
    """Weights, masters and moments."""
    found = {f"{i}.{n}": p for i, chunk in enumerate(model.chunks) for n, p in chunk.named_parameters()}
    found |= {f"state {index}": value for index, value in enumerate(model.optimizer_tensors())}
    return {name: value.detach().clone() for name, value in found.items()}


def changed(model: Any, before: dict[str, Tensor]) -> list[str]:
    after = tensors(model)
    assert after.keys() == before.keys()
    return [name for name in before if not torch.equal(after[name], before[name])]


class Spoilt(NextToken):
    """Spoils the loss, or leaves it and spoils what flows back."""

    def __init__(self, loss: float = 1.0, gradient: float = 1.0):
        self._loss, self._gradient = loss, gradient

    def loss(self, batch: Any, losses: Tensor) -> Any:
        if self._gradient != 1.0:
            losses = losses * 1
            losses.register_hook(lambda gradient: gradient * self._gradient)
        return super().loss(batch, losses * self._loss if self._loss != 1.0 else losses)


@pytest.mark.parametrize(
    "objective",
    [Spoilt(float("nan")), Spoilt(float("inf")), Spoilt(gradient=float("nan")), Spoilt(gradient=float("inf"))],
)
def test_what_is_not_finite_leaves_weights_masters_and_moments(topology: Topology, objective: NextToken) -> None:
    for precision in ("fp32", "bf16"):
        model, batches = new_model(topology, precision)
        train_step(model, batches, lr=1e-3, objective=NextToken())
        before = tensors(model)
        result = train_step(model, batches, lr=1e-3, objective=objective)
        assert not result.applied and changed(model, before) == []
        assert train_step(model, batches, lr=1e-3, objective=NextToken()).applied  # it could go on
        assert changed(model, before) != []


def test_the_norm_is_measured_once_a_step(topology: Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = new_model(topology)
    (member,) = model.optimizer.chained_optimizers
    calls = dict.fromkeys(("prepare_grads", "get_grad_norm"), 0)

    def counted(name: str, act: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            calls[name] += 1
            return act()

        return call

    for name in calls:
        monkeypatch.setattr(member, name, counted(name, getattr(member, name)))
    for _ in range(2):
        assert train_step(model, batches, lr=1e-3, objective=NextToken()).applied
    assert calls == {"prepare_grads": 2, "get_grad_norm": 2}


def _spoilt_on_one_rank(rank: Rank) -> list[Any]:
    experiment = tiny_experiment(Path("unused"), data={"token_budget": 512}, train={"packs_per_step": 4})
    model = build_model(plan_build(experiment), rank.start(experiment.parallel))
    train_step(model, random_batches(experiment, 2), lr=1e-3, objective=NextToken())
    before = tensors(model)
    objective = Spoilt(gradient=float("nan")) if rank.rank == 1 else NextToken()
    result = train_step(model, random_batches(experiment, 2), lr=1e-3, objective=objective)
    different = changed(model, before)
    if rank.rank == 1:
        model.optimizer_tensors()[0].detach().view(-1)[0] = float("inf")
    return [result.applied, different, measure(model).not_finite]


@pytest.mark.slow
def test_one_rank_that_is_not_finite_stops_the_step_on_all() -> None:
    first, second = run_ranks(_spoilt_on_one_rank, 2)
    assert first[:2] == second[:2] == [False, []]
    assert "optimizer" in first[2] and first[2] == second[2]


def spoil_weights(model: Any) -> None:
    next(iter(model.chunks[0].parameters_of("resampler"))).view(-1)[3] = float("nan")


def spoil_masters(model: Any) -> None:
    model.optimizer_tensors()[0].view(-1)[0] = float("inf")


def spoil_moments(model: Any) -> None:
    inner = model.optimizer.chained_optimizers[0].optimizer
    next(iter(inner.state.values()))["exp_avg_sq"].view(-1)[0] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [(spoil_weights, "resampler"), (spoil_masters, "the optimizer's state"), (spoil_moments, "the optimizer's state")],
)
def test_nothing_that_is_not_finite_is_committed(topology: Topology, spoil: Any, named: str) -> None:
    model, batches = new_model(topology, "bf16")
    train_step(model, batches, lr=1e-3, objective=NextToken())
    before = require_sound(model, measure(model), "step 1", GOOD)
    with torch.no_grad():
        spoil(model)
    with pytest.raises(
        TrainingError, match=f"step 2: not finite: {named}.*; nothing was saved; {GOOD}.*optim.lr"
    ) as error:
        require_sound(model, before, "step 2", GOOD)
    assert error.value.exit_code == EXIT_GIVE_UP
    with pytest.raises(CheckpointError, match=f"not finite: {named}"):
        require_sound_start(measure(model), GOOD)


@pytest.mark.parametrize("part", ["tower", "resampler", "decoder"])
def test_a_part_that_grew_a_hundredfold_has_exploded(topology: Topology, part: Any) -> None:
    model, _ = new_model(topology)
    before = measure(model)
    assert before.optimizer_is_finite and all(0.01 < rms < 1 for rms in before.rms.values())
    with torch.no_grad():
        for factor, is_refused in ((30.0, False), (200.0, True)):  # 30, then 6,000 times as large
            for parameter in model.chunks[0].parameters_of(part):
                parameter.mul_(factor)
            if is_refused:
                with pytest.raises(
                    TrainingError, match=f"weights of the {part} have exploded: .* nothing was saved; {GOOD}"
                ):
                    require_sound(model, before, "step 5", GOOD)
            else:
                require_sound(model, before, "step 4", GOOD)


def test_a_part_that_began_at_zero_may_grow(topology: Topology) -> None:
    model, _ = new_model(topology)
    before = Soundness(dict.fromkeys(measure(model).rms, 0.0), True)
    assert require_sound(model, before, "step 1", GOOD) == measure(model)


def losses_that_leap(losses: Sequence[float]) -> list[int]:
    watch = SpikeWatch()
    return [step for step, loss in enumerate(losses, 1) if watch.see(step, loss)]


@pytest.mark.parametrize(
    ("losses", "leaps"),
    [
        ([5.8, 39, 18, 37], [2, 4]),
        ([6.8, 6.0, 5.4, 5.1, 4.8, 4.8], []),
        ([2.0] * 40 + [9.0, 2.0, 2.1, 8.0], [41, 44]),
        ([2.0] * 40 + [9.0] * 5, [41]),  # said once, as long as it stays high
        ([2.0] * 40 + [3.5] + [2.0], []),  # not twice as much
        ([0.02] * 40 + [0.3, 0.02], []),  # many times as much, but not much
        (
            [0.5, 2.5, 0.4, 2.9, 0.6, 2.4, 0.5, 2.8, 0.4, 3.2, 0.5, 2.9, 3.1],
            [2, 4],
        ),  # small batches vary
        ([2.0, float("nan"), 2.0, 2.0, float("nan"), 2.0], []),
        ([], []),
    ],
)
def test_a_leap_is_told_from_what_varies(losses: list[float], leaps: list[int]) -> None:
    assert losses_that_leap(losses) == leaps


def test_the_warning_says_where_the_samples_stand() -> None:
    watch = SpikeWatch()
    watch.see(6, 2.0)
    line = watch.see(7, 50.0)
    assert line is not None and "step 7" in line and "consumed-*.jsonl" in line and "50" in line


def run_lr(root: Path, topology: Topology, lr: float, steps: int, **checkpoint: Any) -> list[int]:
    """A real run; the steps that are committed afterwards, however it ended."""
    experiment = tiny_experiment(
        root,
        data={"token_budget": 512, "workers": 0},
        train={"steps": steps, "packs_per_step": 1, "tensorboard": False},
        optim={"lr": lr, "warmup_fraction": 0.0},
        checkpoint=checkpoint,
    )
    try:
        train(plan_build(replace(experiment)), topology, "the test's command")
    finally:
        found = committed_steps(root / "run" / "checkpoints")
    return found


@pytest.mark.slow
def test_a_rate_that_ruins_the_weights_commits_nothing_and_the_remedy_helps(topology: Topology, tmp_path: Path) -> None:
    write_dataset(tmp_path, 8)
    for lr in (1e10, 1e5, 100.0):
        with pytest.raises(TrainingError, match="step 1: .*exploded.*no checkpoint yet.*[Ll]ower optim.lr"):
            run_lr(tmp_path, topology, lr, 4, every_steps=1, keep_last=1)
        assert committed_steps(tmp_path / "run" / "checkpoints") == []
    assert run_lr(tmp_path, topology, 1e-3, 2, every_steps=1, keep_last=1) == [2]
    with pytest.raises(TrainingError, match="step 3: .*the last good checkpoint is .*step_00000002"):
        run_lr(tmp_path, topology, 1e10, 6, every_steps=1, keep_last=1)
    assert committed_steps(tmp_path / "run" / "checkpoints") == [2]  # not given up for a bad one
    with pytest.raises(TrainingError, match="step_00000002"):  # the next loss is not finite, or the save is refused
        run_lr(tmp_path, topology, 1e10, 6, every_steps=4, keep_last=1)
    assert run_lr(tmp_path, topology, 1e-3, 4, every_steps=2, keep_last=1) == [4]


@pytest.mark.slow
def test_a_high_rate_warns_and_goes_on(topology: Topology, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path, 8)
    assert run_lr(tmp_path, topology, 0.3, 12, every_steps=3, keep_last=1) == [12]
    assert "warning: the loss leapt at step" in capsys.readouterr().out.replace("\n", " ")
