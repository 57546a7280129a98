"""Warm-up data in steps: descriptions by a stronger model, and reasoning from LLaVA-CoT-100k.

cod: In: captioned images (ALLaVA-VFLAN, LLaVA rows), an OpenAI-compatible endpoint   Out: cod.jsonl, caption.jsonl
cot: In: LLaVA-CoT-100k, no model   Out: cot.jsonl, direct.jsonl
Next: launch/warmup_stage0.py. `cod` keeps a ledger in its output folder; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path

from sicog_mcore.cognition.annotation.annotated_rows import CAPTIONED_KEYS, build_captioned, open_rows
from sicog_mcore.cognition.annotation.annotator import (
    LEDGER_FILE,
    AnnotationItem,
    AnnotationLimits,
    Annotator,
    Prices,
    open_items,
    survey,
    write_answers,
)
from sicog_mcore.cognition.annotation.endpoint import Decoding, Endpoint, is_passing
from sicog_mcore.cognition.annotation.ledger import Ledger
from sicog_mcore.cognition.annotation.llava_cot import REFUSED_FILE, convert
from sicog_mcore.cognition.item_keys import KeyTally
from sicog_mcore.cognition.prompts import load_annotator_prompt
from sicog_mcore.errors import (
    EXIT_GIVE_UP,
    EXIT_OK,
    EXIT_RETRY,
    ConfigError,
    ConfigProblem,
    SicogError,
    exit_code,
    printable,
)
from sicog_mcore.lock import owned

INTERRUPTED = "interrupted"


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    options = parse(arguments)
    try:
        if options.command == "cod" and options.dry_run:
            return describe(options)
        with owned(options.out, shlex.join(sys.argv), lambda line: print(printable(line), file=sys.stderr)):
            return describe(options) if options.command == "cod" else reason(options)
    except (SicogError, OSError) as error:
        print(printable(f"annotate: {error}"), file=sys.stderr)
        return exit_code(error)


def reason(options: argparse.Namespace) -> int:
    """The command cot."""
    result = convert(options.rows, options.images, options.out, options.take, options.seed)
    tell(result.notes)
    long, short = result.written["cot"], result.written["direct"]
    counts = f"{long} rows each in cot.jsonl and direct.jsonl"
    if long != short:
        counts = f"{long} rows in cot.jsonl, {short} in direct.jsonl"
    refused = listed("; refused", result.refused) + listed("; refused in cot.jsonl alone", result.only_direct)
    print(printable(f"{options.out}: {counts}{refused}"))
    if not short:
        print(
            printable(f"annotate: no row can be used; {options.out / REFUSED_FILE} says why of each"), file=sys.stderr
        )
        return EXIT_GIVE_UP
    return EXIT_OK


def describe(options: argparse.Namespace) -> int:
    """The command cod."""
    key = read_key(options.key_file)
    prompt = load_annotator_prompt()
    decoding = Decoding(options.model, options.temperature, options.max_tokens)
    limits = AnnotationLimits(
        concurrency=options.concurrency,
        calls=options.calls,
        answers=options.answers,
        first_wait_s=options.first_wait_s,
        max_cost=options.max_cost,
        max_side_px=options.max_side_px,
        image_tokens=options.image_tokens,
    )
    prices = Prices(options.price_prompt, options.price_completion)
    tally = KeyTally()
    samples = open_rows(options.rows, options.images, tally.watch(build_captioned, CAPTIONED_KEYS))
    items, refused = survey(samples, options.images, options.take, options.seed)
    tell(tally.lines())
    settings = {
        "model": decoding.model,
        "temperature": decoding.temperature,
        "max_tokens": decoding.max_tokens,
        "prompt": prompt.version,
        "prefill": options.prefill,
        "max_side_px": limits.max_side_px,
    }
    path = options.out / LEDGER_FILE
    annotator = Annotator(samples, decoding, prompt, options.prefill, prices, limits, Progress(len(items)))
    if options.dry_run and not path.exists():
        print(estimated(annotator, items, None))
        return EXIT_OK
    with Ledger(path, settings) as ledger:
        todo = open_items(items, ledger, options.retry_failed)
        if options.dry_run:
            print(estimated(annotator, todo, ledger))
            return EXIT_OK
        endpoint = Endpoint(options.endpoint, key, decoding, options.timeout_s, limits.concurrency)
        asyncio.run(run(annotator, todo, endpoint, ledger))
        end_progress()
        refused += annotator.refused
        outcomes = write_answers(samples, items, refused, ledger, options.images, options.out)
        print(printable(summary(options.out, outcomes, ledger)))
    return ended(annotator.halted_by, outcomes)


async def run(annotator: Annotator, items: Sequence[AnnotationItem], endpoint: Endpoint, ledger: Ledger) -> None:
    """Annotates; the first interrupt lets the calls under way end, the second one does not."""
    loop = asyncio.get_running_loop()

    def interrupt(number: int) -> None:
        annotator.halt(INTERRUPTED)
        loop.remove_signal_handler(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt, number)
    try:
        async with endpoint:
            await annotator.run(items, endpoint, ledger)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def ended(halted_by: str, outcomes: Mapping[str, Counter[str]]) -> int:
    """The exit code; says why a run ended early, or without a single answer."""
    if halted_by:
        print(f"annotate: stopped: {halted_by}; the same command goes on from here", file=sys.stderr)
        return 128 + signal.SIGINT if halted_by == INTERRUPTED else EXIT_GIVE_UP
    if outcomes.get("answer"):
        return EXIT_OK
    reasons: Counter[str] = sum((counts for counts in outcomes.values()), Counter())
    failed = outcomes.get("failed", Counter())
    is_dead = any(is_passing(reason) for reason in failed)
    fix = "correct the rows or their images"
    if is_dead:
        fix = "the endpoint gave no answer at all; see that it runs, then give the same command again"
    elif failed:
        fix = "ask again with --retry-failed, maybe another model or more --max-tokens in another --out"
    what = f"0 of {reasons.total()} rows were answered{listed(' (', reasons)})" if reasons else "there are no rows"
    print(printable(f"annotate: {what.replace('(: ', '(')}; {fix}"), file=sys.stderr)
    return EXIT_RETRY if is_dead else EXIT_GIVE_UP


def tell(lines: Iterable[str]) -> None:
    """Says what the user should know of the rows before anything is asked or written."""
    for line in lines:
        print(printable(f"annotate: {line}"), file=sys.stderr)


class Progress:
    """Counts on a terminal, and is silent elsewhere."""

    def __init__(self, total: int) -> None:
        self._total = total

    def __call__(self, settled: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{settled} settled in this run, {self._total} items in all ", end="", file=sys.stderr, flush=True)


def end_progress() -> None:
    """Leaves the line of the counts."""
    if sys.stderr.isatty():
        print(file=sys.stderr)


def estimated(annotator: Annotator, items: Sequence[AnnotationItem], ledger: Ledger | None) -> str:
    """What a run would cost."""
    expected = annotator.estimate(items, ledger)
    basis = f"as {expected.measured} answers in the ledger" if expected.measured else "assumed, nothing measured yet"
    tokens = f"{expected.prompt_tokens:,} + {expected.completion_tokens:,} tokens ({basis})"
    bound = f"at most {expected.at_most:.4f} USD if no answer is refused"
    return f"{expected.items} items to ask: {tokens}, {expected.cost:.4f} USD; {bound}"


def summary(out: Path, outcomes: Mapping[str, Counter[str]], ledger: Ledger) -> str:
    """Items, calls, tokens and money, in one line."""
    none: Counter[str] = Counter()
    rows = f"{out}: {outcomes.get('answer', none).total()} rows each in cod.jsonl and caption.jsonl"
    rows += listed("; failed", outcomes.get("failed", none))
    rows += " (asked again with --retry-failed)" if "failed" in outcomes and "answer" in outcomes else ""
    rows += listed("; unusable", outcomes.get("unusable", none))
    rows += f"; open: {outcomes['open'].total()}" if "open" in outcomes else ""
    totals = ledger.totals
    calls = ", ".join(f"{number} x {outcome}" for outcome, number in sorted(totals.calls.items()))
    money = f"{totals.prompt_tokens:,} + {totals.completion_tokens:,} tokens, {totals.cost:.6f} USD"
    unknown = totals.unpriced + ledger.cut_off()
    doubt = f"; {unknown} calls of unknown price, at most {ledger.committed - totals.cost:.6f} USD" if unknown else ""
    return f"{rows}; calls: {calls or 'none'}; {money}{doubt}"


def listed(name: str, counts: Counter[str]) -> str:
    """Counts by reason, most frequent first; nothing if there are none."""
    return f"{name}: {', '.join(f'{number} x {reason}' for reason, number in counts.most_common())}" if counts else ""


def read_key(path: Path | None) -> str:
    """The first line of a file; empty without a file.

    Raises:
        ConfigError: it holds no key. What it holds is not shown.
    """
    if path is None:
        return ""
    key = path.read_text(encoding="utf-8", errors="replace").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        fix = "write nothing but the key into it"
        raise ConfigError([ConfigProblem("key-file", str(path), "is not one line of printable ASCII", fix)])
    return key


def positive(text: str) -> int:
    """A whole number from 1."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def seconds(text: str) -> float:
    """A time from 0 on."""
    number = float(text)
    if not 0 <= number < float("inf"):
        raise ValueError(text)
    return number


