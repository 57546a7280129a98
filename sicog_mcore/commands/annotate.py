"""Warm-up data in steps: descriptions by a stronger model, and reasoning from LLaVA-CoT-100k.

cod: In: captioned images (ALLaVA-VFLAN, LLaVA rows), an OpenAI-compatible endpoint   Out: cod.jsonl, caption.jsonl
cot: In: LLaVA-CoT-100k, no model   Out: cot.jsonl, direct.jsonl
Next: annotator.py, llava_cot.py (how). `cod` keeps a ledger in its output folder; the same command goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from sicog_mcore.cognition.annotation.annotated_rows import CAPTIONED_KEYS, build_captioned, open_rows
from sicog_mcore.cognition.annotation.annotator import (
    LEDGER_FILE,
    AnnotationItem,
    AnnotationLimits,
    Annotator,
    Estimate,
    Prices,
    open_items,
    survey,
    write_answers,
)
from sicog_mcore.cognition.annotation.endpoint import Decoding, Endpoint, is_passing
from sicog_mcore.cognition.annotation.ledger import Ledger
from sicog_mcore.cognition.annotation.llava_cot import REFUSED_FILE, Converted, convert
from sicog_mcore.cognition.item_keys import KeyCounter
from sicog_mcore.cognition.prompts import load_annotator_prompt
from sicog_mcore.commands.verb import Verb, VerbCall, VerbFamily
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
from sicog_mcore.flags import flag
from sicog_mcore.lock import owned

INTERRUPTED = "interrupted"
LIMITS = AnnotationLimits()


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


@dataclass(frozen=True, kw_only=True)
class DescribeOptions:
    """Options that ``annotate cod`` takes.

    Attributes:
        endpoint: base address, such as https://api.openai.com/v1.
        model: name that the endpoint knows.
        key_file: file that holds the key; <(printf %s "$KEY") takes it from a variable.
        price_prompt: USD per million prompt tokens.
        price_completion: USD per million tokens of answers.
        max_cost: USD that all runs with this --out may spend together.
        dry_run: print the estimate and stop.
        retry_failed: ask again about items that failed.
        concurrency: calls at the same time.
        calls: tries while the endpoint fails.
        answers: tries at a usable answer.
        first_wait_s: first back-off; it doubles.
        timeout_s: seconds for a call.
        temperature: of the sampling.
        max_tokens: longest answer.
        max_side_px: larger images are sent smaller.
        image_tokens: most that an image counts for.
        prefill: for endpoints that refuse a started answer.
        rows: rows, .json or .jsonl.
        images: folder that their image paths are relative to.
        out: folder.
        take: number of rows to draw; all without it.
        seed: decides which rows are drawn.
    """

    endpoint: str = flag(metavar="URL")
    model: str
    key_file: Path | None = flag(None, metavar="PATH")
    price_prompt: Decimal = flag(Decimal(0), parse=usd)
    price_completion: Decimal = flag(Decimal(0), parse=usd)
    max_cost: Decimal | None = flag(None, parse=usd)
    dry_run: bool = False
    retry_failed: bool = False
    concurrency: int = flag(LIMITS.concurrency, parse=positive)
    calls: int = flag(LIMITS.calls, parse=positive)
    answers: int = flag(LIMITS.answers, parse=positive)
    first_wait_s: float = flag(LIMITS.first_wait_s, parse=seconds)
    timeout_s: float = flag(180.0, parse=seconds)
    temperature: float = 0.2
    max_tokens: int = flag(2048, parse=positive)
    max_side_px: int = flag(LIMITS.max_side_px, parse=positive)
    image_tokens: int = flag(LIMITS.image_tokens, parse=positive)
    prefill: bool = True
    rows: Path
    images: Path
    out: Path
    take: int | None = flag(None, parse=positive)
    seed: int = 42

    def mistake(self) -> str:
        """Returns what is wrong with several options together, empty if nothing is."""
        if self.max_cost is None or self.price_prompt or self.price_completion:
            return ""
        return "--max-cost needs --price-prompt and --price-completion: without prices every call is free"

    def limits(self) -> AnnotationLimits:
        """Returns how hard to try, and when to stop."""
        return AnnotationLimits(
            concurrency=self.concurrency,
            calls=self.calls,
            answers=self.answers,
            first_wait_s=self.first_wait_s,
            max_cost=self.max_cost,
            max_side_px=self.max_side_px,
            image_tokens=self.image_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class ReasonOptions:
    """Options that ``annotate cot`` takes.

    Attributes:
        rows: rows, .json or .jsonl.
        images: folder that their image paths are relative to.
        out: folder.
        take: number of rows to draw; all without it.
        seed: decides which rows are drawn.
    """

    rows: Path
    images: Path
    out: Path
    take: int | None = flag(None, parse=positive)
    seed: int = 42


@dataclass(frozen=True)
class DescriptionRun:
    """Requests that a run has made, their results, and their cost.

    Attributes:
        outcomes: items by outcome (answer, failed, unusable, open) and reason.
        calls: all calls with this ledger, by outcome.
        prompt_tokens, completion_tokens: of all calls with this ledger.
        cost: USD, of all calls whose price is known.
        unknown: calls whose price is not known.
        at_most: USD that these can have cost.
        halted_by: why the run ended early; empty if it did not.
    """

    outcomes: Mapping[str, Counter[str]]
    calls: Mapping[str, int]
    prompt_tokens: int
    completion_tokens: int
    cost: Decimal
    unknown: int
    at_most: Decimal
    halted_by: str


def describe(
    options: DescribeOptions, say: Callable[[str], None], progress: Callable[[int, int], None]
) -> DescriptionRun | Estimate:
    """Asks the endpoint for a description of every open item; with ``dry_run`` only estimates what that costs.

    Args:
        say: is told what should be known of the rows before anything is asked.
        progress: is told how many items are settled in this run, and how many there are.

    Raises:
        SicogError: a file, the key or the ledger cannot be used.
    """
    key = read_key(options.key_file)
    prompt = load_annotator_prompt()
    decoding = Decoding(options.model, options.temperature, options.max_tokens)
    limits = options.limits()
    prices = Prices(options.price_prompt, options.price_completion)
    counter = KeyCounter()
    samples = open_rows(options.rows, options.images, counter.watch(build_captioned, CAPTIONED_KEYS))
    items, refused = survey(samples, options.images, options.take, options.seed)
    for line in counter.lines():
        say(line)
    settings = {
        "model": decoding.model,
        "temperature": decoding.temperature,
        "max_tokens": decoding.max_tokens,
        "prompt": prompt.version,
        "prefill": options.prefill,
        "max_side_px": limits.max_side_px,
    }
    path = options.out / LEDGER_FILE

    def settled(number: int) -> None:
        progress(number, len(items))

    annotator = Annotator(samples, decoding, prompt, options.prefill, prices, limits, settled)
    if options.dry_run and not path.exists():
        return annotator.estimate(items, None)
    with Ledger(path, settings) as ledger:
        todo = open_items(items, ledger, options.retry_failed)
        if options.dry_run:
            return annotator.estimate(todo, ledger)
        endpoint = Endpoint(options.endpoint, key, decoding, options.timeout_s, limits.concurrency)
        asyncio.run(ask_all(annotator, todo, endpoint, ledger))
        refused += annotator.refused
        outcomes = write_answers(samples, items, refused, ledger, options.images, options.out)
        totals = ledger.totals
        return DescriptionRun(
            outcomes=outcomes,
            calls=dict(totals.calls),
            prompt_tokens=totals.prompt_tokens,
            completion_tokens=totals.completion_tokens,
            cost=totals.cost,
            unknown=totals.unpriced + ledger.cut_off(),
            at_most=ledger.committed - totals.cost,
            halted_by=annotator.halted_by,
        )


async def ask_all(annotator: Annotator, items: Sequence[AnnotationItem], endpoint: Endpoint, ledger: Ledger) -> None:
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


def reason(options: ReasonOptions) -> Converted:
    """Turns rows of LLaVA-CoT into rows in steps and without, and returns what came of them.

    Raises:
        ConfigError: the file cannot be read, or has too few rows.
    """
    return convert(options.rows, options.images, options.out, options.take, options.seed)


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


# ---- what is printed


def main_describe(options: DescribeOptions, call: VerbCall) -> int:
    """Runs ``annotate cod``; returns the exit code."""

    def work() -> int:
        found = describe(options, say, show_progress)
        if isinstance(found, Estimate):
            print(estimated(found))
            return EXIT_OK
        end_progress()
        print(printable(summary(options.out, found)))
        return ended(found.halted_by, found.outcomes)

    if options.dry_run:
        return guarded(work)
    return guarded(lambda: owning(options.out, call, work))


def main_reason(options: ReasonOptions, call: VerbCall) -> int:
    """Runs ``annotate cot``; returns the exit code."""

    def work() -> int:
        result = reason(options)
        for line in result.notes:
            say(line)
        long, short = result.written["cot"], result.written["direct"]
        counts = f"{long} rows each in cot.jsonl and direct.jsonl"
        if long != short:
            counts = f"{long} rows in cot.jsonl, {short} in direct.jsonl"
        refused = listed("; refused", result.refused) + listed("; refused in cot.jsonl alone", result.only_direct)
        print(printable(f"{options.out}: {counts}{refused}"))
        if not short:
            say(f"no row can be used; {options.out / REFUSED_FILE} says why of each")
            return EXIT_GIVE_UP
        return EXIT_OK

    return guarded(lambda: owning(options.out, call, work))


def guarded(work: Callable[[], int]) -> int:
    """Does the work; says in one message why it failed. Returns the exit code."""
    try:
        return work()
    except (SicogError, OSError) as error:
        say(str(error))
        return exit_code(error)


def owning(out: Path, call: VerbCall, work: Callable[[], int]) -> int:
    """Does the work while no other run may write into the folder."""
    with owned(out, call.command, lambda line: print(printable(line), file=sys.stderr)):
        return work()


def say(text: str) -> None:
    """Says something on standard error."""
    print(printable(f"annotate: {text}"), file=sys.stderr)


def show_progress(settled: int, total: int) -> None:
    """Counts on a terminal, and is silent elsewhere."""
    if sys.stderr.isatty():
        print(f"\r{settled} settled in this run, {total} items in all ", end="", file=sys.stderr, flush=True)


def end_progress() -> None:
    """Leaves the line of the counts."""
    if sys.stderr.isatty():
        print(file=sys.stderr)


def estimated(expected: Estimate) -> str:
    """Says what a run would cost."""
    basis = f"as {expected.measured} answers in the ledger" if expected.measured else "assumed, nothing measured yet"
    tokens = f"{expected.prompt_tokens:,} + {expected.completion_tokens:,} tokens ({basis})"
    bound = f"at most {expected.at_most:.4f} USD if no answer is refused"
    return f"{expected.items} items to ask: {tokens}, {expected.cost:.4f} USD; {bound}"


def summary(out: Path, found: DescriptionRun) -> str:
    """Says items, calls, tokens and money, in one line."""
    none: Counter[str] = Counter()
    outcomes = found.outcomes
    rows = f"{out}: {outcomes.get('answer', none).total()} rows each in cod.jsonl and caption.jsonl"
    rows += listed("; failed", outcomes.get("failed", none))
    rows += " (asked again with --retry-failed)" if "failed" in outcomes and "answer" in outcomes else ""
    rows += listed("; unusable", outcomes.get("unusable", none))
    rows += f"; open: {outcomes['open'].total()}" if "open" in outcomes else ""
    calls = ", ".join(f"{number} x {outcome}" for outcome, number in sorted(found.calls.items()))
    money = f"{found.prompt_tokens:,} + {found.completion_tokens:,} tokens, {found.cost:.6f} USD"
    doubt = f"; {found.unknown} calls of unknown price, at most {found.at_most:.6f} USD" if found.unknown else ""
    return f"{rows}; calls: {calls or 'none'}; {money}{doubt}"


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


def listed(name: str, counts: Counter[str]) -> str:
    """Counts by reason, most frequent first; nothing if there are none."""
    return f"{name}: {', '.join(f'{number} x {reason}' for reason, number in counts.most_common())}" if counts else ""


VERB = VerbFamily(
    (__doc__ or "").splitlines()[0],
    {
        "cod": Verb("descriptions in five steps, by an OpenAI-compatible endpoint", DescribeOptions, main_describe),
        "cot": Verb("rows of LLaVA-CoT-100k, without a model", ReasonOptions, main_reason),
    },
)
