"""Children that an interrupt ends, wherever the tests were started.

A shell that runs a command in the background without job control (`make test &` in a script) makes it ignore SIGINT, and
children inherit that: an interrupt that a test sends would never arrive.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heeded() -> Iterator[None]:
    """Processes that are started in the block heed SIGINT, as one that a user starts does. For the main thread."""
    # A handler is not inherited by a new program: what is caught here has its default effect there.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
