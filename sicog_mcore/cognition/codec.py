"""Writes answers in steps for training, and reads them back from a model's text.

In: texts of the steps   Out: one text, and back; None with a problem where it cannot be read
Next: annotator.py, agreement.py
Reading is tolerant in form (markup, blank lines, titles) and strict in content: each step once, in order, with text.
Problems: no_steps, step_unknown, step_doubled, step_missing, step_order, step_empty, think_not_closed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sicog_mcore.cognition.answer_grammar import spoken
from sicog_mcore.cognition.prompts import Style
from sicog_mcore.cognition.records import Task
from sicog_mcore.errors import SampleError

StepForm = Literal["cod", "cot"]

COD_STEPS = ("Main content", "Details", "Relations", "Surroundings", "Full description")
COT_STEPS = ("Task", "Visual facts", "Reasoning", "Answer")
TITLES: Mapping[StepForm, tuple[str, ...]] = {"cod": COD_STEPS, "cot": COT_STEPS}
KINDS: Mapping[Task, StepForm] = {"caption": "cod", "answer": "cot"}
TAGS = ("SUMMARY", "CAPTION", "REASONING", "CONCLUSION")  # LLaVA-CoT's, one for each of COT_STEPS

# "Step 2" at the start of a line, maybe behind a bullet, a heading or an opening mark, and maybe marked itself. It must be
# followed by the end of the line or by a separator: "Step 2 of the stairs" and "step 2.5" are prose.
HEADER = re.compile(
    r"^[ \t]*(?:[-+*>][ \t]+)*(?P<heading>\#{1,6}[ \t]*)?(?P<mark>[*_]{0,3})[ \t]*"
    r"step[ \t]*(?P<number>[0-9]{1,2})"
    r"[ \t]*(?P<closed>[*_]{0,3})[ \t]*(?:$|[:)–—]|\.(?![0-9])|-(?!\w))"
    r"(?P<rest>.*)$",
    re.IGNORECASE | re.MULTILINE,
)
OWN_NUMBER = re.compile(r"step[ \t]*[0-9]{1,2}", re.IGNORECASE)
BEHIND_TITLE = re.compile(r"[ \t]*[*_]{0,3}[ \t]*(?:[:.–—]|-(?!\w))?[ \t]*")
RULE_AT_END = re.compile(r"(?:^|\n)[ \t]*(?:-{3,}|\*{3,}|_{3,})$")
MARKS = " \t*_"  # white space and what makes text bold or italic
TAG = re.compile(rf"<(/?)({'|'.join(TAGS)})>")
ANY_CASE_TAG = re.compile(TAG.pattern, re.IGNORECASE)


@dataclass(frozen=True)
class Parsed:
    """An answer read back.

    Attributes:
        steps: text of every step, or None.
        problem: why there are none; empty otherwise.
    """

    steps: tuple[str, ...] | None
    problem: str = ""


def header(kind: StepForm, step: int) -> str:
    """The line above a step; steps count from 1."""
    return f"Step {step}: {TITLES[kind][step - 1]}"


def render(steps: Sequence[str], kind: StepForm) -> str:
    """The answer as it is trained on. ``parse`` gives the steps back, less white space around them.

    Raises:
        SampleError: step_count; step_empty; step_ambiguous (a text holds what reads like a header or a thought).
    """
    texts = tuple(_clean(step) for step in steps)
    if len(texts) != len(TITLES[kind]):
        raise SampleError("step_count", f"found {len(texts)} steps, expected {len(TITLES[kind])}")
    if not all(texts):
        raise SampleError("step_empty", f"step {texts.index('') + 1} has no text")
    text = "\n\n".join(f"{header(kind, number)}\n{step}" for number, step in enumerate(texts, 1))
    # Read back at once: a step with a line like a header would be learnt as two steps.
    if parse(text, kind).steps != texts:
        raise SampleError(
            "step_ambiguous", "a step has a line that reads like the header of a step, or a tag of thoughts; reword it"
        )
    return text


def quote_headers(text: str) -> str:
    """The text of a step with "Step 1: ..." lines of its own written as "(Step 1): ...", which ``parse`` takes for text.

    Nothing but these brackets is added, so that what the text says, and refers to, stays as it was; what ``render`` takes
    away around a text goes first, for a line may become a header by it.
    """
    text = _clean(text)
    # From the end, so that the places of the earlier matches still fit.
    for match in reversed(list(HEADER.finditer(text))):
        # Only "Step 1" goes into brackets; marks and bullets in front of it stay.
        start, end = OWN_NUMBER.search(text, match.start(), match.end("number")).span()  # type: ignore[union-attr]
        text = f"{text[:start]}({text[start:end]}){text[end:]}"
    return text


def parse(text: str, kind: StepForm) -> Parsed:
    """Reads an answer in steps. What is thought aloud (<think>) or stands before the first header is no part of any step."""
    said = spoken(text)
    if said is None:
        return Parsed(None, "think_not_closed")
    text = _unix(said)
    headers = list(HEADER.finditer(text))
    numbers = [int(match["number"]) for match in headers]
    if problem := _order_problem(numbers, len(TITLES[kind])):
        return Parsed(None, problem)
    ends = [match.start() for match in headers[1:]] + [len(text)]
    steps = tuple(
        _body(match, text[match.end() : end], title)
        for match, end, title in zip(headers, ends, TITLES[kind], strict=True)
    )
    return Parsed(steps) if all(steps) else Parsed(None, "step_empty")


def final_clause(text: str, prompt_style: Style, task: Task) -> str | None:
    """The part of an answer that is compared: of steps the last one, otherwise all of it; None where there is none.

    What a model thinks aloud before is no part of it; where a thought does not end, there is none.
    """
    if prompt_style == "plain":
        return (spoken(text) or "").strip() or None
    steps = parse(text, KINDS[task]).steps
    return steps[-1] if steps else None


def from_tags(text: str) -> tuple[str, ...]:
    """The steps of an answer in LLaVA-CoT's form. Tags in small letters count where there is none in capitals.

    Raises:
        SampleError: missing_tag, duplicate_tag, misordered_tag, empty_tag, text_outside_tags.
    """
    found = list(TAG.finditer(text)) or list(ANY_CASE_TAG.finditer(text))
    names = [match[0].upper() for match in found]
    counts = Counter(names)
    expected = [tag for name in TAGS for tag in (f"<{name}>", f"</{name}>")]
    for tag in expected:
        if not counts[tag]:
            raise SampleError("missing_tag", f"found no {tag} in {text!r:.80}")
        if counts[tag] > 1:
            raise SampleError("duplicate_tag", f"found {counts[tag]} x {tag}, expected one")
    if names != expected:
        raise SampleError("misordered_tag", f"found {' '.join(names)}, expected {' '.join(expected)}")
    # Text alternates: outside, inside, outside, ... Pieces with an even number stand outside of all tags.
    borders = [0, *(border for match in found for border in match.span()), len(text)]
    pieces = [text[start:end].strip() for start, end in zip(borders[::2], borders[1::2], strict=True)]
    outside, inside = pieces[::2], pieces[1::2]
    if any(outside):
        raise SampleError("text_outside_tags", f"found {next(filter(None, outside))!r:.80} between the tags")
    if not all(inside):
        raise SampleError("empty_tag", f"<{TAGS[inside.index('')]}> has no text")
    return tuple(inside)


def has_tags(text: str) -> bool:
    """Whether an answer holds a tag of LLaVA-CoT's form, whole or not."""
    return ANY_CASE_TAG.search(text) is not None


