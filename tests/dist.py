"""Runs a function on several gloo ranks and hands back what each returned.

Ranks are forked from a server that has imported torch and Megatron once, and has done nothing else.
A file rendezvous avoids port races; a rank's exception is raised in the test with that rank's traceback.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing as mp
import os
import runpy
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TIMEOUT_S = 240
PRELOADED = ["torch", "sicog_mcore.train.run"]


def _rank_main(function: Callable, rank: int, world_size: int, init_method: str, args: tuple, queue: Any) -> None:
    warnings.filterwarnings("ignore")
    try:
        import torch

        torch.set_num_threads(1)
        queue.put((rank, function(Rank(rank, world_size, init_method), *args), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))


class Rank:
    """Numbers that a rank function needs to join the others."""

    def __init__(self, rank: int, world_size: int, init_method: str):
        self.rank, self.world_size, self.init_method = rank, world_size, init_method

    def start(self, parallel: Any, seed: int = 0) -> Any:
        """Joins the world and returns the Topology."""
        from sicog_mcore.parallel.topology import start_topology

        return start_topology(parallel, seed, self.init_method, self.rank, self.world_size)


def run_ranks(function: Callable, world_size: int, *args: Any) -> list[Any]:
    """Calls ``function(rank: Rank, *args)`` in ``world_size`` fresh processes; returns the results in rank order."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        init_method = f"file://{Path(folder) / 'rendezvous'}"
        queue = context.Queue()
        ranks = [
            context.Process(target=_rank_main, args=(function, r, world_size, init_method, args, queue))
            for r in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            results = _collect(queue, ranks)
        finally:
            for process in ranks:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
    return [results[r] for r in range(world_size)]


def run_script(script: Path, arguments: Sequence[str], world_size: int) -> str:
    """A script as torchrun starts it, on forked ranks: starting Python costs seconds. Returns what the ranks printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return "".join(run_ranks(_script_main, world_size, str(script), list(arguments), port))


def _script_main(rank: Rank, script: str, arguments: list[str], port: int) -> str:
    place = {"RANK": rank.rank, "LOCAL_RANK": rank.rank, "WORLD_SIZE": rank.world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    sys.argv = [script, *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            assert not end.code, f"{script} ended with {end.code} after:\n{said.getvalue()}"
    return said.getvalue()


def _collect(queue: Any, ranks: list) -> dict[int, Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + TIMEOUT_S
    while len(results) < len(ranks):
        if queue.empty():
            time.sleep(0.02)
            if time.monotonic() > deadline:
                raise TimeoutError(f"ranks {sorted(set(range(len(ranks))) - set(results))} gave no result")
            if all(not p.is_alive() for p in ranks) and queue.empty():
                raise RuntimeError(f"ranks died with exit codes {[p.exitcode for p in ranks]}")
            continue
        rank, value, error = queue.get()
        if error is not None:
            raise AssertionError(f"rank {rank} failed:\n{error}")
        results[rank] = value
    return results
