"""Asks an OpenAI-compatible endpoint: a question gets a text with its token counts, or a fault that says what to do next.

In: messages of a chat   Out: Reply; raises EndpointFault   Next: annotator.py
Faults that pass (busy, server error, broken connection, too slow) may be tried again; wrong keys and models stop the run.
The key stands in one header, and in no message: texts of the endpoint are quoted without it.
"""

from __future__ import annotations

import asyncio
import email.utils
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from sicog_mcore.errors import ConfigError, ConfigProblem

RETRIED = (408, 409, 425, 429)  # and all from 500 on
HOPELESS = (401, 402, 403, 404, 405)  # the next item would meet the same
MAYBE_PAID = (408, 502, 504)  # somebody gave up while the model wrote
PASSING = ("no_connection", "timeout", "connection_lost", "answer_malformed")
NO_MONEY = "insufficient_quota"
LONGEST_WAIT_S = 3600.0
DETAIL_LETTERS = 300

ChatMessage = dict[str, Any]


@dataclass(frozen=True)
class Decoding:
    """The settings that an answer depends on besides its messages.

    Attributes:
        temperature: of sampling; the endpoint's own default is never used.
        max_tokens: longest answer.
    """

    model: str
    temperature: float
    max_tokens: int


@dataclass(frozen=True)
class Reply:
    """An answer of the endpoint.

    Attributes:
        text: empty if the endpoint sent none.
        finish: why it ended: "stop", "length", "content_filter", or the endpoint's own word.
        prompt_tokens, completion_tokens: as the endpoint counts them; None if it does not.
    """

    text: str
    finish: str
    prompt_tokens: int | None
    completion_tokens: int | None


class EndpointFault(Exception):
    """A call without an answer.

    Attributes:
        reason: stable code.
        retry: another try may succeed.
        stop: all other items would fail in the same way.
        wait_s: seconds that the endpoint asked to wait.
        maybe_paid: the endpoint may have worked, and may charge for it.
    """

    def __init__(
        self,
        reason: str,
        detail: str,
        *,
        retry: bool = True,
        stop: bool = False,
        wait_s: float = 0.0,
        maybe_paid: bool = False,
    ) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.retry = retry
        self.stop = stop
        self.wait_s = wait_s
        self.maybe_paid = maybe_paid


class Endpoint:
    """Asks over at most ``connections`` connections.

    Args:
        url: base, such as https://api.openai.com/v1.
        key: sent as a bearer token; empty for none.
        timeout_s: seconds for a whole call.

    Raises:
        ConfigError: the URL is none, or holds a password.
    """

    def __init__(self, url: str, key: str, decoding: Decoding, timeout_s: float, connections: int) -> None:
        self._url = _chat_url(url)
        self._key = key
        self._decoding = decoding
        self._timeout_s = timeout_s
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=timeout_s,
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def ask(self, messages: Sequence[ChatMessage]) -> Reply:
        """One answer to a chat.

        Raises:
            Fault: no_connection, timeout, connection_lost, http_<status>, answer_malformed.
        """
        body = {
            "model": self._decoding.model,
            "messages": list(messages),
            "temperature": self._decoding.temperature,
            "max_tokens": self._decoding.max_tokens,
        }
        try:
            async with asyncio.timeout(self._timeout_s):  # httpx limits the pauses, not the whole
                response = await self._client.post(self._url, json=body)
        # Nothing was sent, so nothing can be charged; in the cases below the endpoint may have worked.
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise EndpointFault("no_connection", self._quote(str(error) or type(error).__name__)) from error
        except (TimeoutError, httpx.TimeoutException) as error:
            raise EndpointFault("timeout", f"no answer within {self._timeout_s:g} s", maybe_paid=True) from error
        except httpx.HTTPError as error:
            raise EndpointFault(
                "connection_lost", self._quote(str(error) or type(error).__name__), maybe_paid=True
            ) from error
        if not response.is_success:
            raise self._http_fault(response)
        try:
            return _reply(response.json())
        except (ValueError, LookupError, TypeError) as error:
            detail = self._quote(f"{error!r} in {response.text}")
            raise EndpointFault("answer_malformed", detail, maybe_paid=True) from error

    def _http_fault(self, response: httpx.Response) -> EndpointFault:
        status = response.status_code
        # An empty account answers 429 like a busy server, but waiting does not help.
        broke = NO_MONEY in response.text
        return EndpointFault(
            f"http_{status}",
            "" if status in (401, 403) else self._quote(response.text),  # some endpoints quote the key
            retry=(status in RETRIED or status >= 500) and not broke,
            stop=status in HOPELESS or broke,
            wait_s=retry_after_s(response.headers.get("Retry-After", "")),
            maybe_paid=status in MAYBE_PAID,
        )

    def _quote(self, text: str) -> str:
        """A short text of the endpoint in one line, without the key."""
        text = text.replace(self._key, "***") if self._key else text
        return " ".join(text.encode(errors="replace").decode().split())[:DETAIL_LETTERS]


def _chat_url(base: str) -> str:
    try:
        url = httpx.URL(base)
    except httpx.InvalidURL as error:
        raise ConfigError(
            [ConfigProblem("endpoint", "...", f"is no URL ({error})", "give its base address")]
        ) from error
    if url.userinfo:
        problem = ConfigProblem("endpoint", url.host, "holds a user name or password", "put the key into --key-file")
        raise ConfigError([problem])
    if url.scheme not in ("http", "https") or not url.host:
        fix = "write it as https://host/v1"
        raise ConfigError([ConfigProblem("endpoint", base, "is no address of an http server", fix)])
    return f"{base.rstrip('/')}/chat/completions"


def _reply(answer: Any) -> Reply:
    choice = answer["choices"][0]
    text = choice["message"].get("content")
    usage = answer.get("usage") or {}
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    # Counts are money: anything but a whole number from 0 on counts as not told.
    prompt, completion = (count if type(count) is int and count >= 0 else None for count in counts)
    return Reply(text if isinstance(text, str) else "", str(choice.get("finish_reason")), prompt, completion)


def is_passing(reason: str) -> bool:
    """Whether a fault's reason is of a kind that ends by itself: nobody there, too slow, too busy, broken."""
    status = reason.removeprefix("http_")
    if status != reason:
        return int(status) in RETRIED or int(status) >= 500
    return reason in PASSING


def retry_after_s(value: str) -> float:
    """Seconds that a Retry-After header asks for, as a number or as a date; 0 if it holds neither."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return 0.0
    return min(max(0.0, seconds), LONGEST_WAIT_S)
