"""Slicing and resampler are held against files recorded from the released implementation.

In: slice_plans.json, resampler.safetensors   Out: Conformance   Next: check_conformance.py (the verb)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sicog_mcore.config import ResamplerConfig, SlicingConfig
from sicog_mcore.data.sample import Size
from sicog_mcore.data.slicing import lay_out, plan_slices
from sicog_mcore.model.resampler import Resampler

RESAMPLER_TOLERANCE = 2e-4  # largest absolute difference, fp32
QUERY_GRID = 12  # of the recorded token counts
HEAD_DIM = 128  # of released resamplers
FIELDS = (
    "overview_px",
    "grid_cols_rows",
    "slice_px",
    "num_slices",
    "visual_tokens_stitched",
    "visual_tokens_per_slice",
)


class UnusableFile(Exception):
    """A file is missing, unreadable, or not of the expected form."""


@dataclass(frozen=True)
class Conformance:
    """The comparison that a recorded file yields with our results.

    Attributes:
        cases: number of recorded cases.
        failures: names of those that differ from ours by more than they may.
        largest: largest absolute difference of any case; NaN where one is.
    """

    cases: int
    failures: tuple[str, ...]
    largest: float


def planned(width: int, height: int, config: SlicingConfig, patch_px: int) -> dict[str, object]:
    """Our plan of one image in the fields of slice_plans.json, whose sizes are (width, height)."""
    plan = plan_slices(Size(height, width), config, patch_px)
    sliced = plan.num_slices > 0
    return {
        "overview_px": [plan.overview.width, plan.overview.height],
        "grid_cols_rows": [plan.grid.width, plan.grid.height] if sliced else None,
        "slice_px": [plan.slice.width, plan.slice.height] if sliced else None,
        "num_slices": plan.num_slices,
        "visual_tokens_stitched": lay_out(plan, QUERY_GRID, "stitched").num_tokens,
        "visual_tokens_per_slice": lay_out(plan, QUERY_GRID, "per_slice").num_tokens,
    }


def largest_difference(ours: object, recorded: object) -> float:
    """Largest difference between two numbers or lists of numbers; infinite where only one is null or lengths differ."""
    if ours is None or recorded is None:
        return 0.0 if ours is recorded else math.inf
    a, b = (x if isinstance(x, list) else [x] for x in (ours, recorded))
    if not all(isinstance(x, int) for x in b):
        raise ValueError(f"{recorded!r} stands where whole numbers belong")
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) if len(a) == len(b) else math.inf


def compare_slices(path: Path, say: Callable[[str], None]) -> Conformance:
    """Compares our slice plans with the recorded ones.

    Args:
        path: JSON file of cases.
        say: is told every case that differs, and a summary.

    Raises:
        UnusableFile: see ``usable``.
    """
    with usable(path):
        document = json.loads(path.read_text(encoding="utf-8"))
        cases = document["cases"]
        if not cases:
            raise ValueError("it holds no cases")
        failures, largest = [], 0.0
        for case in cases:
            config = SlicingConfig(resolution_px=document["scale_resolution"], max_slices=case["max_slices"])
            ours = planned(case["width"], case["height"], config, document["patch"])
            wrong = [name for name in FIELDS if largest_difference(ours[name], case[name]) != 0]
            if wrong:
                name = f"{case['width']} x {case['height']} px"
                worst = max(largest_difference(ours[field], case[field]) for field in wrong)
                details = ", ".join(f"{field} {ours[field]}, recorded {case[field]}" for field in wrong)
                say(f"slices {name}: largest difference {worst:g} ({details})")
                failures.append(name)
                largest = max(largest, worst)
        say(f"slices: {len(cases) - len(failures)} of {len(cases)} plans equal")
        return Conformance(len(cases), tuple(failures), largest)


def build_resampler(tensors: dict[str, Tensor]) -> Resampler:
    """The module whose parameters are the ``weight.*`` tensors; all sizes follow from their shapes."""
    weights = {name.removeprefix("weight."): x.float() for name, x in tensors.items() if name.startswith("weight.")}
    queries, width = weights["query"].shape
    config = ResamplerConfig(query_grid=math.isqrt(queries), num_heads=max(1, width // HEAD_DIM))
    module = Resampler(config, kv_width=weights["kv_proj.weight"].shape[1], width=width)
    module.load_state_dict(weights)
    return module


def resampler_cases(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Name, features, grid [1, 2] and recorded tokens of every case."""
    names = {match[1] for name in tensors if (match := re.fullmatch(r"(case\d+)\..*", name))}
    if not names:
        raise ValueError("it holds no cases")
    for name in sorted(names, key=lambda case: int(case.removeprefix("case"))):
        features, tokens = (tensors[f"{name}.{field}"].float() for field in ("features", "tokens"))
        grid = tensors[f"{name}.grid_hw"].reshape(1, 2)
        if int(grid.min()) < 1 or int(grid.prod()) != features.shape[0]:
            raise ValueError(f"{name}: {features.shape[0]} feature rows do not fill a grid of {grid[0].tolist()}")
        yield name, features, grid, tokens


@torch.no_grad()
def compare_resampler(path: Path, say: Callable[[str], None]) -> Conformance:
    """Compares the tokens of our resampler, with the recorded weights, with the recorded tokens.

    Args:
        path: safetensors file of weights and cases.
        say: is told the largest difference of every case.

    Raises:
        UnusableFile: see ``usable``.
    """
    with usable(path):
        tensors = load_file(path)
        module = build_resampler(tensors)
        failures, differences = [], []
        for name, features, grid, tokens in resampler_cases(tensors):
            ours = module(features, grid)[0]
            if ours.shape != tokens.shape:
                raise ValueError(
                    f"{name}: recorded tokens are {list(tokens.shape)}, the weights make {list(ours.shape)}"
                )
            difference = float((ours - tokens).abs().max())
            differences.append(difference)
            good = difference <= RESAMPLER_TOLERANCE  # false for NaN
            failures += [] if good else [name]
            height, width = grid[0].tolist()
            verdict = "ok" if good else f"FAILS, more than {RESAMPLER_TOLERANCE:g}"
            say(f"resampler {name}: grid {height} x {width} (h x w), largest difference {difference:.3g} {verdict}")
        largest = math.nan if any(map(math.isnan, differences)) else max(differences)
        return Conformance(len(differences), tuple(failures), largest)


@contextmanager
def usable(path: Path) -> Iterator[None]:
    """Turns whatever is wrong with the file itself into an UnusableFile.

    Raises:
        UnusableFile: the file cannot be read, lacks something, or holds something else.
    """
    try:
        yield
    except OSError as error:
        raise UnusableFile(f"{path}: cannot be read: {error.strerror or error}") from error
    except KeyError as error:
        raise UnusableFile(f"{path}: lacks {error}; expected the format of the conformance data") from error
    except (ValueError, TypeError, IndexError, ZeroDivisionError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UnusableFile(f"{path}: not in the format of the conformance data: {reason}") from error
