"""A checkpoint comes back bit for bit; one of another run is refused; a save that fails harms nothing."""

from __future__ import annotations

import errno
import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sicog_mcore import files
from sicog_mcore.build import build_model, plan_build
from sicog_mcore.checkpoint import commit, store
from sicog_mcore.checkpoint.store import CheckpointStore, RunState
from sicog_mcore.config import Experiment
from sicog_mcore.errors import EXIT_CONFIG, EXIT_RETRY, CheckpointError, MachineError
from sicog_mcore.parallel.ddp import TrainableModel
from sicog_mcore.parallel.topology import Topology, start_topology, stop_topology
from sicog_mcore.train.step import NextToken, train_step
from tests.batches import random_batches
from tests.builders import tiny_experiment
from tests.dist import Rank, run_ranks

STATE = RunState(step=3, loader={"epoch": 1, "window": 2, "pack": 3}, samples=17)
SCALED: dict[str, Any] = {"tower_lr_scale": 0.5, "resampler_lr_scale": 2.0, "weight_decay": 0.1}


def experiment_in(folder: Path, **overrides: Any) -> Experiment:
    return tiny_experiment(folder, data={"token_budget": 512}, **({"optim": SCALED} | overrides))


def trained(experiment: Experiment, topology: Topology) -> TrainableModel:
    """Two steps on, so that moments and Adam steps are not those of a new model."""
    model = build_model(plan_build(experiment), topology)
    for seed in (0, 100):
        train_step(model, random_batches(experiment, 2, seed), lr=1e-3, objective=NextToken())
    return model


def tensors(model: TrainableModel) -> dict[str, Tensor]:
    """Weights, master weights, moments and Adam steps, by name."""
    found = {f"{i}.{n}": p.detach().clone() for i, c in enumerate(model.chunks) for n, p in c.named_parameters()}  # type: ignore[attr-defined]
    inner = model.optimizer.chained_optimizers[0].optimizer
    for index, (parameter, state) in enumerate(inner.state.items()):
        found |= {f"state {index} {key}": value.clone() for key, value in state.items()}
        found[f"master {index}"] = parameter.detach().clone()
    return found


def groups(model: TrainableModel) -> set[tuple[float, float, int]]:
    return {(group["lr_mult"], group["wd_mult"], len(group["params"])) for group in model.optimizer.param_groups}


def assert_equal(model: TrainableModel, expected: dict[str, Tensor]) -> None:
    found = tensors(model)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing more than ``size`` bytes into a file fails, in forked writers too: what a full disk looks like."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def topology(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Topology]:
    yield start_topology(tiny_experiment(Path("unused")).parallel, seed=0)
    stop_topology()


@pytest.fixture(scope="module")
def saved(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, dict[str, Tensor]]:
    """An experiment with a checkpoint of step 3, and what was in the model."""
    experiment = experiment_in(tmp_path_factory.mktemp("saved"))
    model = trained(experiment, topology)
    CheckpointStore(experiment, topology).save(model, STATE)
    return experiment, tensors(model)


def test_everything_comes_back_bit_for_bit(saved: Any, topology: Topology) -> None:
    experiment, expected = saved
    model = build_model(plan_build(experiment_in(Path("unused"), train={"seed": 7})), topology)
    checkpoints = CheckpointStore(experiment, topology)
    assert checkpoints.find().step == 3
    assert checkpoints.load(model, 3) == (STATE, [])
    assert_equal(model, expected)


def test_every_parameter_keeps_its_own_adam_step(saved: Any, topology: Topology) -> None:
    experiment, _ = saved
    model = build_model(plan_build(experiment), topology)
    CheckpointStore(experiment, topology).load(model, 3)
    steps = [state["step"] for state in model.optimizer.chained_optimizers[0].optimizer.state.values()]
    assert {float(step) for step in steps} == {2} and len({step.data_ptr() for step in steps}) == len(steps)
    train_step(model, random_batches(experiment, 2), lr=1e-3, objective=NextToken())
    assert {float(step) for step in steps} == {3}


