"""Conformance as a library step: cases, failures and the largest difference, for files that are right or changed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sicog_mcore.commands.conformance import (
    RESAMPLER_TOLERANCE,
    UnusableFile,
    compare_resampler,
    compare_slices,
    largest_difference,
)
from tests.builders import ASSETS


def test_recorded_slice_plans_are_ours_and_one_that_is_changed_is_named(tmp_path: Path) -> None:
    said = list[str]()
    document = json.loads((ASSETS / "slice_plans.json").read_text())
    found = compare_slices(ASSETS / "slice_plans.json", said.append)
    assert (found.cases, found.failures, found.largest) == (len(document["cases"]), (), 0)
    assert said == [f"slices: {found.cases} of {found.cases} plans equal"]
    case = document["cases"][0]
    case["num_slices"] += 3
    (tmp_path / "changed.json").write_text(json.dumps(document))
    changed = compare_slices(tmp_path / "changed.json", said.append)
    assert changed.failures == (f"{case['width']} x {case['height']} px",) and changed.largest == 3
    assert said[1].startswith(f"slices {changed.failures[0]}: largest difference 3 (num_slices ")


def test_recorded_tokens_are_ours_and_nan_is_a_failure(tmp_path: Path) -> None:
    tensors = load_file(ASSETS / "resampler.safetensors")
    found = compare_resampler(ASSETS / "resampler.safetensors", print)
    assert found.failures == () and 0 <= found.largest <= RESAMPLER_TOLERANCE
    name = next(name for name in tensors if name.endswith(".tokens"))
    tensors[name] = torch.full_like(tensors[name], math.nan)
    save_file(tensors, tmp_path / "nan.safetensors")
    broken = compare_resampler(tmp_path / "nan.safetensors", print)
    assert broken.failures == (name.removesuffix(".tokens"),) and math.isnan(broken.largest)
    assert broken.cases == found.cases


@pytest.mark.parametrize("content", ["{}", '{"cases": []}', "[", '{"cases": [{}], "patch": 14}'])
def test_a_file_of_another_form_is_unusable(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UnusableFile, match=r"x\.json: (lacks|not in the format)"):
        compare_slices(tmp_path / "x.json", print)


def test_differences_between_lists_numbers_and_nothing() -> None:
    assert largest_difference([1, 5], [2, 2]) == 3 and largest_difference(4, 4) == 0
    assert largest_difference(None, None) == 0 and largest_difference([1], None) == math.inf
    assert largest_difference([1], [1, 2]) == math.inf
