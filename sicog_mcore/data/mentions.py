"""Finds texts that show a picture, a film or sound which their row does not give: these teach to answer without seeing.

In: texts of turns   Out: the tag that stands for what is not there   Next: rows.py
Other programs write other tags than ``<image>``. Text about such tags (HTML, Markdown, questions on either) is ordinary
text, and more frequent than lost pictures; so a tag counts only where it stands for a picture and is not talked about.
"""

from __future__ import annotations

import re
from itertools import islice

SCANNED_CHARS = (
    100_000  # at the start of a text and at its end; longer ones fit no budget, and patterns take their time
)

MAX_TAGS = 1000  # that are judged in one text
MAX_TAG_CHARS = 80
MAX_BLANKS = 20
QUOTES = "`'\""
BLANK_BEFORE = re.compile(r"(?:\A|\n)[ \t\r]*\Z")
BLANK_AFTER = re.compile(r"[ \t\r]*(?:\n|\Z)")
BRACKETED_WORD = re.compile(r"\[[a-z]+\]")

# Tokens of models: nobody writes them into a text but programs that put a picture there.
TOKENS = re.compile(
    r"<\|(?:image|img|video|vid|audio|vision|speech)[a-z0-9_]*\|>"
    r"|<(?:IMG_CONTEXT|ImageHere|ImageContent|im_patch|image_(?:placeholder|soft_token|pad)|audio_soft_token|video_pad"
    r"|(?:start|end)_of_image|vision_(?:start|end)|(?:img|vid|vi)_(?:start|end)|fake_token_around_image"
    r"|ref-object|bbox)>"
    r"|\[IMG_(?:BREAK|END)\]",
    re.I,
)
# A path between tags that HTML does not close: Qwen-VL's form.
PATHS = re.compile(
    r"<img>[^<>\n]{1,1000}</img>|</image>|<(?:video|audio)>[^<>\n]{1,1000}\.[a-z0-9]{2,4}</(?:video|audio)>", re.I
)
FILMS = re.compile(r"<(?:video|audio|speech|sound)s?(?:[ _-]?\d+)?/?>|\[(?:VIDEO|AUDIO)(?:[ _-]?\d+)?\]", re.I)
# "<image >" and "<image>" are not among them: the one is our own way to say the word, the other is counted in rows.py.
PICTURES = re.compile(
    r"(?!(?-i:<image>))<(?:image|img|picture|photo)s?(?:[ _-]?\d+)?/?>"
    r"|<img\s[^<>]{0,500}\bsrc\s*="
    r"|\[img\][^\[\]\n]{1,500}\[/img\]"
    r"|(?<![\w\])])\[(?:IMG|IMAGE|PICTURE|PHOTO)(?:[ _-]?\d+)?\]"
    r"|!\[[^\]\n]{0,200}\]\([^()\s]{1,1000}\)",
    re.I,
)
MARKUP = re.compile(
    r"</(?!img)[a-z]|```|<(?:!doctype|div|p|a|body|html|head|table|tr|td|ul|li|span|script|style|h[1-6]|br|button"
    r"|section|form|input|source|figure|svg)\b",
    re.I,
)
ABOUT_MARKUP = re.compile(
    r"\b(?:html5?|css|xml|svg|jsx|react|dom|markdown|readme|bbcode|markup|javascript|tags?|elements?|attributes?"
    r"|web ?(?:page|site)s?|code)\b",
    re.I,
)


def lost_tag(text: str, is_answer: bool, has_images: bool) -> str:
    """The first tag of a turn that stands for something the row does not give; empty if there is none.

    Args:
        text: of the turn.
        is_answer: whether it is the assistant's; then only tokens of models count, as answers hold code.
        has_images: whether the row has images; then numbered and Markdown pictures may refer to these.
    """
    for part in _scanned(text):
        # No pattern fits a text without one of these; most texts end here.
        if "<" not in part and "[" not in part:
            continue
        # Tokens of models count anywhere; paths between tags may be what an answer quotes.
        found = TOKENS.search(part) or (None if is_answer else PATHS.search(part))
        if found:
            return found.group()[:MAX_TAG_CHARS]
        # A text with other markup is HTML or code, in which such tags are ordinary.
        if is_answer or MARKUP.search(part):
            continue
        # A tag in a line of its own stands for a picture in any case. Within a line it does so only if the text is not
        # about tags and does not quote it.
        is_about_markup = ABOUT_MARKUP.search(part) is not None
        for tags in (FILMS,) if has_images else (FILMS, PICTURES):
            for found in islice(tags.finditer(part), MAX_TAGS):
                if _stands_alone(part, found) or not (is_about_markup or _is_quoted(part, found)):
                    return found.group()[:MAX_TAG_CHARS]
    return ""


def _scanned(text: str) -> tuple[str, ...]:
    if len(text) <= 2 * SCANNED_CHARS:
        return (text,)
    return text[:SCANNED_CHARS], text[-SCANNED_CHARS:]


def _stands_alone(text: str, tag: re.Match[str]) -> bool:
    """Whether a tag has a line of its own: there it is a placeholder, whatever the text is about."""
    before, after = text[max(0, tag.start() - MAX_BLANKS) : tag.start()], text[tag.end() : tag.end() + MAX_BLANKS]
    return BLANK_BEFORE.search(before) is not None and BLANK_AFTER.match(after) is not None


def _is_quoted(text: str, tag: re.Match[str]) -> bool:
    """Whether a tag stands in quotation marks, or is "[image]" within a line, which may as well be an index or a list."""
    before, after = text[max(0, tag.start() - 1) : tag.start()], text[tag.end() : tag.end() + 1]
    return (before == after and before in QUOTES and before != "") or BRACKETED_WORD.fullmatch(tag.group()) is not None
