"""Brings text into one spelling: full-width forms, brackets, dashes, LaTeX, emphasis. Pure functions of text.

In: text of a model or a data set   Out: its plain form   Next: answer_grammar.py (reads it)
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

CJK = "\u3005-\u30ff\u3400-\u9fff\uac00-\ud7af"  # scripts without spaces between words, so no part of a Latin word
DASHES = str.maketrans({"\u2212": "-", "\u2010": "-", "\u2011": "-", "\u2012": "-", "\u2013": "-", "\u2044": "/"})
PUNCTUATION = str.maketrans("。、【】〔〕「」『』《》’‘“”", '.,[][]""""""\'\'""')
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
NAMES = r"text|textbf|textit|textrm|textsf|mathrm|mathbf|mathit|mathsf|mathbb|boldsymbol|bm|mbox|operatorname|emph"
LATEX: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (rf"\\(?:{NAMES})\s?\{{([^{{}}]*)\}}", r"\1"),
        (r"(?<=\d)\s?\\[dt]?frac\s?\{([^{}]*)\}\s?\{([^{}]*)\}", r" \1/\2"),
        (r"\\[dt]?frac\s?\{([^{}]*)\}\s?\{([^{}]*)\}", r"\1/\2"),
        (r"\\[dt]?frac\s?(\d)\s?(\d)", r"\1/\2"),
        (r"\{,\}", ","),
        (r"\^\s?\{([^{}]*)\}", r"^\1"),
        (r"\^?\\circ(?![a-zA-Z])", "°"),
        (r"\\(?:times|cdot)(?![a-zA-Z])", "×"),
        (r"\\(?:left|right|rm|bf|displaystyle)(?![a-zA-Z])|\\[!()\[\]]", ""),
        (r"\\(?:quad|qquad)(?![a-zA-Z])|\\[,;: ]", " "),
        (r"\\([%$#&])", r"\1"),
    )
)

INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")  # zero-width spaces, marks of direction, soft hyphens
WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}  # to ASCII

UNDER_TWENTY = (
    "zero one two three four five six seven eight nine ten"
    " eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
NUMBER_WORDS: Mapping[str, int] = {word: value for value, word in enumerate(UNDER_TWENTY.split())} | {
    word: 10 * value for value, word in enumerate(TENS.split(), 2)
}
SCALES: Mapping[str, float] = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
CJK_SCALES: Mapping[str, float] = {"十": 10, "百": 1e2, "千": 1e3, "万": 1e4, "萬": 1e4, "亿": 1e8, "億": 1e8}
CJK_DIGITS: Mapping[str, int] = {c: v for v, c in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2, "兩": 2}


def narrow(text: str) -> str:
    """Full-width letters, digits and marks as the ASCII ones that they look like."""
    return text.translate(WIDE)


def plain(text: str) -> str:
    """One spelling of width, brackets, dashes, LaTeX and emphasis; one space between words; no empty lines."""
    text = INVISIBLE.sub("", text)
    # Before NFKC, which would write raised digits as plain ones: 10² would read 102, and 3½ would read 31/2.
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda match: "^" + match[0].translate(RAISED), text)
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text)
    text = unicodedata.normalize("NFKC", text).translate(DASHES).translate(PUNCTUATION)
    for pattern, replacement in LATEX:
        text = pattern.sub(replacement, text)
    # A star between digits multiplies; all others are emphasis.
    text = re.sub(r"(?<=\d)\s?\*\s?(?=\d)", "×", text)
    text = re.sub(r"[*`]+|(?<![^\W_])_+|_+(?![^\W_])", "", text)
    return "\n".join(line for line in (" ".join(line.split()) for line in text.splitlines()) if line)


def spelled_number(words: str) -> float:
    """Number words: "two thousand one hundred and five"."""
    total = part = 0.0
    for word in re.findall(r"[a-z]+", words.lower()):
        # "hundred" multiplies the part so far; larger words multiply it and close it.
        if word == "hundred":
            part = (part or 1) * 100
        elif word in SCALES:
            total, part = total + (part or 1) * SCALES[word], 0
        elif word != "and":
            part += 1 if word == "a" else NUMBER_WORDS[word]
    return total + part


def cjk_number(numeral: str) -> float | None:
    """Chinese numerals: "一百零五", "二点五", "百分之十", or digit by digit, "二零二四"; None for a share of nothing."""
    text, _, decimals = numeral.removeprefix("百分之").partition("点")
    if not text:
        return None
    if not set(text) & CJK_SCALES.keys():
        value = float("".join(str(CJK_DIGITS[c]) for c in text))
    else:
        total = part = digit = 0.0
        for c in text:
            if c in CJK_DIGITS:
                digit = CJK_DIGITS[c]
            # Ten, hundred and thousand multiply the digit before them; 万 and 亿 multiply all that was said before.
            elif CJK_SCALES[c] < 1e4:
                part, digit = part + (digit or 1) * CJK_SCALES[c], 0
            else:
                total, part, digit = (total + part + digit or 1) * CJK_SCALES[c], 0, 0
        value = total + part + digit
    value += float("0." + "".join(str(CJK_DIGITS[c]) for c in decimals)) if decimals else 0
    return value / 100 if numeral.startswith("百分之") else value
