"""Makes threads of the rank write its checkpoints: nothing that writes outlives the rank.

Megatron 0.16 writes every file in a forked process, and collects the results through a server process of its own (300 MB);
both go on when the rank is killed. 0.19 writes in threads, keeps the server, and loses the cause of a failure on the way.
Our saves wait for the files anyway, and threads write as fast.
Checked with megatron-core 0.16.1 and 0.19.2.
"""

from __future__ import annotations

import queue
import threading
from typing import Any

# Names in Megatron 0.16 and 0.19: of what writes the files, and of what gives the queue of results.
WRITERS = ("write_preloaded_data_multiproc", "write_preloaded_data_multithread")
RESULTS = ("_get_write_results_queue", "get_write_results_queue")


def _write_in_threads(transforms: list, *arguments: Any) -> None:
    """Stands in for Megatron's function of that work, see WRITERS.

    The last two arguments are the files and the queue of results, which gets {number of the file: what was written}, or the
    exception of a file that failed.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    # The two versions pass different arguments before these.
    *_, buckets, results = arguments
    done: queue.Queue = queue.Queue()
    counter: queue.Queue = queue.Queue()  # each writer takes one out; nobody waits for it
    threads = []
    for index, bucket in enumerate(buckets):
        counter.put(index)
        words = (transforms, index, bucket, done, counter, True)
        threads.append(threading.Thread(target=FileSystemWriterAsync.write_preloaded_data, args=words, daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Every writer puts its number and its result once, so after joining there is one entry per file.
    written = dict(done.get_nowait() for _ in buckets)
    failures = [result for result in written.values() if isinstance(result, Exception)]
    results.put(failures[0] if failures else written)


def install_writers() -> None:
    """Makes Megatron's distributed checkpoints start no process; safe to call more than once."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    module: Any = filesystem_async
    writer = next(name for name in WRITERS if hasattr(module.FileSystemWriterAsync, name))
    results_queue = next(name for name in RESULTS if hasattr(module, name))
    if getattr(module.FileSystemWriterAsync, writer) is _write_in_threads:
        return
    # A rank writes one checkpoint at a time, so one queue serves all of them.
    results: queue.Queue = queue.Queue()
    setattr(module, results_queue, lambda: results)
    setattr(module.FileSystemWriterAsync, writer, staticmethod(_write_in_threads))
