"""The conformance tool passes on the recorded data, and tells a difference from an unusable file."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
RESAMPLER = ROOT / "tests" / "assets" / "resampler.safetensors"
SLICED = {
    "width": 500,
    "height": 375,
    "max_slices": 7,
    "overview_px": [378, 280],
    "grid_cols_rows": [2, 1],
    "slice_px": [266, 406],
    "num_slices": 2,
    "visual_tokens_stitched": 445,
    "visual_tokens_per_slice": 434,
}
UNSLICED = {
    "width": 336,
    "height": 336,
    "max_slices": 7,
    "overview_px": [336, 336],
    "grid_cols_rows": None,
    "slice_px": None,
    "num_slices": 0,
    "visual_tokens_stitched": 144,
    "visual_tokens_per_slice": 144,
}

spec = importlib.util.spec_from_file_location("check_conformance", ROOT / "tools" / "check_conformance.py")
assert spec is not None and spec.loader is not None
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def slice_file(folder: Path, *cases: dict) -> str:
    path = folder / "slices.json"
    path.write_text(json.dumps({"scale_resolution": 336, "patch": 14, "cases": cases}))
    return str(path)


def test_recorded_data_conforms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--slices", slice_file(tmp_path, SLICED, UNSLICED), "--resampler", str(RESAMPLER)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "slices: 2 of 2 plans equal"
    assert [line.split(",")[0] for line in lines[1:]] == [
        "resampler case0: grid 24 x 24 (h x w)",
        "resampler case1: grid 20 x 27 (h x w)",
        "resampler case2: grid 25 x 22 (h x w)",
    ]


@pytest.mark.parametrize(
    ("field", "value", "difference"),
    [("slice_px", [266, 420], "14"), ("visual_tokens_stitched", 446, "1"), ("grid_cols_rows", None, "inf")],
)
def test_a_differing_plan_is_printed_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str, value: object, difference: str
) -> None:
    assert tool.main(["--slices", slice_file(tmp_path, {**SLICED, field: value}, UNSLICED)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"slices 500 x 375 px: largest difference {difference} ({field} ")
    assert lines[1] == "slices: 1 of 2 plans equal"


def test_a_differing_resampler_case_fails_and_the_others_are_still_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(RESAMPLER)
    tensors["case1.tokens"][3, 5] += 0.01
    save_file(tensors, tmp_path / "changed.safetensors")
    assert tool.main(["--resampler", str(tmp_path / "changed.safetensors")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [("FAILS" in line) for line in lines] == [False, True, False]
    assert "largest difference 0.01 " in lines[1]


def test_nan_does_not_conform(tmp_path: Path) -> None:
    tensors = load_file(RESAMPLER)
    tensors["case0.tokens"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    assert tool.main(["--resampler", str(tmp_path / "nan.safetensors")]) == 1


def _broken_resampler(folder: Path, kind: str) -> Path:
    tensors, path = load_file(RESAMPLER), folder / "broken.safetensors"
    if kind == "missing":
        return path
    if kind == "garbage":
        path.write_bytes(b"not safetensors at all")
        return path
    if kind == "no weight":
        del tensors["weight.query"]
    if kind == "no norm":
        del tensors["weight.ln_q.bias"]
    if kind == "wrong shape":
        tensors["weight.proj"] = torch.zeros(3, 3)
    if kind == "wrong grid":
        tensors["case0.grid_hw"] = torch.tensor([5, 5])
    if kind == "no cases":
        tensors = {name: x for name, x in tensors.items() if name.startswith("weight.")}
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    "kind", ["missing", "garbage", "no weight", "no norm", "wrong shape", "wrong grid", "no cases", "folder"]
)
def test_an_unusable_resampler_file_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path = tmp_path if kind == "folder" else _broken_resampler(tmp_path, kind)
    assert tool.main(["--resampler", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}: ")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"patch": 14, "cases": []}',
        '{"scale_resolution": 336, "patch": 14, "cases": [{"width": 5}]}',
        json.dumps({"scale_resolution": 336, "patch": 14, "cases": [{**SLICED, "width": "wide"}]}),
        json.dumps({"scale_resolution": 336, "patch": 14, "cases": [{**SLICED, "height": 0}]}),
        json.dumps({"scale_resolution": 336, "patch": 14, "cases": [{**SLICED, "slice_px": "large"}]}),
    ],
)
def test_an_unusable_slice_file_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    path = tmp_path / "plans.json"
    path.write_text(text)
    assert tool.main(["--slices", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}: ")


def test_nothing_to_check_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as caught:
        tool.main([])
    assert caught.value.code == 2
