"""The report picks what can run, and says why not the rest."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from sicog_mcore.errors import ConfigError
from sicog_mcore.model.capability import Capabilities, CapabilityItem, probe

HERE = CapabilityItem(True, "1.0", "")
MISSING = CapabilityItem(False, "", "not installed")
GPU = Capabilities(
    torch=HERE,
    cuda=HERE,
    nccl=HERE,
    transformer_engine=HERE,
    apex=MISSING,
    flash_attn=HERE,
    varlen=HERE,
    triton=HERE,
    dali=MISSING,
    compute_capability=(9, 0),
)


def test_auto_takes_te_then_flash_then_varlen_then_sdpa() -> None:
    report, order = GPU, []
    for field in ("transformer_engine", "flash_attn", "varlen", "torch"):
        order.append(report.attention("auto", 128, "bf16").name)
        report = replace(report, **{field: MISSING})
    assert order == ["te", "flash", "varlen", "sdpa"]


def test_auto_says_why_better_back_ends_were_skipped() -> None:
    choice = replace(GPU, transformer_engine=MISSING).attention("auto", 128, "bf16")
    assert (choice.name, choice.why) == ("flash", "te: not installed")


A100, L40S = replace(GPU, compute_capability=(8, 0)), replace(GPU, compute_capability=(8, 9))


@pytest.mark.parametrize("older", [A100, L40S], ids=["8.0", "8.9"])
def test_auto_prefers_kernels_for_packed_sequences_below_compute_capability_9(older: Capabilities) -> None:
    report, order = older, []
    for field in ("flash_attn", "varlen", "torch"):
        order.append(report.attention("auto", 128, "bf16"))
        report = replace(report, **{field: MISSING})
    # Without flash-attn, Transformer Engine would build all scores: even the reference is better.
    assert [choice.name for choice in order] == ["flash", "varlen", "sdpa"]
    assert order[0].why == f"preferred on compute capability 8.{older.compute_capability[1]}"
    assert order[1].why == "flash: not installed"
    assert "te: compute capability 8." in order[2].why and "flash-attn is missing (not installed)" in order[2].why


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 0)])
def test_transformer_engine_comes_first_where_it_has_its_own_kernel(capability: tuple[int, int]) -> None:
    report = replace(GPU, compute_capability=capability, flash_attn=MISSING)
    assert report.attention("auto", 128, "bf16").name == "te"
    assert report.attention("te", 128, "bf16").why == "requested"


def test_transformer_engine_by_name_on_older_devices_needs_flash_attn() -> None:
    assert A100.attention("te", 128, "bf16").name == "te"
    broken = CapabilityItem(False, "2.8", "installed, but its import fails: undefined symbol")
    for report in (replace(A100, flash_attn=MISSING), replace(L40S, flash_attn=broken)):
        with pytest.raises(ConfigError, match="all scores of a row would be built in memory") as caught:
            report.attention("te", 128, "bf16")
        assert report.flash_attn.note in caught.value.problems[0].problem


@pytest.mark.parametrize(
    ("report", "head_dim", "precision", "reason"),
    [
        (replace(GPU, flash_attn=MISSING), 128, "bf16", "not installed"),
        (replace(GPU, cuda=CapabilityItem(False, "", "torch is a CPU build")), 128, "bf16", "no CUDA device"),
        (replace(GPU, compute_capability=(7, 5)), 128, "bf16", "compute capability 7.5, needs 8.0"),
        (GPU, 128, "fp32", "computes in bf16, not in fp32"),
        (GPU, 100, "bf16", "head dimension 100"),
        (GPU, 320, "bf16", "head dimension 320"),
    ],
)
def test_requested_back_end_that_cannot_run_is_a_config_error(
    report: Capabilities, head_dim: int, precision: str, reason: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        report.attention("flash", head_dim, precision)  # type: ignore[arg-type]
    (problem,) = caught.value.problems
    assert (problem.path, problem.value) == ("train.attention", "flash")
    assert reason in problem.problem
    assert report.attention("auto", head_dim, precision).name != "flash"  # type: ignore[arg-type]


def test_unknown_back_end_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="auto or one of te, flash, varlen, sdpa"):
        GPU.attention("flesh", 128, "bf16")


def test_layers_are_transformer_engines_only_where_it_is_usable() -> None:
    assert GPU.layers.name == "te"
    local = replace(GPU, transformer_engine=MISSING).layers
    assert (local.name, local.why) == ("local", "Transformer Engine: not installed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks a machine without CUDA")
def test_a_cpu_machine_uses_local_layers_and_sdpa_and_imports_no_gpu_package() -> None:
    before = set(sys.modules)
    report = probe.__wrapped__()
    assert (report.layers.name, report.attention("auto", 64, "bf16").name) == ("local", "sdpa")
    assert not report.cuda.present and not report.nccl.present and report.compute_capability == (0, 0)
    assert not {"transformer_engine", "flash_attn", "triton"} & (set(sys.modules) - before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks a machine without CUDA")
def test_an_installed_gpu_package_counts_as_absent_without_cuda(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("packages")
    (folder / "transformer_engine.py").write_text("raise OSError('must not be imported')")
    monkeypatch.syspath_prepend(str(folder))
    item = probe.__wrapped__().transformer_engine
    assert not item.present
    assert item.note == "installed, but not used without a CUDA device"
