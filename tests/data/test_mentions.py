"""A text that shows a picture which the row does not give is told from one that talks about pictures, HTML or code."""

from __future__ import annotations

import time

import pytest

from sicog_mcore.data.mentions import SCANNED_CHARS, lost_tag
from sicog_mcore.data.rows import build_sample
from sicog_mcore.data.sample import ImageRef, Sample
from sicog_mcore.errors import SampleError

LIMIT_S = 5.0  # of processor time, for 16 MB

PLACEHOLDERS = (  # text of the user, and what stands for a picture in it
    ("<|vision_start|><|image_pad|><|vision_end|>What?", "<|vision_start|>"),
    ("<|image_1|>\nWhat?", "<|image_1|>"),
    ("What? <|video_pad|>", "<|video_pad|>"),
    ("<|AUDIO|>What is said?", "<|AUDIO|>"),
    ("<IMG_CONTEXT>What?", "<IMG_CONTEXT>"),
    ("<ImageHere>What?", "<ImageHere>"),
    ("<start_of_image>What?", "<start_of_image>"),
    ("Where is <ref-object>?", "<ref-object>"),
    ("[IMG_BREAK]", "[IMG_BREAK]"),
    ("Picture 1: <img>a/b.jpg</img>\nWhat?", "<img>a/b.jpg</img>"),
    ("<video>a.mp4</video> What?", "<video>a.mp4</video>"),
    ("<video>\nWhat happens?", "<video>"),
    ("What happens?\n<video>", "<video>"),
    ("<video>\nWrite HTML for this page.", "<video>"),
    ("<video1><video2>Which is longer?", "<video1>"),
    ("What is said in <audio>?", "<audio>"),
    ("[VIDEO]What happens?", "[VIDEO]"),
)
PICTURES = (  # the same; in a row with images they may refer to these
    ("<image1>What?", "<image1>"),
    ("What is in <image 1>?", "<image 1>"),
    ("<image_2>\nWhat?", "<image_2>"),
    ("<Image>\nWhat?", "<Image>"),
    ("<img>\nWhat?", "<img>"),
    ("<picture/>What?", "<picture/>"),
    ("[IMG]What?", "[IMG]"),
    ("[IMG0] and [IMG1]", "[IMG0]"),
    ("[image]\nWhat?", "[image]"),
    ("See [img]http://h/1.png[/img]", "[img]http://h/1.png[/img]"),
    ('<img src="a.png">What?', "<img src="),
    ('What is on <img alt="x" src="a.png"/>?', '<img alt="x" src='),
    ("![](x.png)\nWhat?", "![](x.png)"),
    ("What is shown: ![a chart](http://h/x.png)", "![a chart](http://h/x.png)"),
)
ORDINARY = (
    "What does the <img> tag do?",
    "Explain the HTML element <video>.",
    "How do I use <video> and <audio> in HTML5?",
    "Why is `<video>` not shown?",
    'Is "<image1>" a good name?',
    '<div><img src="a.png"></div> is not centred',
    'My code:\n<img src="a.png">\nWhy is it not shown on my web page?',
    "```html\n<video>\n</video>\n```\nWhat is wrong?",
    "<video>\n  <source src='a.mp4'>\n</video>",
    "Write a README in Markdown with ![logo](logo.png)",
    "np.stack([image])[image] + df[image]",
    "Sort the list [image] by size",
    "Is a < b and c > d?",
    "What is a <image > here?",
    "List[IMG]",
    "x ![1] y",
)
ANSWERS = ("Use <img src='a.png'> or ![](x.png).", "<video>\n", "<image1> shows", "[IMG]", "<img>a.png</img>")


@pytest.mark.parametrize(("text", "tag"), PLACEHOLDERS)
def test_placeholder_of_another_program_is_found_with_and_without_images(text: str, tag: str) -> None:
    assert lost_tag(text, False, has_images=False) == lost_tag(text, False, has_images=True) == tag


@pytest.mark.parametrize(("text", "tag"), PICTURES)
def test_picture_that_is_not_given_is_found(text: str, tag: str) -> None:
    assert lost_tag(text, False, has_images=False) == tag
    assert lost_tag(text, False, has_images=True) == ""


@pytest.mark.parametrize("text", ORDINARY)
def test_talk_of_markup_is_ordinary_text(text: str) -> None:
    assert lost_tag(text, False, has_images=False) == ""


@pytest.mark.parametrize("text", ANSWERS)
def test_answers_may_hold_code(text: str) -> None:
    assert lost_tag(text, True, has_images=False) == ""
    assert lost_tag(f"{text} <|image_pad|>", True, has_images=True) == "<|image_pad|>"


def _build(question: str, images: int = 0, system: str = "") -> Sample:
    turns = [{"from": "human", "value": "<image>" * images + question}, {"from": "gpt", "value": "a"}]
    row = {"conversations": turns, "system": system}
    return build_sample(row, [ImageRef("/a.png")] * images, "r-0", "r.jsonl:1")


def test_row_is_refused_with_the_tag_named() -> None:
    for arguments, turn in ((("<video>\nWhat?", 0), 0), (("<video>\nWhat?", 1), 0), (("What?", 0, "<video>\nhelp"), 0)):
        with pytest.raises(
            SampleError, match=rf"media_missing: turn {turn} shows '<video>', which the row does not give"
        ):
            _build(*arguments)
    assert _build("In <image 1>, what?", 1).images


@pytest.mark.parametrize("unit", ["![", "<img ", "[img]", "a <video> html ", "<", " \t", "<image 1", "`<img>"])
def test_texts_of_any_kind_cost_little(unit: str) -> None:
    text = unit * (2**24 // len(unit))
    started = time.process_time()
    lost_tag(text, False, has_images=False)
    assert time.process_time() - started < LIMIT_S


def test_both_ends_of_a_long_text_are_read() -> None:
    filler = "word " * SCANNED_CHARS
    assert lost_tag(f"{filler}\n<video>", False, has_images=False) == "<video>"
    assert lost_tag(f"<video>\n{filler}", False, has_images=False) == "<video>"
