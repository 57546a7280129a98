"""Lets a stronger model write Chains of Description: each item is asked until it is usable, none lost, none paid twice.

In: captioned rows, an endpoint   Out: a ledger of answers; cod.jsonl, caption.jsonl, items.jsonl   Next: data/sources.py
The ledger is the state: a run that was stopped, killed, or out of money goes on where it was, and the files are
written from it in the order of the input, whatever the order of the answers.
"""

from __future__ import annotations

import asyncio
import base64
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Literal

from PIL import Image
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_random_exponential

from sicog_mcore.cognition.annotation.annotated_rows import asked_row, choose, relative_paths, write_rows
from sicog_mcore.cognition.annotation.endpoint import ChatMessage, Decoding, Endpoint, EndpointFault, Reply, is_passing
from sicog_mcore.cognition.annotation.ledger import Call, Ledger
from sicog_mcore.cognition.codec import parse, render
from sicog_mcore.cognition.prompts import AnnotatorPrompt, bare_question
from sicog_mcore.config import DataConfig
from sicog_mcore.data.decode import decode_image, read_bytes
from sicog_mcore.data.rows import JsonRow
from sicog_mcore.data.sample import IMAGE_PLACEHOLDER, ImageRef, Sample
from sicog_mcore.data.sources import SampleIndex
from sicog_mcore.errors import MachineError, SampleError
from sicog_mcore.files import hash_bytes

ANSWER_FILES: Sequence[Literal["cod", "caption"]] = ("cod", "caption")
ITEMS_FILE = "items.jsonl"
LEDGER_FILE = "ledger.jsonl"
JPEG_QUALITY = 95
BYTES_PER_TOKEN = 4  # of English text; a token never holds less than one byte
TYPICAL_ANSWER_TOKENS = 450  # five steps, as long as the instructions ask for
PER_MILLION = Decimal(10) ** -6


@dataclass(frozen=True)
class Prices:
    """USD per million tokens."""

    prompt: Decimal
    completion: Decimal

    def cost(self, prompt_tokens: int, completion_tokens: int) -> Decimal:
        """USD of a call."""
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) * PER_MILLION


@dataclass(frozen=True)
class AnnotationLimits:
    """The limits of annotation: how hard to try, and when to stop.

    Attributes:
        concurrency: items asked about at the same time.
        calls: tries at one answer while the endpoint fails.
        answers: tries at an answer that can be used.
        first_wait_s: bound of the random wait after the first fault; it doubles with every further one.
        longest_wait_s: largest bound; a longer Retry-After is still honoured.
        max_cost: USD that may be spent, over all runs with this ledger; None for no limit.
        max_side_px: larger images are made smaller before they are sent.
        image_tokens: what an image is assumed to cost at most.
    """

    concurrency: int = 8
    calls: int = 6
    answers: int = 3
    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0
    max_cost: Decimal | None = None
    max_side_px: int = 1536
    image_tokens: int = 1500


@dataclass(frozen=True)
class AnnotationItem:
    """A row to annotate.

    Attributes:
        row: its number in the samples.
        key: hash of what the annotator is shown; an item that changed under its id is a new one.
    """

    row: int
    id: str
    origin: str
    key: str


