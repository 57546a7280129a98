"""Every test runs under these rules: quick ones first, those without their device skipped, torch with one thread."""

from __future__ import annotations

import sys

import pytest

LATER = ("slow", "fault")  # in this order, after the unmarked ones


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(
        key=lambda item: max((1 + LATER.index(mark) for mark in LATER if item.get_closest_marker(mark)), default=0)
    )
    if any(item.get_closest_marker("gpu") or item.get_closest_marker("multi_gpu") for item in items):
        _skip_without_devices(items)


def _skip_without_devices(items: list[pytest.Item]) -> None:
    import torch

    for mark, needed in (("gpu", 1), ("multi_gpu", 2)):
        if torch.cuda.device_count() < needed:
            skip = pytest.mark.skip(reason=f"needs {needed} CUDA device(s), found {torch.cuda.device_count()}")
            for item in items:
                if item.get_closest_marker(mark):
                    item.add_marker(skip)


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    """More threads than cores make the small tensors of these tests slower, and their sums differ."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