def to_tags(steps: Sequence[str]) -> str:
    """The steps in LLaVA-CoT's form. ``from_tags`` gives them back, less white space around them.

    Raises:
        SampleError: as ``from_tags``; step_count.
    """
    if len(steps) != len(TAGS):
        raise SampleError("step_count", f"found {len(steps)} steps, expected {len(TAGS)}")
    text = "\n\n".join(f"<{tag}> {step.strip()} </{tag}>" for tag, step in zip(TAGS, steps, strict=True))
    from_tags(text)
    return text


def _order_problem(numbers: Sequence[int], count: int) -> str:
    """Names the problem with the numbers of the steps; empty if there is none."""
    expected = list(range(1, count + 1))
    if not numbers:
        return "no_steps"
    if not set(numbers) <= set(expected):
        return "step_unknown"
    if len(set(numbers)) < len(numbers):
        return "step_doubled"
    if len(numbers) < count:
        return "step_missing"
    return "" if list(numbers) == expected else "step_order"


def _body(match: re.Match[str], below: str, title: str) -> str:
    """Text of a step: what stands behind the title in the line of the header, and what stands below it."""
    line = match["rest"].strip()
    mark = "" if match["closed"] else match["mark"]  # still open
    own = line.lstrip(MARKS)
    # Our own title, then what stands behind it in the line, if only marks and a separator lie between.
    if own[: len(title)].casefold() == title.casefold():
        after = own[len(title) :]
        text = BEHIND_TITLE.sub("", after, count=1)
        if not text or after[: -len(text)].strip():
            return _clean(text.removeprefix(mark) + below)
    if mark and mark in line:  # a title of the writer's own, up to the closing mark
        return _clean(BEHIND_TITLE.sub("", line.partition(mark)[2], count=1) + below) or _clean(line.strip(MARKS))
    if match["heading"]:  # the whole line is a title, unless nothing else is there
        return _clean(below) or _clean(line.strip(MARKS))
    return _clean(line + below)


def _clean(text: str) -> str:
    """Without white space around it, and without the horizontal rule that some models draw below each step."""
    text = _unix(text).strip()
    while match := RULE_AT_END.search(text):
        text = text[: match.start()].strip()
    return text


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")