@dataclass(frozen=True)
class Refusal:
    """A row that never came to be asked about."""

    id: str
    origin: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of the open items.

    Attributes:
        items: open ones.
        cost: USD expected.
        measured: answers that the expectation rests on; 0 if it rests on assumptions.
        at_most: USD if every answer is as long as allowed and usable at once.
    """

    items: int
    prompt_tokens: int
    completion_tokens: int
    cost: Decimal
    measured: int
    at_most: Decimal


def survey(
    samples: SampleIndex, images: Path, take: int | None, seed: int
) -> tuple[list[AnnotationItem], list[Refusal]]:
    """The rows to annotate, in order, and those that cannot be; images are not opened yet.

    Args:
        images: folder that image paths are relative to.
        take: rows to choose; None for all.

    Raises:
        ConfigError: fewer usable rows than are to be taken.
    """
    usable, refused = [], []
    for row in range(len(samples)):
        origin = samples.origin(row)
        try:
            sample = samples.read(row)
        except SampleError as error:
            refused.append(Refusal("", origin, error.reason, error.detail))
            continue
        # The key covers all that the annotator sees: an item that changed under its id is asked about again.
        shown = repr((sample.id, relative_paths(sample, images), _shown(sample)))
        usable.append((sample.id, AnnotationItem(row, sample.id, origin, hash_bytes(shown.encode()))))
    return choose(usable, take, seed), refused


def open_items(items: Iterable[AnnotationItem], ledger: Ledger, retry_failed: bool) -> list[AnnotationItem]:
    """Selects the items that still need an answer.

    Args:
        retry_failed: ask also about items that failed. While an endpoint has not answered at all, nothing speaks against
            the items, and those that it failed on are asked about again in any case.
    """
    finals = [(item, ledger.final(item.key)) for item in items]
    was_dead = not any(ledger.totals.calls.get(outcome) for outcome in ("answer", "refused"))

    def is_open(call: Call | None) -> bool:
        if call is None:
            return True
        return call.outcome != "answer" and (retry_failed or (was_dead and is_passing(call.reason)))

    return [item for item, call in finals if is_open(call)]


class Annotator:
    """Asks an endpoint about items.

    Args:
        prompt: instructions; its pre-fill is only sent if ``prefill``, since some endpoints refuse one.
        report: called after every item with the number settled in this run.
    """

    def __init__(
        self,
        samples: SampleIndex,
        decoding: Decoding,
        prompt: AnnotatorPrompt,
        prefill: bool,
        prices: Prices,
        limits: AnnotationLimits,
        report: Callable[[int], None],
    ) -> None:
        self._samples = samples
        self._decoding = decoding
        self._prompt = prompt
        self._prefill = prefill
        self._prices = prices
        self._limits = limits
        self._report = report
        self._settled = 0
        self._under_way = 0
        self._halt = asyncio.Event()
        self._call_ended = asyncio.Condition()
        self.halted_by = ""  # why the run ended early
        self.refused: list[Refusal] = []  # items whose image cannot be sent

    def halt(self, reason: str) -> None:
        """Starts no further call; those under way are waited for."""
        self.halted_by = self.halted_by or reason
        self._halt.set()

    async def run(self, items: Iterable[AnnotationItem], endpoint: Endpoint, ledger: Ledger) -> None:
        """Returns when every item is settled, or the run halted.

        Raises:
            MachineError: the ledger cannot be written; calls under way are ended.
        """
        # One iterator for all workers, which take turns on one thread: each item goes to exactly one of them.
        queue, failure = iter(items), None
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._limits.concurrency):
                    group.create_task(self._work(queue, endpoint, ledger))
        # A task group wraps errors, and ends the other workers when one fails.
        except* MachineError as failures:
            failure = _first(failures)  # every worker may have met the full disk
        if failure:
            raise failure

    def estimate(self, items: Sequence[AnnotationItem], ledger: Ledger | None) -> Estimate:
        """Cost of items, from the ledger's own average where it has one."""
        text_bytes = images = 0
        for item in items:
            sample = self._samples.read(item.row)
            text_bytes += self._text_bytes(sample)
            images += len(sample.images)
        prompt_tokens = text_bytes // BYTES_PER_TOKEN + images * self._limits.image_tokens
        completion_tokens = len(items) * min(TYPICAL_ANSWER_TOKENS, self._decoding.max_tokens)
        cost = self._prices.cost(prompt_tokens, completion_tokens)
        measured = ledger.totals.priced_answers if ledger else 0
        # Answers that were paid tell more than assumptions on lengths.
        if ledger and measured:
            totals = ledger.totals
            prompt_tokens = len(items) * totals.prompt_tokens // measured
            completion_tokens = len(items) * totals.completion_tokens // measured
            cost = len(items) * totals.cost / measured
        # A token holds one byte at least, so bytes bound the tokens of a text from above.
        longest = text_bytes + images * self._limits.image_tokens, len(items) * self._decoding.max_tokens
        return Estimate(len(items), prompt_tokens, completion_tokens, cost, measured, self._prices.cost(*longest))

    async def _work(self, queue: Iterator[AnnotationItem], endpoint: Endpoint, ledger: Ledger) -> None:
        for item in queue:
            if self._halt.is_set():
                return
            sample = self._samples.read(item.row)
            try:
                # Decoding and encoding a picture takes longer than sending it; the other workers go on meanwhile.
                messages = await asyncio.to_thread(self._messages, sample)
            except SampleError as error:
                self.refused.append(Refusal(item.id, item.origin, error.reason, error.detail))
                continue
            at_most = self._prices.cost(
                self._text_bytes(sample) + len(sample.images) * self._limits.image_tokens, self._decoding.max_tokens
            )
            for tries in range(1, self._limits.answers + 1):
                attempt = _Attempt(item.key, messages, at_most, last_answer=tries == self._limits.answers)
                if await self._ask(attempt, endpoint, ledger):
                    self._settled += 1
                    self._report(self._settled)
                    break
                if self._halt.is_set():
                    return

    async def _ask(self, attempt: _Attempt, endpoint: Endpoint, ledger: Ledger) -> bool:
        """One answer, over as many calls as faults make necessary. Returns whether the item is settled."""
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self._limits.calls),
            wait=self._wait_s,
            sleep=self._sleep,
            retry=retry_if_exception(lambda error: isinstance(error, EndpointFault) and error.retry),
            reraise=True,
        )
        try:
            async for trial in retrying:
                with trial:
                    # The last try settles the item, even by a fault.
                    last_call = trial.retry_state.attempt_number == self._limits.calls
                    return await self._call(attempt, last_call, endpoint, ledger)
        except EndpointFault as fault:
            if fault.stop:
                self.halt(f"{fault.reason} {fault.detail}".strip())
            return not fault.stop
        raise AssertionError("tenacity ended without a result")

    async def _call(self, attempt: _Attempt, last_call: bool, endpoint: Endpoint, ledger: Ledger) -> bool:
        if not await self._may_spend(attempt.at_most, ledger):
            return False
        number = ledger.begin(attempt.key, attempt.at_most)
        try:
            reply = await endpoint.ask(attempt.messages)
        except EndpointFault as fault:
            # A fault that stops the run says nothing about the item, which is asked about again next time.
            final = not fault.stop and (last_call or not fault.retry)
            cost = None if fault.maybe_paid else Decimal(0)
            ledger.end(number, Call("fault", fault.reason, fault.detail, final, cost=cost))
            raise
        else:
            call = self._judge(reply, attempt.last_answer)
            ledger.end(number, call)
            return call.final
        finally:
            self._under_way -= 1
            async with self._call_ended:
                self._call_ended.notify_all()

    async def _may_spend(self, at_most: Decimal, ledger: Ledger) -> bool:
        """Waits until a call fits into the budget; False if it never will, or the run halted."""
        budget = self._limits.max_cost
        async with self._call_ended:
            # ``committed`` counts calls under way at their bound. As they end cheaper than feared, money comes free
            # again.
            while not self._halt.is_set() and budget is not None and ledger.committed + at_most > budget:
                if not self._under_way:  # nothing can become cheaper than feared
                    self.halt(f"the next call may cost {at_most:.4f} USD, {budget - ledger.committed:.4f} are left")
                    break
                await self._call_ended.wait()
            if self._halt.is_set():
                return False
            self._under_way += 1
            return True

    def _judge(self, reply: Reply, last: bool) -> Call:
        """Whether an answer can be used, and what it cost."""
        reason = _unusable(reply)
        prompt_tokens, completion_tokens = reply.prompt_tokens or 0, reply.completion_tokens or 0
        counted = reply.prompt_tokens is not None and reply.completion_tokens is not None
        return Call(
            "refused" if reason else "answer",
            reason,
            final=last or not reason,
            text=reply.text,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            cost=self._prices.cost(prompt_tokens, completion_tokens) if counted else None,
        )

    def _messages(self, sample: Sample) -> list[ChatMessage]:
        pictures = [picture(image, self._limits.max_side_px) for image in sample.images]
        asked: list[ChatMessage] = [{"type": "text", "text": self._question(sample)}]
        asked += [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
        prefill = [{"role": "assistant", "content": self._prompt.prefill}] if self._prefill else []
        return [{"role": "system", "content": self._prompt.system}, {"role": "user", "content": asked}, *prefill]

    def _question(self, sample: Sample) -> str:
        question, reference = _shown(sample)
        return f"{question}\n\n{self._prompt.reference}\n{reference}".strip()

    def _text_bytes(self, sample: Sample) -> int:
        return len((self._prompt.system + self._question(sample) + self._prompt.prefill).encode())

    def _wait_s(self, state: RetryCallState) -> float:
        fault = state.outcome.exception() if state.outcome else None
        backoff = wait_random_exponential(multiplier=self._limits.first_wait_s, max=self._limits.longest_wait_s)
        asked = fault.wait_s if isinstance(fault, EndpointFault) else 0.0
        return asked + backoff(state)  # the jitter keeps those that were told the same from coming back at once

    async def _sleep(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._halt.wait(), seconds)


def _first(failure: BaseException) -> BaseException:
    """The first error of a group, or of the groups in it."""
    return _first(failure.exceptions[0]) if isinstance(failure, BaseExceptionGroup) else failure


@dataclass(frozen=True)
class _Attempt:
    """One try at a usable answer."""

    key: str
    messages: Sequence[ChatMessage]
    at_most: Decimal
    last_answer: bool


def picture(ref: ImageRef, max_side_px: int) -> str:
    """An image as data URL: JPEG, upright, as the trainer decodes it.

    Raises:
        SampleError: as ``decode_image``.
    """
    # Decoded by the trainer's own code, so upright as in training, and encoded anew, so without metadata.
    image = Image.fromarray(decode_image(read_bytes(ref), DataConfig()))
    image.thumbnail((max_side_px, max_side_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # Without chroma subsampling, which blurs small coloured text.
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_answers(
    samples: SampleIndex,
    items: Sequence[AnnotationItem],
    refused: Sequence[Refusal],
    ledger: Ledger,
    images: Path,
    out: Path,
) -> dict[str, Counter[str]]:
    """Writes the training rows of all answered items, and one line about every row of the input.

    Args:
        images: folder that image paths are relative to.

    Returns:
        For each outcome ("answer", "failed", "unusable", "open") how many items have which reason.
    """
    answered = [item for item in items if (call := ledger.final(item.key)) and call.outcome == "answer"]
    for form in ANSWER_FILES:
        write_rows(out / f"{form}.jsonl", (_training_row(samples, item, ledger, images, form) for item in answered))
    states = list(_states(items, refused, ledger))
    write_rows(out / ITEMS_FILE, states)
    outcomes: dict[str, Counter[str]] = {}
    for state in states:
        outcomes.setdefault(state["outcome"], Counter())[state["reason"]] += 1
    return outcomes


def _training_row(
    samples: SampleIndex, item: AnnotationItem, ledger: Ledger, images: Path, form: Literal["cod", "caption"]
) -> JsonRow:
    call = ledger.final(item.key)
    steps = parse(call.text, "cod").steps if call else None
    assert steps, "only readable answers are final"
    answer = render(steps, "cod") if form == "cod" else steps[-1]
    return asked_row(samples.read(item.row), images, form, [answer])


def _states(items: Iterable[AnnotationItem], refused: Iterable[Refusal], ledger: Ledger) -> Iterator[dict[str, str]]:
    """Yields the state of every row; rows that cannot be asked about stand last."""
    nameless = [refusal for refusal in refused if not refusal.id]  # a list in one line has all its rows in line 1
    unusable = {(refusal.id, refusal.origin): refusal for refusal in refused if refusal.id}
    for item in items:
        refusal = unusable.pop((item.id, item.origin), None)
        call = ledger.final(item.key) or Call("fault", "open")
        outcome = (
            "unusable" if refusal else "answer" if call.outcome == "answer" else "failed" if call.final else "open"
        )
        state = {"outcome": outcome, "reason": call.reason, "detail": call.detail}
        if refusal:
            state = {"outcome": "unusable", "reason": refusal.reason, "detail": refusal.detail}
        yield {"id": item.id, "origin": item.origin} | state | {"cost": str(ledger.cost(item.key))}
    for refusal in (*unusable.values(), *nameless):
        yield asdict(refusal) | {"outcome": "unusable", "cost": "0"}


def _shown(sample: Sample) -> tuple[str, str]:
    """Question and earlier description."""
    question, description = (turn.text for turn in sample.turns)
    return bare_question(question), description


def _unusable(reply: Reply) -> str:
    """Why an answer cannot be trained on; empty if it can."""
    if reply.finish == "length":
        return "answer_truncated"
    if reply.finish == "content_filter":
        return "content_filter"
    if not reply.text.strip():
        return "answer_empty"
    if IMAGE_PLACEHOLDER in reply.text:
        return "image_token_in_answer"
    found = parse(reply.text, "cod")
    if found.steps is None:
        return found.problem
    try:
        render(found.steps, "cod").encode()
    except SampleError as error:
        return error.reason
    except UnicodeEncodeError:
        return "not_utf8"
    return ""
