"""The index of the data sets at the start of a run: one rank builds what is missing, the others wait without timing out.

In: Experiment, Topology   Out: an index that every rank can open   Next: feed.py, data/index/build_index.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sicog_mcore.config import Experiment
from sicog_mcore.data.index.build_index import IndexOptions, IndexProgress, build_index
from sicog_mcore.errors import ConfigError, MachineError
from sicog_mcore.parallel.topology import Topology

SIGN_EVERY_S = 1.0  # between signs of life to the ranks that wait: each is a collective, whose timeout begins anew
SHOWN_EVERY_S = 10.0
AT_WORK, DONE, REFUSED, FAILED = "at work", "done", "refused", "failed"


def share_index(experiment: Experiment, topology: Topology, notice: Callable[[str], None]) -> None:
    """Builds what is missing of the index on rank 0, in as many processes as its machine has processors. Collective.

    Args:
        notice: shows a line to the user.

    Raises:
        ConfigError: data sets that cannot be opened, a build that takes longer than data.index_limit_s. On all ranks, as is
        MachineError: the index cannot be written.
    """
    if topology.is_main:
        word, value = _build(experiment, topology, notice)
        topology.broadcast_object((word, value))
    else:
        word, value = AT_WORK, None
        while word == AT_WORK:
            word, value = _heard(topology)
    if word == REFUSED:
        raise ConfigError(value)
    if word == FAILED:
        error = MachineError(value)
        error.said_elsewhere = not topology.is_main
        raise error


def _heard(topology: Topology) -> tuple[str, Any]:
    found: Any = topology.broadcast_object(None)
    return found


def _build(experiment: Experiment, topology: Topology, notice: Callable[[str], None]) -> tuple[str, Any]:
    """The build on rank 0: how it ended, and with it problems or a message."""
    told = shown = time.monotonic()

    def tell(progress: IndexProgress) -> None:
        nonlocal told, shown
        now = time.monotonic()
        if now - told >= SIGN_EVERY_S:
            told = now
            topology.broadcast_object((AT_WORK, None))
        if now - shown >= SHOWN_EVERY_S:
            shown = now
            notice(str(progress))

    try:
        report = build_index(experiment, IndexOptions(limit_s=experiment.data.index_limit_s), tell)
    except ConfigError as error:
        return REFUSED, error.problems
    except MachineError as error:
        return FAILED, str(error)
    if report.built_blocks:
        for line in report.lines():
            notice(line)
    return DONE, None
