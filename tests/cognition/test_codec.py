"""Our own text in steps is read back exactly; text of models is read tolerantly, or fails with a defined problem."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sicog_mcore.cognition.codec import (
    COD_STEPS,
    COT_STEPS,
    TITLES,
    Parsed,
    StepForm,
    final_clause,
    from_tags,
    parse,
    quote_headers,
    render,
    to_tags,
)
from sicog_mcore.errors import SampleError

FIVE = ("A street.", "Two red cars.", "One behind the other.", "A dog far left.", "Two red cars stand in a street.")
FOUR = ("Count the cars.", "Two cars.", "One and one.", "2")
KINDS: tuple[StepForm, ...] = ("cod", "cot")

# Pieces that look like what the codec itself writes and reads, between ordinary text.
PIECES = st.sampled_from(
    ["Step ", "step 2", "1", "5", ":", ".", "-", "**", "#", "_", " ", "\n", "\r", "\n\n", "---", "\u2028", "a", "Red."]
    + [*COD_STEPS, *COT_STEPS, "<SUMMARY>", "</CAPTION>", "<", "<think>", "</think>"]
)
TEXTS = st.lists(PIECES | st.text(max_size=5), max_size=8).map("".join)


def written(titles: tuple[str, ...], steps: tuple[str, ...], form: str) -> str:
    """Steps in one of the forms that models use: {n}, {title} and {text} are filled in."""
    return "".join(
        form.format(n=n, title=title, text=text) for n, (title, text) in enumerate(zip(titles, steps, strict=True), 1)
    )


def test_the_written_form_is_plain() -> None:
    assert render(FOUR, "cot") == (
        "Step 1: Task\nCount the cars.\n\nStep 2: Visual facts\nTwo cars.\n\n"
        "Step 3: Reasoning\nOne and one.\n\nStep 4: Answer\n2"
    )


@settings(max_examples=300, deadline=None)
@given(st.lists(TEXTS, min_size=4, max_size=5))
def test_rendered_steps_come_back_or_are_refused(steps: list[str]) -> None:
    kind: StepForm = "cod" if len(steps) == 5 else "cot"
    try:
        text = render(steps, kind)
    except SampleError as error:
        assert error.reason in ("step_empty", "step_ambiguous")
        return
    found = parse(text, kind)
    assert found.steps is not None and render(found.steps, kind) == text
    for step, given_text in zip(found.steps, steps, strict=True):
        assert step in given_text.replace("\r\n", "\n").replace("\r", "\n")


@settings(max_examples=300, deadline=None)
@given(st.lists(TEXTS, min_size=4, max_size=5))
def test_quoted_steps_always_come_back(steps: list[str]) -> None:
    kind: StepForm = "cod" if len(steps) == 5 else "cot"
    quoted = [quote_headers(step) for step in steps]
    assert [quote_headers(step) for step in quoted] == quoted
    try:
        text = render(quoted, kind)
    except SampleError as error:
        is_thought = any("think" in step for step in quoted)  # its tags have no quoted form
        assert error.reason == "step_empty" or (error.reason == "step_ambiguous" and is_thought)
        return
    found = parse(text, kind).steps
    assert found is not None and all(step in given_text for step, given_text in zip(found, quoted, strict=True))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1), min_size=5, max_size=5))
def test_text_without_white_space_is_never_refused(steps: list[str]) -> None:
    steps = [f"x{step}" for step in steps]
    assert parse(render(steps, "cod"), "cod").steps == tuple(steps)


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.sampled_from(KINDS))
def test_any_text_has_a_defined_result(text: str, kind: StepForm) -> None:
    found = parse(text, kind)
    assert (found.steps is None) == (found.problem != "")
    assert found.steps is None or (len(found.steps) == len(TITLES[kind]) and all(found.steps))


@pytest.mark.parametrize(
    "form",
    [
        "Step {n}: {title}\n{text}\n\n",
        "Step {n}: {title}\n{text}\n",
        "Step {n}: {title}\n\n{text}\n\n",
        "**Step {n}**: {title}\n{text}\n\n",
        "**Step {n}: {title}**\n{text}\n\n",
        "**Step {n}:** {title}\n{text}\n\n",
        "**Step {n}: {title}:** {text}\n",
        "**Step {n}: {title}** - {text}\n",
        "**Step {n}: {title}** {text}\n",
        "### Step {n}\n{text}\n\n",
        "### Step {n}: {title}\n{text}\n",
        "## **Step {n} - {title}**\n\n{text}\n---\n\n",
        "- __Step {n}__ – {title}\n  {text}\n",
        "STEP {n}. {title}: {text}\n",
        "step {n}:{text}\n",
        "Step {n}\n{text}\n",
        "> Step {n}) {text}\n",
        "**Step {n}: words of the writer's own**\n{text}\n\n",
        "**Step {n}: words of the writer's own**: {text}\n\n",
        "### Step {n}: words of the writer's own\n{text}\n\n",
        "Step {n}: {title}\r\n{text}\r\n\r\n",
    ],
)
def test_usual_forms_are_read(form: str) -> None:
    assert parse(written(COD_STEPS, FIVE, form), "cod") == Parsed(FIVE)
    assert parse("Certainly!\n\n" + written(COT_STEPS, FOUR, form), "cot") == Parsed(FOUR)
    negative = (*FOUR[:3], "-5")
    assert parse(written(COT_STEPS, negative, form), "cot") == Parsed(negative)


def test_two_paragraphs_after_a_single_newline_are_both_kept() -> None:
    text = render((*FIVE[:4], "First paragraph.\n\nSecond paragraph."), "cod").replace("**", "")
    assert final_clause(text, "steps", "caption") == "First paragraph.\n\nSecond paragraph."


def test_an_answer_behind_an_unmarked_header_is_never_taken_for_a_title() -> None:
    text = written(COT_STEPS, FOUR[:3] + ("42\n\nI am sure.",), "Step {n}: {text}\n")
    assert final_clause(text, "steps", "answer") == "42\n\nI am sure."


@pytest.mark.parametrize(
    "prose",
    ["Step 2 of the stairs is broken.", "She takes a Step 3: further.", "Step by step", "step 2.5 is", "Stepping 1: x"],
)
def test_the_word_step_in_prose_is_no_header(prose: str) -> None:
    steps = (prose, *FIVE[1:4], f"A sign.\n{prose}\nA dog.")
    assert parse(render(steps, "cod"), "cod").steps == steps
    assert parse(prose, "cod").problem == "no_steps"


@pytest.mark.parametrize(
    ("numbers", "problem"),
    [
        ("", "no_steps"),
        ("123", "step_missing"),
        ("1245", "step_missing"),
        ("12344", "step_doubled"),
        ("123345", "step_doubled"),
        ("13245", "step_order"),
        ("123456", "step_unknown"),
        ("01234", "step_unknown"),
    ],
)
def test_each_way_to_fail_has_its_code(numbers: str, problem: str) -> None:
    text = "".join(f"Step {n}: x\ntext\n" for n in numbers)
    assert parse(text, "cod") == Parsed(None, problem)
    assert final_clause(text, "steps", "caption") is None


@pytest.mark.parametrize(
    "last", ["Step 4: Answer", "Step 4: Answer\n", "**Step 4: Answer**\n\n---", "Step 4:", "### Step 4"]
)
def test_a_step_without_text_fails(last: str) -> None:
    assert parse("Step 1: a\nStep 2: b\nStep 3: c\n" + last, "cot") == Parsed(None, "step_empty")


def test_plain_answers_are_compared_whole() -> None:
    assert final_clause(" A Step 5: plain text.\n", "plain", "caption") == "A Step 5: plain text."
    assert final_clause(" \n", "plain", "answer") is None


def test_what_is_thought_aloud_is_no_part_of_an_answer() -> None:
    steps = render(FOUR, "cot")
    assert final_clause(f"<think>Step 1: 3?\nStep 4: 3</think>\n{steps}", "steps", "answer") == "2"
    assert final_clause("<think>3?</think> 2", "plain", "answer") == "2"
    assert final_clause("3? </think>\n2", "plain", "answer") == "2"
    assert final_clause("<think>2", "plain", "answer") is None
    assert final_clause(f"<think>{steps}", "steps", "answer") is None
    assert parse(f"<think>Step 1: 3?</think>{steps}", "cot").steps == FOUR
    assert parse(f"<think>{steps}", "cot") == Parsed(None, "think_not_closed")
    with pytest.raises(SampleError, match="tag of thoughts"):
        render(("a <think>b</think>", *FOUR[1:]), "cot")


@pytest.mark.parametrize(
    ("steps", "reason"),
    [(FIVE[:4], "step_count"), ((*FIVE[:4], " "), "step_empty"), ((*FIVE[:4], "a\nStep 1: b"), "step_ambiguous")],
)
def test_steps_that_could_not_be_read_back_are_not_written(steps: tuple[str, ...], reason: str) -> None:
    with pytest.raises(SampleError) as error:
        render(steps, "cod")
    assert error.value.reason == reason


def test_tags_and_steps_are_the_same_thing() -> None:
    text = (
        "<SUMMARY> Count the cars. </SUMMARY>\n\n<CAPTION>Two cars.</CAPTION><REASONING>\nOne and one.\n</REASONING>\n"
    )
    text += "<CONCLUSION> 2 </CONCLUSION>"
    assert from_tags(text) == FOUR
    assert from_tags(to_tags(FOUR)) == FOUR
    assert parse(render(from_tags(text), "cot"), "cot").steps == FOUR


@settings(max_examples=200, deadline=None)
@given(st.lists(TEXTS, min_size=4, max_size=4))
def test_tagged_steps_come_back_or_are_refused(steps: list[str]) -> None:
    try:
        text = to_tags(steps)
    except SampleError:
        assert any(not step.strip() or "<" in step for step in steps)
        return
    assert from_tags(text) == tuple(step.strip() for step in steps)


TAGGED = to_tags(FOUR)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "missing_tag"),
        (TAGGED.replace("<CAPTION>", ""), "missing_tag"),
        (TAGGED.replace("</CONCLUSION>", ""), "missing_tag"),
        (TAGGED + TAGGED, "duplicate_tag"),
        (TAGGED.replace("Two cars.", "<CAPTION>"), "duplicate_tag"),
        (TAGGED.replace("SUMMARY", "x").replace("CAPTION", "SUMMARY").replace("x", "CAPTION"), "misordered_tag"),
        (TAGGED.replace("</SUMMARY>\n\n<CAPTION>", "<CAPTION></SUMMARY>"), "misordered_tag"),
        (TAGGED.replace("Two cars.", " "), "empty_tag"),
        (TAGGED + "2", "text_outside_tags"),
        (TAGGED.replace("<REASONING>", "so <REASONING>"), "text_outside_tags"),
    ],
)
def test_wrong_tags_are_refused_by_name(text: str, reason: str) -> None:
    with pytest.raises(SampleError) as error:
        from_tags(text)
    assert error.value.reason == reason
