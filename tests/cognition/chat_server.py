"""A server that speaks the chat protocol, and fails on purpose: what it did is counted, to be held against a ledger."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

SLOW_S = 30.0  # a slow answer comes only after the client gave up
ITEM = re.compile(r"item (\d+)\b")

Plan = Callable[
    [int, int, int], str
]  # number of the call, number of the item, which call about this item -> what to do


def five_steps(item: int) -> str:
    """The answer about an item."""
    return "".join(f"**Step {n}**: words\nPart {n} of item {item}.\n\n" for n in range(1, 6))


TEXTS = {
    "short": lambda item: five_steps(item).replace("**Step 3**", "Then"),
    "placeholder": lambda item: five_steps(item) + "<image>",
    "surrogate": lambda item: five_steps(item) + "\ud800",
    "empty": lambda item: " ",
    "cut": five_steps,
    "filtered": five_steps,
    "uncounted": five_steps,
}
FINISH = {"cut": "length", "filtered": "content_filter"}


@dataclass
class Counts:
    """Requests that the server saw, and the answers it gave."""

    calls: int = 0
    done: Counter[str] = field(default_factory=Counter)  # by what was done
    of_item: Counter[int] = field(default_factory=Counter)
    answers: Counter[int] = field(default_factory=Counter)  # usable ones, by item
    prompt_tokens: int = 0  # of all whole answers
    completion_tokens: int = 0
    under_way: int = 0
    most_under_way: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)


class Listener(ThreadingHTTPServer):
    """A thread per connection."""

    daemon_threads = True
    request_queue_size = 128  # the stock 5 overflows on a busy machine: a call reset by the kernel is in no count


class ChatServer:
    """Serves on a free port of this machine while the ``with`` block runs.

    Args:
        plan: "answer", a name of TEXTS, a status ("429 0.05" with a Retry-After), "half", "closed", "reset", "malformed"
            or "slow".
        delay_s: before every answer.
    """

    def __init__(self, plan: Plan = lambda call, item, of_item: "answer", delay_s: float = 0.0) -> None:
        self.counts = Counts()
        self._plan = plan
        self._delay_s = delay_s
        self._lock = threading.Lock()
        self._ended = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                outer.handle(self)

            def log_message(self, format: str, *args: Any) -> None: ...

        self._server = Listener(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        """One call."""
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        found = ITEM.search(body["messages"][1]["content"][0]["text"])
        item = int(found[1]) if found else -1
        counts = self.counts
        with self._lock:
            what = self._plan(counts.calls, item, counts.of_item[item])
            counts.calls += 1
            counts.of_item[item] += 1
            counts.done[what.split()[0]] += 1
            counts.bodies.append(body)
            counts.keys.add(request.headers.get("Authorization", ""))
            counts.under_way += 1
            counts.most_under_way = max(counts.most_under_way, counts.under_way)
        time.sleep(self._delay_s)
        try:
            self._do(request, what, item)
        finally:
            with self._lock:
                counts.under_way -= 1

    def _do(self, request: BaseHTTPRequestHandler, what: str, item: int) -> None:
        status, _, wait = what.partition(" ")
        if status.isdigit():
            error = {"error": {"message": f"no: {request.headers.get('Authorization')}", "code": wait}}
            retry = {"Retry-After": wait} if wait.replace(".", "").isdigit() else {}
            send(request, int(status), json.dumps(error).encode(), retry)
            return
        if what == "slow":
            self._ended.wait(SLOW_S)
        if what in ("closed", "slow"):
            request.connection.shutdown(socket.SHUT_RDWR)
            request.close_connection = True
            return
        answer = self._answer(what, item)
        if what == "malformed":
            send(request, 200, answer[: len(answer) // 2])
        elif what == "half":
            send(request, 200, answer[: len(answer) // 2], length=len(answer))
            request.connection.shutdown(socket.SHUT_RDWR)
            request.close_connection = True
        else:
            send(request, 200, answer)

    def _answer(self, what: str, item: int) -> bytes:
        text = TEXTS.get(what, five_steps)(item)
        usage = {"prompt_tokens": 1000 + item, "completion_tokens": 100 + item}
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": FINISH.get(what, "stop")}
        if what not in ("half", "malformed", "uncounted"):
            with self._lock:
                self.counts.prompt_tokens += usage["prompt_tokens"]
                self.counts.completion_tokens += usage["completion_tokens"]
                self.counts.answers[item] += what == "answer"
        return json.dumps({"choices": [choice]} | ({} if what == "uncounted" else {"usage": usage})).encode()


def send(
    request: BaseHTTPRequestHandler,
    status: int,
    body: bytes,
    headers: dict[str, str] | None = None,
    length: int | None = None,
) -> None:
    """Writes an answer in one piece."""
    lines = [f"HTTP/1.1 {status} X", "Content-Type: application/json", f"Content-Length: {length or len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    request.wfile.write("\r\n".join([*lines, "", ""]).encode() + body)