def usd(text: str) -> Decimal:
    """An amount of money from 0 on."""
    try:
        amount = Decimal(text)
    except InvalidOperation as error:
        raise ValueError(text) from error
    if not amount.is_finite() or amount < 0:
        raise ValueError(text)
    return amount


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    cod = commands.add_parser("cod", help="descriptions in five steps, by an OpenAI-compatible endpoint")
    cod.add_argument("--endpoint", required=True, metavar="URL", help="base address, such as https://api.openai.com/v1")
    cod.add_argument("--model", required=True, help="name that the endpoint knows")
    cod.add_argument(
        "--key-file",
        type=Path,
        metavar="PATH",
        help='file that holds the key; <(printf %%s "$KEY") takes it from a variable',
    )
    cod.add_argument("--price-prompt", type=usd, default=Decimal(0), help="USD per million prompt tokens")
    cod.add_argument("--price-completion", type=usd, default=Decimal(0), help="USD per million tokens of answers")
    cod.add_argument("--max-cost", type=usd, help="USD that all runs with this --out may spend together")
    cod.add_argument("--dry-run", action="store_true", help="print the estimate and stop")
    cod.add_argument("--retry-failed", action="store_true", help="ask again about items that failed")
    defaults = AnnotationLimits()
    cod.add_argument("--concurrency", type=positive, default=defaults.concurrency, help="calls at the same time")
    cod.add_argument("--calls", type=positive, default=defaults.calls, help="tries while the endpoint fails")
    cod.add_argument("--answers", type=positive, default=defaults.answers, help="tries at a usable answer")
    cod.add_argument("--first-wait-s", type=seconds, default=defaults.first_wait_s, help="first back-off; it doubles")
    cod.add_argument("--timeout-s", type=seconds, default=180.0, help="seconds for a call")
    cod.add_argument("--temperature", type=float, default=0.2)
    cod.add_argument("--max-tokens", type=positive, default=2048, help="longest answer")
    cod.add_argument(
        "--max-side-px", type=positive, default=defaults.max_side_px, help="larger images are sent smaller"
    )
    cod.add_argument(
        "--image-tokens", type=positive, default=defaults.image_tokens, help="most that an image counts for"
    )
    cod.add_argument(
        "--no-prefill", dest="prefill", action="store_false", help="for endpoints that refuse a started answer"
    )
    cot = commands.add_parser("cot", help="rows of LLaVA-CoT-100k, without a model")
    for command in (cod, cot):
        command.add_argument("--rows", type=Path, required=True, help="rows, .json or .jsonl")
        command.add_argument("--images", type=Path, required=True, help="folder that their image paths are relative to")
        command.add_argument("--out", type=Path, required=True, help="folder")
        command.add_argument("--take", type=positive, help="number of rows to draw; all without it")
        command.add_argument("--seed", type=int, default=42, help="decides which rows are drawn")
    options = parser.parse_args(arguments)
    if (
        options.command == "cod"
        and options.max_cost is not None
        and not (options.price_prompt or options.price_completion)
    ):
        cod.error("--max-cost needs --price-prompt and --price-completion: without prices every call is free")
    return options


if __name__ == "__main__":
    sys.exit(main())
