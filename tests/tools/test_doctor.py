"""The doctor describes this machine, and broken ones."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from sicog_mcore.commands import doctor
from sicog_mcore.commands.doctor import (
    FeaturePath,
    MachineReport,
    PackageState,
    environment_facts,
    show,
    version_warnings,
)
from sicog_mcore.model import capability
from sicog_mcore.model.capability import CapabilityItem
from tools.doctor import main


def test_json_names_every_package_and_the_path_of_every_feature(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    packages = {item["name"]: item for item in report["packages"]}
    assert {"torch", "CUDA", "NCCL", "Transformer Engine", "apex", "flash-attn", "Triton", "DALI"} <= set(packages)
    assert packages["torch"]["present"] and packages["torch"]["version"]
    features = {item["name"]: item for item in report["features"]}
    assert all(item["path"] and item["why"] for item in features.values())
    if not packages["CUDA"]["present"]:
        chosen = [features[name]["path"] for name in ("transformer layers", "attention, bf16", "process groups")]
        assert chosen == ["local", "sdpa", "gloo"]
    assert {"Python", "cores", "memory", "disk", "/dev/shm"} <= set(report["machine"])
    assert report["problems"] == []


@pytest.mark.parametrize(
    ("flash", "chosen", "named"),
    [
        (CapabilityItem(True, "2.8", ""), "flash", "te"),
        (CapabilityItem(False, "", "not installed"), "varlen", "refused"),
    ],
)
def test_an_older_gpu_with_transformer_engine_says_which_attention_it_gets(
    flash: CapabilityItem, chosen: str, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = CapabilityItem(True, "1", "")
    report = replace(
        capability.probe(), cuda=here, transformer_engine=here, flash_attn=flash, varlen=here, compute_capability=(8, 0)
    )
    monkeypatch.setattr(capability, "probe", lambda: report)
    assert main(["--json"]) == 0
    features = {item["name"]: item for item in json.loads(capsys.readouterr().out)["features"]}
    assert features["attention, bf16"]["path"] == chosen
    assert features["attention te, by name"]["path"] == named
    if named == "refused":
        assert "flash-attn is missing (not installed)" in features["attention te, by name"]["why"]


def test_tables_end_with_warnings_and_a_verdict() -> None:
    text = io.StringIO()
    report = MachineReport(
        machine={"cores": "2 usable of 2"},
        packages=[PackageState("CUDA", False, "", "torch is a [CPU] build")],
        features=[FeaturePath("process groups", "gloo", "no CUDA device")],
        warnings=["torch 3.0 is untested"],
    )
    show(report, Console(file=text, width=100, color_system=None))
    lines = [line.strip() for line in text.getvalue().splitlines() if line.strip()]
    assert "CUDA  no                torch is a [CPU] build" in lines
    assert any(line.split() == ["process", "groups", "gloo", "no", "CUDA", "device"] for line in lines)
    assert lines[-2:] == ["warning: torch 3.0 is untested", "Ready: a run can start here."]


def test_torch_that_cannot_be_imported_is_a_problem_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(doctor, "ESSENTIAL", ("torch",))
    assert main([]) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert "problem: torch cannot be imported" in output and "pip install -e ." in output
    assert output.endswith("A run cannot start here.")


def test_missing_megatron_is_a_problem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    monkeypatch.setattr(doctor, "ESSENTIAL", ("megatron.core",))
    assert main(["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["problems"][0].startswith("megatron.core cannot be imported")
    assert report["packages"] == []


@pytest.mark.parametrize(
    ("python", "versions", "untested"),
    [
        ("3.11", {"torch": "2.13.0+cpu", "megatron-core": "0.16.1"}, []),
        ("3.12", {"torch": "2.11.0+cu130", "megatron-core": "0.19.2"}, []),
        ("3.11", {}, []),
        ("3.13", {"torch": "2.1.0", "megatron-core": "0.17.0"}, ["Python 3.13", "torch 2.1.0", "megatron-core 0.17.0"]),
    ],
)
def test_versions_outside_the_tested_range_are_warnings(
    python: str, versions: dict[str, str], untested: list[str]
) -> None:
    warnings = version_warnings(python, versions)
    assert [warning.split(" is untested")[0] for warning in warnings] == untested


def test_the_environment_is_told_and_warned_of() -> None:
    facts, told = environment_facts({})
    assert facts["CUDA_DEVICE_MAX_CONNECTIONS"].startswith("unset; launchers set 1") and told == []
    assert facts["allocator"] == "unset; launchers set PYTORCH_ALLOC_CONF=expandable_segments:True"
    facts, told = environment_facts(
        {
            "CUDA_DEVICE_MAX_CONNECTIONS": "8",
            "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64",
            "SLURM_JOB_ID": "7",
            "SLURM_NTASKS": "4",
        }
    )
    assert facts["allocator"] == "PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:64"
    assert ["Megatron expects 1" in told[0], "SLURM_NTASKS=4" in told[1], "--signals-to-handle" in told[2]] == [
        True
    ] * 3
    assert len(told) == 3
