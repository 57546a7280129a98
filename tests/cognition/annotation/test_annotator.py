"""The ledger survives what happens to files, the endpoint names each fault, and unusable answers are refused by name."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import struct
import threading
import time
from collections.abc import Sequence
from decimal import Decimal
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sicog_mcore.cognition.annotation.annotated_rows import build_captioned, open_rows
from sicog_mcore.cognition.annotation.annotator import (
    AnnotationLimits,
    Annotator,
    Prices,
    open_items,
    picture,
    survey,
    write_answers,
)
from sicog_mcore.cognition.annotation.endpoint import Decoding, Endpoint, EndpointFault, Reply, retry_after_s
from sicog_mcore.cognition.annotation.ledger import Call, Ledger
from sicog_mcore.cognition.prompts import load_annotator_prompt
from sicog_mcore.data.sample import ImageRef
from sicog_mcore.errors import ConfigError, RecordError
from tests.builders import write_image
from tests.cognition.chat_server import ChatServer, five_steps

SETTINGS = {"model": "m", "temperature": 0.2}
CENT = Decimal("0.01")
DECODING = Decoding("m", 0.2, 500)
QUESTION: Sequence[Any] = [{}, {"role": "user", "content": [{"type": "text", "text": "item 3 ."}]}]
TIMEOUT_S = 30.0
SHORT_TIMEOUT_S = 0.5


def test_a_ledger_says_the_same_after_it_was_closed(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path, SETTINGS) as ledger:
        first, second, third = (ledger.begin(item, 5 * CENT) for item in "aba")
        ledger.end(second, Call("answer", final=True, text="ä\ud800", prompt_tokens=7, completion_tokens=2, cost=CENT))
        ledger.end(first, Call("refused", "no_steps", prompt_tokens=7, cost=3 * CENT))
        ledger.end(third, Call("fault", "timeout", cost=None))
        ledger.begin("c", 2 * CENT)
        expected = ledger.totals, ledger.committed, ledger.cut_off()
    with Ledger(path, SETTINGS) as ledger:
        assert (ledger.totals, ledger.committed, ledger.cut_off()) == expected
        assert ledger.totals.calls == {"answer": 1, "refused": 1, "fault": 1}
        assert (ledger.totals.cost, ledger.totals.unpriced, ledger.committed) == (4 * CENT, 1, 11 * CENT)
        assert (ledger.cost("a"), ledger.cost("b"), ledger.cost("c")) == (3 * CENT, CENT, 0)
        assert ledger.final("a") is None and ledger.final("c") is None
        found = ledger.final("b")
        assert found and found.text == "ä\ud800"
        assert ledger.begin("d", CENT) == 4


def test_a_half_written_last_line_is_dropped_and_its_call_counts_as_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path, SETTINGS) as ledger:
        ledger.end(ledger.begin("a", CENT), Call("answer", final=True, cost=CENT))
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with Ledger(path, SETTINGS) as ledger:
            begun = whole[:cut].count(b"\n") >= 2
            assert (ledger.final("a"), ledger.cut_off(), ledger.committed) == (None, int(begun), CENT * begun)
        with Ledger(path, SETTINGS):
            assert path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize("line", ["{", "[]", '{"call": 7, "outcome": "answer", "cost": "1"}', '{"call": 0}', "\0\0"])
def test_damage_inside_a_ledger_is_named_by_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path, SETTINGS) as ledger:
        ledger.begin("a", CENT)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(RecordError, match=r"ledger.jsonl:3: .* is no line of a ledger"):
        Ledger(path, SETTINGS)


def test_a_ledger_belongs_to_one_process_and_to_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path, SETTINGS), pytest.raises(RecordError, match="another process writes it"):
        Ledger(path, SETTINGS)
    with pytest.raises(RecordError, match=r"begun with model 'm' \(now 'n'\)"):
        Ledger(path, SETTINGS | {"model": "n"})


def asked(url: str, timeout_s: float = TIMEOUT_S) -> Reply:
    """One call to a server at an address."""

    async def ask() -> Reply:
        async with Endpoint(url, "sk-1", DECODING, timeout_s, 1) as endpoint:
            return await endpoint.ask(QUESTION)

    return asyncio.run(ask())


def test_an_answer_comes_with_its_counts() -> None:
    with ChatServer() as server:
        assert asked(server.url) == Reply(five_steps(3), "stop", 1003, 103)
    body = server.counts.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.2, 500)


@pytest.mark.parametrize(
    ("what", "reason", "retry", "stop", "maybe_paid"),
    [
        ("400", "http_400", False, False, False),
        ("401", "http_401", False, True, False),
        ("404", "http_404", False, True, False),
        ("302", "http_302", False, False, False),
        ("429", "http_429", True, False, False),
        ("429 insufficient_quota", "http_429", False, True, False),
        ("500", "http_500", True, False, False),
        ("503", "http_503", True, False, False),
        ("504", "http_504", True, False, True),
        ("half", "connection_lost", True, False, True),
        ("closed", "connection_lost", True, False, True),
        ("malformed", "answer_malformed", True, False, True),
        ("slow", "timeout", True, False, True),
    ],
)
def test_each_fault_says_what_to_do_next(what: str, reason: str, retry: bool, stop: bool, maybe_paid: bool) -> None:
    with ChatServer(lambda call, item, of_item: what) as server, pytest.raises(EndpointFault) as caught:
        asked(server.url, SHORT_TIMEOUT_S if what == "slow" else TIMEOUT_S)
    fault = caught.value
    assert (fault.reason, fault.retry, fault.stop, fault.maybe_paid) == (reason, retry, stop, maybe_paid)
    assert "sk-1" not in str(fault)


def reset_one(listener: socket.socket) -> None:
    """Takes a call and resets its connection."""
    connection, _ = listener.accept()
    connection.recv(1)  # it stands, and was used
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_a_reset_connection_is_named_though_the_error_has_no_text() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=reset_one, args=(listener,))
        thread.start()
        with pytest.raises(EndpointFault) as caught:
            asked(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
        thread.join()
    fault = caught.value
    assert (fault.reason, fault.retry, fault.maybe_paid) == ("connection_lost", True, True)
    assert fault.detail.endswith("Error")


def test_nobody_there_costs_nothing() -> None:
    with ChatServer() as server:
        pass
    with pytest.raises(EndpointFault) as caught:
        asked(server.url)
    assert (caught.value.reason, caught.value.retry, caught.value.maybe_paid) == ("no_connection", True, False)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7), ("0.5", 0.5), ("inf", 3600)]
    + [(odd, 0) for odd in ("", "-3", "soon", "nan", formatdate(0, usegmt=True))],
)
def test_retry_after_is_seconds_or_a_date(header: str, seconds: float) -> None:
    assert retry_after_s(header) == seconds


def test_retry_after_a_date_is_the_time_until_then() -> None:
    assert 60 <= retry_after_s(formatdate(time.time() + 100, usegmt=True)) <= 101


@pytest.mark.parametrize("url", ["", "host/v1", "file:///etc/passwd", "http://", "http://me:secret@host/v1"])
def test_an_address_that_cannot_work_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Endpoint(url, "", DECODING, 1.0, 1)
    assert "secret" not in str(caught.value)


def annotate(folder: Path, server: ChatServer, limits: AnnotationLimits) -> tuple[list[dict[str, Any]], Ledger]:
    """Annotates one item, "item 3"; returns the states and the closed ledger."""
    write_image(folder / "x.png", 8, 8, seed=0)
    (folder / "rows.jsonl").write_text(json.dumps({"id": "s", "image": "x.png", "caption": "This is item 3 ."}) + "\n")
    samples = open_rows(folder / "rows.jsonl", folder, build_captioned)
    items, refused = survey(samples, folder, None, 0)
    prices = Prices(Decimal(1), Decimal(10))
    annotator = Annotator(samples, DECODING, load_annotator_prompt(), True, prices, limits, lambda settled: None)

    async def work(ledger: Ledger) -> None:
        async with Endpoint(server.url, "", DECODING, TIMEOUT_S, 1) as endpoint:
            await annotator.run(open_items(items, ledger, False), endpoint, ledger)

    with Ledger(folder / "out" / "ledger.jsonl", SETTINGS) as ledger:
        asyncio.run(work(ledger))
        write_answers(samples, items, refused, ledger, folder, folder / "out")
    states = (folder / "out" / "items.jsonl").read_text().splitlines()
    return [json.loads(line) for line in states], ledger


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("short", "step_missing"),
        ("cut", "answer_truncated"),
        ("filtered", "content_filter"),
        ("empty", "answer_empty"),
        ("placeholder", "image_token_in_answer"),
        ("surrogate", "not_utf8"),
    ],
)
def test_an_answer_that_cannot_be_trained_on_is_paid_for_asked_again_and_then_failed(
    tmp_path: Path, what: str, reason: str
) -> None:
    with ChatServer(lambda call, item, of_item: what) as server:
        states, ledger = annotate(tmp_path, server, AnnotationLimits(answers=2, first_wait_s=0))
    price = Decimal("0.002033")  # (1003 + 10 * 103) tokens of a dollar per million
    assert [(row["outcome"], row["reason"], Decimal(row["cost"])) for row in states] == [("failed", reason, 2 * price)]
    assert ledger.totals.calls == {"refused": 2} and ledger.totals.cost == 2 * price


def test_tries_at_a_failing_endpoint_are_limited_and_recorded(tmp_path: Path) -> None:
    with ChatServer(lambda call, item, of_item: "500") as server:
        states, ledger = annotate(tmp_path, server, AnnotationLimits(calls=3, first_wait_s=0))
    assert server.counts.calls == 3 and ledger.totals.calls == {"fault": 3}
    assert (states[0]["outcome"], states[0]["reason"]) == ("failed", "http_500")


def test_an_answer_without_counts_is_kept_and_its_price_called_unknown(tmp_path: Path) -> None:
    with ChatServer(lambda call, item, of_item: "uncounted") as server:
        states, ledger = annotate(tmp_path, server, AnnotationLimits())
    assert states[0]["outcome"] == "answer"
    assert (ledger.totals.unpriced, ledger.totals.cost) == (1, 0) and ledger.totals.at_most > 0


def test_retry_after_is_honoured(tmp_path: Path) -> None:
    wait_s = 0.4
    with ChatServer(lambda call, item, of_item: "answer" if call else f"429 {wait_s}") as server:
        start = time.monotonic()
        annotate(tmp_path, server, AnnotationLimits(first_wait_s=0))
        assert time.monotonic() - start >= wait_s
    assert server.counts.calls == 2


def test_the_annotator_sees_question_reference_and_image(tmp_path: Path) -> None:
    with ChatServer() as server:
        annotate(tmp_path, server, AnnotationLimits())
    system, user, prefill = server.counts.bodies[0]["messages"]
    prompt = load_annotator_prompt()
    assert (system["content"], prefill) == (prompt.system, {"role": "assistant", "content": prompt.prefill})
    text, image = user["content"]
    assert text["text"].endswith(f"{prompt.reference}\nThis is item 3 .") and "<image>" not in text["text"]
    assert image["image_url"]["url"].startswith("data:image/jpeg;base64,")


def test_a_picture_is_upright_and_within_the_limit(tmp_path: Path) -> None:
    image = Image.new("RGB", (300, 100), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "x.jpg", exif=exif)
    url = picture(ImageRef(str(tmp_path / "x.jpg")), 150)
    sent = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert sent.format == "JPEG" and sent.size == (50, 150)


def test_an_item_that_changed_under_its_id_is_asked_about_again(tmp_path: Path) -> None:
    def key(caption: str) -> str:
        row = {"id": "s", "image": "x.png", "conversations": [{"from": "human", "value": "What?"}], "caption": caption}
        (tmp_path / "rows.json").write_text(json.dumps([row]))
        return survey(open_rows(tmp_path / "rows.json", tmp_path, build_captioned), tmp_path, None, 0)[0][0].key

    assert key("one") == key("one") != key("two")