def test_parameter_groups_keep_their_multipliers(saved: Any, topology: Topology) -> None:
    experiment, _ = saved
    model = build_model(plan_build(experiment), topology)
    before = groups(model)
    assert {(lr, wd) for lr, wd, _ in before} == {(lr, wd) for lr in (0.5, 1.0, 2.0) for wd in (0.0, 1.0)}
    CheckpointStore(experiment, topology).load(model, 3)
    assert groups(model) == before
    model.set_learning_rate(0.01)
    assert {group["lr"] for group in model.optimizer.param_groups} == {0.005, 0.01, 0.02}


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"model": {"decoder": {"ffn": 256, "num_layers": 2}}}, ("model.decoder.ffn", "model.decoder.num_layers")),
        ({"model": {"tower": {"num_layers": 2}}}, ("model.tower.num_layers",)),
        ({"optim": SCALED | {"freeze": ("tower",)}}, ("optim.freeze",)),
        ({"optim": SCALED | {"decoder_lr_scale": 3.0}}, ("optim.decoder_lr_scale",)),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    overrides: dict[str, Any], named: tuple[str, ...], saved: Any, topology: Topology
) -> None:
    experiment, _ = saved
    other = experiment_in(Path(experiment.output).parent, **overrides)
    model = build_model(plan_build(other), topology)
    with pytest.raises(CheckpointError, match="another output folder") as error:
        CheckpointStore(other, topology).load(model, 3)
    assert all(name in str(error.value) for name in named) and error.value.exit_code == EXIT_CONFIG


def test_other_optimiser_settings_are_told_and_used(saved: Any, topology: Topology) -> None:
    experiment, expected = saved
    changed = {"lr": 0.5, "beta1": 0.8, "eps": 1e-6, "weight_decay": 0.3}
    other = experiment_in(Path(experiment.output).parent, optim=SCALED | changed)
    model = build_model(plan_build(other), topology)
    _, notes = CheckpointStore(other, topology).load(model, 3)
    assert_equal(model, expected)
    assert len(notes) == len(changed) and all(any(f"optim.{name}" in note for note in notes) for name in changed)
    model.set_learning_rate(0.5)
    for group in model.optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.999), 1e-6)
        assert (group["lr"], group["weight_decay"]) == (0.5 * group["lr_mult"], 0.3 * group["wd_mult"])


