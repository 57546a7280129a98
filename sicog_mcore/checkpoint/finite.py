"""Looks for NaN and infinite values in first weights while they are copied, so that no file is read twice.

In: rows of tensors as they arrive on this rank   Out: what is not finite or all zero   Used by: weights.py, part_reader.py
A NaN in first weights ends a run at its first step, where nothing points at the file any more.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sicog_mcore.errors import CheckpointError
from sicog_mcore.parallel.topology import Topology

SHOWN = 5


class FiniteWatch:
    """Collects faults of the rows that pass by: values that are not finite, matrices of zeros."""

    def __init__(self) -> None:
        self._broken: dict[str, int] = {}
        self._zero: set[str] = set()
        self._filled: set[str] = set()

    def see(self, name: str, rows: Tensor) -> None:
        """Looks at rows of one tensor."""
        if not rows.numel() or not rows.is_floating_point():
            return
        # One pass without a copy: a sum is finite only if all is, but for sums that are too large, which are looked at.
        total = rows.sum(dtype=torch.float64 if rows.dtype == torch.float64 else torch.float32)
        if not bool(torch.isfinite(total)) and (count := int((~torch.isfinite(rows)).sum())):
            self._broken[name] = self._broken.get(name, 0) + count
        # Matrices only: biases and norms of zeros are common.
        if rows.dim() > 1:
            is_zero = float(total) == 0 and not bool(rows.any())
            (self._zero if is_zero else self._filled).add(name)

    def settle(self, topology: Topology, where: str) -> list[str]:
        """Joins the findings of all ranks. Collective.

        Returns:
            a line on matrices that hold nothing but zeros, if there are any.

        Raises:
            CheckpointError: on every rank alike: values that are no finite numbers, with tensor and file.
        """
        seen = topology.gather_objects((self._broken, sorted(self._zero)))
        broken: dict[str, int] = {}
        for found, _ in seen:
            for name, count in found.items():
                # Replicas see the same rows, so counts are not added; the largest of them is shown.
                broken[name] = max(broken.get(name, 0), count)
        if broken:
            listed = _shown(f"{name} ({count:,} values)" for name, count in sorted(broken.items()))
            raise CheckpointError(
                f"{where}: NaN or infinite values in {len(broken)} tensors: {listed}; a run from these weights cannot "
                "learn: copy them again, or take other weights"
            )
        zero = {name for _, names in seen for name in names}
        if zero:  # on this rank's rows; another one may hold rows that are not
            zero -= {name for names in topology.gather_objects(sorted(zero & self._filled)) for name in names}
        return [f"{where}: {len(zero)} matrices are all zero: {_shown(sorted(zero))}"] if zero else []


def _shown(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:SHOWN]) + (f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else "")
