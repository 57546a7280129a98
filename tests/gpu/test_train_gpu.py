"""Whole runs on GPUs: near the CPU's losses, the same under recompute, and the same on two devices as on one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from sicog_mcore.config import Experiment
from tests.builders import tiny_experiment, write_dataset
from tests.e2e.runs import read_metrics, train_ranks

STEPS = 6  # the CPU's checkpoint of step 1 is where the GPU starts
BF16_AGAINST_CPU = 0.02
GPU_LOSS = 1e-3  # fp32; atomics change the order of sums, and Transformer Engine multiplies fp32 matrices in TF32
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tensor": 2},
    "TP2+SP": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
    "PP2 interleaved": {"pipeline": 2, "virtual_pipeline": 2},
    "DP2": {},
    "DP2 overlapped": {"overlap_grad_reduce": True, "overlap_param_gather": True},
}


def _experiment(data: Path, output: Path, parallel: dict[str, Any] | None = None, **train: Any) -> Experiment:
    return tiny_experiment(
        data,
        output=str(output),
        train={"steps": STEPS, "packs_per_step": 4, "tensorboard": False, **train},
        data={"token_budget": 512, "workers": 1},
        optim={"lr": 1e-3},
        checkpoint={"every_steps": 1, "keep_last": STEPS},
        parallel=parallel or {},
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, 8)
    return folder


@pytest.fixture(scope="module")
def cpu_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of the same run in fp32 on the CPU, in a process that sees no device."""
    output = tmp_path_factory.mktemp("cpu") / "run"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        train_ranks(_experiment(data, output), 1)
    return output


def _continue_from_step_1(cpu_run: Path, output: Path) -> Path:
    shutil.copytree(cpu_run, output)
    for folder in sorted((output / "checkpoints").glob("step_*"))[1:]:
        shutil.rmtree(folder)
    return output


def _losses(metrics: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in metrics]


@pytest.mark.gpu
@pytest.mark.slow
def test_bf16_on_the_gpu_learns_as_fp32_on_the_cpu_does(data: Path, cpu_run: Path, tmp_path: Path) -> None:
    output = _continue_from_step_1(cpu_run, tmp_path / "run")
    metrics = train_ranks(_experiment(data, output, precision="bf16"), 1)
    expected = _losses(read_metrics(cpu_run))
    assert len(expected) == STEPS and expected[-1] < expected[1]
    assert _losses(metrics)[1:] == pytest.approx(expected[1:], rel=BF16_AGAINST_CPU)
    assert metrics[-1]["loss"] < metrics[1]["loss"]
    assert all(0 < line["grad_norm"] < 1e3 for line in metrics)


@pytest.mark.gpu
@pytest.mark.slow
def test_recompute_changes_the_memory_but_not_the_losses(data: Path, tmp_path: Path) -> None:
    kept = train_ranks(_experiment(data, tmp_path / "kept"), 1)
    again = {"recompute_decoder": "full", "recompute_tower": "full"}
    recomputed = train_ranks(_experiment(data, tmp_path / "recomputed", **again), 1)
    assert _losses(recomputed) == pytest.approx(_losses(kept), rel=GPU_LOSS)
    assert 0 < recomputed[-1]["peak_memory_gib"] < kept[-1]["peak_memory_gib"] < 8


@pytest.fixture(scope="module")
def one_gpu(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train_ranks(_experiment(data, tmp_path_factory.mktemp("one")), 1)


@pytest.mark.multi_gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_two_gpus_train_as_one_does(name: str, data: Path, one_gpu: list[dict[str, Any]], tmp_path: Path) -> None:
    metrics = train_ranks(_experiment(data, tmp_path, parallel=LAYOUTS[name]), 2)
    assert _losses(metrics) == pytest.approx(_losses(one_gpu), rel=GPU_LOSS)
    norms, expected = ([line["grad_norm"] for line in lines] for lines in (metrics, one_gpu))
    assert norms == pytest.approx(expected, rel=10 * GPU_LOSS)