def test_a_checkpoint_of_another_format_is_refused(saved: Any, topology: Topology, tmp_path: Path) -> None:
    experiment = experiment_in(tmp_path)
    checkpoints = CheckpointStore(experiment, topology)
    model = build_model(plan_build(experiment), topology)
    model.allocate_optimizer_state()
    folder = checkpoints.save(model, RunState(1))
    content = json.loads((folder / store.STATE).read_text())
    (folder / store.STATE).write_text(json.dumps(content | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99, this version reads 1; use the version that wrote it"):
        checkpoints.load(model, 1)


def test_the_space_for_a_checkpoint_is_asked_for_before_a_run(
    saved: Any, topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CheckpointStore(saved[0], topology).folder(3)
    needed = store.checkpoint_bytes(saved[0])
    assert 0.95 < needed / sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 1.05
    experiment = experiment_in(tmp_path)
    checkpoints = CheckpointStore(experiment, topology)
    checkpoints.require_space()  # of a folder that is not there yet
    monkeypatch.setattr(store, "free_bytes", lambda root: needed - 1)
    with pytest.raises(MachineError, match=r"checkpoints has .* MiB free, .* takes about .* MiB; make room") as error:
        checkpoints.require_space()
    assert error.value.exit_code == EXIT_RETRY and str(checkpoints.root) in str(error.value)
    frozen = experiment_in(tmp_path, optim={"freeze": ("tower", "decoder")})
    assert store.checkpoint_bytes(frozen) < needed / 2
    leftover = checkpoints.root / "step_00000004.tmp"
    leftover.mkdir(parents=True)
    (leftover / "x").write_bytes(b"12")
    checkpoints.require_space()  # the first save removes that

    def unknown(root: Path) -> int:
        raise OSError

    monkeypatch.setattr(store, "free_bytes", unknown)
    checkpoints.require_space()


@pytest.mark.parametrize(
    "state",
    [
        None,
        [],
        {"step": "3"},
        {"step": 3, "loader": [1]},
        {"step": 3, "loader": {"epoch": 0.5}},
        {"step": 4},
        {"odd": 1},
    ],
)
def test_a_state_that_is_none_is_one_error(state: object, saved: Any, topology: Topology) -> None:
    with pytest.raises(CheckpointError, match=r"state.json .*use another checkpoint"):
        store._run_state({"state": state}, CheckpointStore(saved[0], topology).folder(3), 3)


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


FAULTS: dict[str, tuple[Any, str] | int] = {
    "first file": 500,
    "weights": 100_000,
    "random states": (store, "save_rng"),
    "sync": (files.os, "fsync"),
    "rename": (files.os, "replace"),
}


@pytest.mark.slow
def test_a_full_disk_is_one_error_and_the_previous_checkpoint_stays(
    topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = experiment_in(tmp_path, checkpoint={"keep_last": 1})
    checkpoints = CheckpointStore(experiment, topology)
    model = trained(experiment, topology)
    checkpoints.save(model, RunState(1))
    expected = tensors(model)
    train_step(model, random_batches(experiment, 2), lr=1e-3, objective=NextToken())
    for name, fault in FAULTS.items():
        with monkeypatch.context() as patch, largest_file(fault if isinstance(fault, int) else resource.RLIM_INFINITY):
            if isinstance(fault, tuple):
                patch.setattr(*fault, no_space)
            with pytest.raises(
                CheckpointError, match="step_00000002 cannot be written: .+GiB free.; make room"
            ) as error:
                checkpoints.save(model, RunState(2))
        assert error.value.exit_code == EXIT_RETRY, name
        # What was written so far is removed, so that it does not keep the disk full.
        assert checkpoints.find() == store.Found(1, ()), name
    other = build_model(plan_build(experiment), topology)
    checkpoints.load(other, 1)
    assert_equal(other, expected)
    checkpoints.save(model, RunState(2))  # there is room again
    assert [path.name for path in checkpoints.root.iterdir()] == ["step_00000002"]
    assert checkpoints.find() == store.Found(2, ())


def _fail_on_one_rank(rank: Rank, experiment: Experiment) -> list[str]:
    """Outcomes of saves that go wrong on one rank each, and of two that go well, on this rank."""
    checkpoints = CheckpointStore(experiment, rank.start(experiment.parallel))
    model = trained(experiment, checkpoints.topology)
    outcomes = [checkpoints.save(model, RunState(1)).name]
    faults: list[tuple[int, Any, str, Callable[..., None]]] = [
        (0, store.shutil, "rmtree", no_space),  # of the leftovers of the fault before
        (1, store, "save_rng", no_space),
        (0, commit, "commit", no_space),
        (1, resource, "", no_space),  # the weights do not fit
    ]
    (commit.temporary_folder(checkpoints.folder(9))).mkdir(exist_ok=True)
    for failing, module, name, replacement in faults:
        original = vars(module).get(name)
        with largest_file(100_000 if rank.rank == failing and not name else resource.RLIM_INFINITY):
            if rank.rank == failing and name:
                setattr(module, name, replacement)
            try:
                checkpoints.save(model, RunState(2))
            except CheckpointError as error:
                outcomes.append(str(error))
            if rank.rank == failing and name:
                setattr(module, name, original)
        assert checkpoints.find().step == 1
    expected = tensors(model)
    outcomes.append(checkpoints.save(model, RunState(2)).name)
    other = build_model(plan_build(experiment), checkpoints.topology)
    checkpoints.load(other, 2)
    assert_equal(other, expected)
    return outcomes


@pytest.mark.slow
def test_a_save_that_fails_on_one_rank_fails_on_all_and_the_run_could_go_on(tmp_path: Path) -> None:
    experiment = experiment_in(tmp_path, parallel={"tensor": 2, "sequence": True, "timeout_s": 30})
    for rank, outcomes in enumerate(run_ranks(_fail_on_one_rank, 2, experiment)):
        first, *failures, last = outcomes
        assert (first, last) == ("step_00000001", "step_00000002")
        assert len(failures) == 4 and all("step_00000002 cannot be written" in text for text in failures)
        assert all("No space left on device" in text for text in failures[:3])
        assert ("rank 1: " if rank == 0 else "another rank failed") in failures[3]
