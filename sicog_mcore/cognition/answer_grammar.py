r"""The grammar of answers: rules that read a letter, yes or no, a number or a text out of a model's text.

In: text of a model, never evaluated   Out: Reading: a value and the rule that read it, or the failure that says why not
Used by: answers.py. Nothing is guessed: a text that says two things, or none, is a failure with a name.

What holds the answer, outermost first: what follows a closed thought (<think>); <answer> or <CONCLUSION> ("answer_tag");
JSON ("json"); \boxed ("boxed"); of several the last. Inside it, the first rule that fits:
  letter   whole, cue ("the answer is B", "so B", "故选B"), last_line, verdict ("A: wrong. B: right."), leading_letter
           ("B. a cat"), conclusion (last sentence ends in it), bracketed, only_letter
  yes/no   cue, yes_no_first_word (as MME), yes_no_only_word, yes_no_negation (first sentence, as POPE)
  number   cue (last "answer is", "total", "="), only_number
  text     cue, whole
Failures: think_not_closed, several_answers, no_choice, no_yes_no, no_number.
Where a reader could doubt: "50%" is 0.5, "5M" 5e6, "5m" 5 (metres), "$5m" 5e6, "1 234" 1234, "1.234" 1.234, "1.234,5"
1234.5; "1,5" is no number, because it may be a list.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Generic, NamedTuple, TypeVar

from sicog_mcore.cognition.answer_cues import (
    AFTER_LETTER,
    BOX,
    CHOSEN,
    CONTRAST,
    FILLER,
    FIRST_WORD,
    HEDGED,
    JOINED,
    JSON,
    LEADS_TO_LETTER,
    NAMED_IN_CJK,
    NEARBY,
    NEGATION,
    NO,
    NO_ANSWER,
    NOT_IN_WORD,
    NOUN,
    NUMBER_CUE,
    OPEN,
    PRONOUN_ONE,
    QUANTITY,
    REASON,
    REFUSED,
    REJECTED,
    SENTENCE_END,
    SO,
    STANDING,
    STATED,
    SUFFIXES,
    TAG,
    THOUGHT,
    VERDICT,
    WORDS,
    YES,
)
from sicog_mcore.cognition.spelling import CJK, CJK_SCALES, SCALES, cjk_number, plain, spelled_number

Value = TypeVar("Value")


class Reading(NamedTuple, Generic[Value]):
    """The reading of a text: its value, or the failure to find one.

    Attributes:
        value: None where nothing can be read.
        rule: that read it; empty without a value.
        failure: why there is none; empty otherwise.
    """

    value: Value | None
    rule: str = ""
    failure: str = ""


def spoken(text: str) -> str | None:
    """Takes a model's thoughts out of a text; None if a thought does not end, so that no answer was reached."""
    kept: list[str] = []
    start, thinks = 0, False
    for match in THOUGHT.finditer(text):
        if match["close"]:
            kept = kept if thinks else []  # the template may hold the opening tag
            start, thinks = match.end(), False
        elif not thinks:
            kept.append(text[start : match.start()])
            thinks = True
    return None if thinks else "".join([*kept, text[start:]])


def unwrap(text: str) -> Reading[str]:
    """The innermost wrapper's text and its rule, or all that is spoken, with an empty rule."""
    said = spoken(text)
    if said is None:
        return Reading(None, "", "think_not_closed")
    rule = ""
    # From the outside in: each kind is searched in the content of the one before.
    for name, find in (("answer_tag", _tagged), ("json", _in_json), ("boxed", _boxed)):
        found = find(said)
        if not found:
            continue
        # The last of several counts, for models revise. But two different ones side by side, joined by "and", are one
        # double answer.
        for (_, end, one), (start, _, two) in zip(found, found[1:], strict=False):
            if found[-1][0] == start and JOINED.fullmatch(said, end, start) and plain(one) != plain(two):
                return Reading(None, "", "several_answers")
        said, rule = found[-1][2], name
    return Reading(said.strip(), rule)


def _tagged(text: str) -> list[tuple[int, int, str]]:
    found, start = [], None
    for match in TAG.finditer(text):
        if not (match["close"] or match["end"]):
            start = match
        elif start is not None:
            found.append((start.start(), match.end(), text[start.end() : match.start()]))
            start = None
    if start is not None:  # generation stopped at the closing tag
        found.append((start.start(), len(text), text[start.end() :]))
    return found


def _in_json(text: str) -> list[tuple[int, int, str]]:
    return [(m.start(), m.end(), m[1] or m[2] or m[3] or "") for m in JSON.finditer(text)] if "{" in text else []


def _boxed(text: str) -> list[tuple[int, int, str]]:
    """Boxes with balanced braces; one that does not end is none."""
    # Braces are matched by hand, since a regular expression cannot balance \\boxed{\\frac{1}{2}}.
    opened: list[int] = []
    ends: dict[int, int] = {}
    for match in re.finditer(r"\\[{}]|[{}]", text):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            ends[opened.pop()] = match.start()
    boxes = [(match.start(), match.end(), match["bare"]) for match in BOX.finditer(text)]
    return [
        (start, at, bare) if bare else (start, ends[at] + 1, text[at + 1 : ends[at]])
        for start, at, bare in boxes
        if bare or at in ends
    ]


def lone_letter(text: str, options: Mapping[str, str]) -> Reading[str]:
    """The letter that is all of a text: "(b).", "Option B"."""
    alone = re.fullmatch(rf"(?i:{NOUN}\s?)?[^\w+]*(?P<letter>(?i:[{_among(options)}]))[^\w+#✗✘❌×☒]*", plain(text))
    return Reading(alone["letter"].upper(), "whole") if alone else Reading(None, "", "no_choice")


def stated_letter(text: str, options: Mapping[str, str]) -> Reading[str]:
    """The letter that stands alone in the last line, or behind the last words that announce it."""
    said, among = plain(text), _among(options)
    # The last two lines, since a letter below another letter ends a list of options and chooses nothing.
    alone = [lone_letter(line, options).value for line in said.split("\n")[-2:]]
    if alone[-1]:
        echoed = alone[0] not in (None, alone[-1])  # lines of letters are the options again
        return Reading(None, "", "several_answers") if echoed else Reading(alone[-1], "last_line")
    cue = re.compile(
        rf"(?:(?i:{STATED}{CHOSEN})|(?P<so>(?i:{SO})))(?:\s?(?i:{FILLER}))?(?:\s?(?i:(?:the\s)?{NOUN}))?{OPEN}"
        rf"(?P<letter>(?i:[{among}])){NOT_IN_WORD}(?(so)(?=[)\]\"'}}$>]*\s?(?:$|[.,;!\n]|because\b|since\b)))"
    )
    # Denied and conditional ones go first ("the answer is not B"); of the rest the last counts, for models revise.
    cued = [match for match in cue.finditer(said) if _is_meant(said, match, options)]
    if not cued:
        return Reading(None, "", "no_choice")
    if _has_second(said, cued[-1], among):
        return Reading(None, "", "several_answers")
    return Reading(cued[-1]["letter"].upper(), "cue")


def named_letter(text: str, options: Mapping[str, str]) -> Reading[str]:
    """The letter that a text without such words means: by verdicts, its place, brackets, or as the only one."""
    said, among = plain(text), _among(options)
    heads = _heads(said, among)
    listed = {match["letter"].upper() for match in heads} if _is_list(said, heads, options) else set()
    # "A: wrong. B: right." chooses by its verdicts, provided that exactly one is good.
    right, wrong = _judged(said, heads, options)
    if len(right) == 1:
        return Reading(right.pop(), "verdict")
    concluded = _concluded(said, among, options)
    lead = re.compile(
        rf"[(\[\"'#>•-]{{0,6}}\s?(?i:{NOUN}\s)?[(\[]?(?P<letter>[{among}]|[{among.lower()}](?=[)\].:]))"
        rf"(?:[)\]]|[.:](?=\s|$|[{CJK}])|\s?[,;-](?=\s|[{CJK}])(?!\s?[{among}]{NOT_IN_WORD})|(?=\s(?:because|since)\b)|(?=因|\n))"
    ).match(said)
    # A letter in front of the text chooses, unless it only begins a list of all options, or a line holds nothing but
    # another.
    letter = lead["letter"].upper() if lead and _is_meant(said, lead, options) else ""
    alone = set(re.findall(rf"(?m)^\W*([{among}])\W*$", said))
    if letter and alone <= {letter} and (letter not in listed or listed - {letter} <= wrong):
        if concluded not in (None, letter):
            return Reading(None, "", "several_answers")
        return Reading(letter, "leading_letter")
    if concluded:
        return Reading(concluded, "conclusion")
    # Weakest last: a letter in brackets, then any capital that the words around it let stand for an option.
    for rule, pattern in (
        ("bracketed", rf"[(\[](?P<letter>[{among}])[)\]]"),
        ("only_letter", rf"{STANDING}(?P<letter>[{among}]){NOT_IN_WORD}"),
    ):
        named = (match for match in re.finditer(pattern, said) if rule == "bracketed" or _stands_alone(said, match))
        matches = [match for match in named if _is_meant(said, match, options)]
        found = {match["letter"] for match in matches}
        if any(_has_second(said, match, among) for match in matches):
            return Reading(None, "", "several_answers")
        if len(found) == 1 and not found & listed:
            return Reading(found.pop(), rule)
        if len(found) > 1:
            return Reading(None, "", "several_answers")
    return Reading(None, "", "no_choice")


def read_yes_no(text: str) -> Reading[str]:
    """Whether an answer says "yes" or "no": announced, as first or only such word, or by a negation."""
    part = unwrap(text)
    if part.value is None:
        return Reading(None, "", part.failure)
    said = plain(part.value)
    cue = re.compile(rf"(?i:{STATED})(?:\s?(?i:{FILLER}))?{OPEN}(?i:(?P<yes>{YES})|(?P<no>{NO}))(?![a-z])")
    cued = [m for m in cue.finditer(said) if not REJECTED.search(said[max(0, m.start() - NEARBY) : m.start()])]
    first = FIRST_WORD.match(said)
    # Announced before first word: "No wonder. The answer is yes."
    for rule, match in (("cue", cued[-1] if cued else None), ("yes_no_first_word", first)):
        if match:
            if HEDGED.match(said, match.end("yes" if match["yes"] else "no")):
                return Reading(None, "", "several_answers")
            return Reading("yes" if match["yes"] else "no", part.rule or rule)
    words = [m for m in WORDS.finditer(said) if not REJECTED.search(said[max(0, m.start() - NEARBY) : m.start()])]
    kinds = {"yes" if match["yes"] else "no" for match in words}
    if len(kinds) == 1:
        return Reading(kinds.pop(), part.rule or "yes_no_only_word")
    sentence = re.split(r"(?<=[.!?;])\s(?!\d)|\n|[.](?=[" + CJK + "])", said, maxsplit=1)[0]
    negated = NEGATION.search(sentence)
    # Without yes or no, a first sentence with "no", "not" or "none" is a no, as POPE counts it; a hedge or a contrast
    # is not.
    if not kinds and negated and not NO_ANSWER.search(sentence) and not CONTRAST.search(sentence, negated.end()):
        return Reading("no", part.rule or "yes_no_negation")
    return Reading(None, "", "several_answers" if kinds else "no_yes_no")


def read_quantity(text: str) -> Reading[float]:
    """The number behind the last "answer is", "total" or "=", or else the only one; equal ones count as one."""
    part = unwrap(text)
    if part.value is None:
        return Reading(None, "", part.failure)
    for inside, rule in ((part.value, part.rule), (spoken(text) or "", "")):  # a box may hold no number
        said = plain(inside)
        found = [(match.start(), value) for match in QUANTITY.finditer(said) if (value := _number(match)) is not None]
        # A cued number begins where the cue ends, to the letter.
        ends = {match.end() for match in NUMBER_CUE.finditer(said)}
        cued = [value for start, value in found if start in ends]
        if cued:
            return Reading(cued[-1], rule or "cue")
        if found:
            values = {value for _, value in found}
            return Reading(values.pop(), rule or "only_number") if len(values) == 1 else Reading(None, "", "no_number")
    return Reading(None, "", "no_number")


def read_text(text: str) -> Reading[str]:
    """Reads the text in a wrapper, or the announced one up to its reason or the sentence's end; or else all of it."""
    part = unwrap(text)
    if part.value is None:
        return part
    said = plain(part.value)
    announced = re.finditer(rf"(?i:{STATED})(?:\s?(?i:{FILLER}))?", said)
    cues = [m for m in announced if not REJECTED.search(said[max(0, m.start() - NEARBY) : m.start()])]
    if not cues:
        return Reading(said if part.rule == "boxed" else part.value, part.rule or "whole")
    stated = said[cues[-1].end() :].strip()
    # A reason behind the answer goes first, for it may hold the end of a sentence; an answer of nothing else stays
    # whole.
    for end in (REASON, SENTENCE_END):
        stated = end.split(stated, maxsplit=1)[0].strip() or stated
    return Reading(stated or part.value, part.rule or "cue")


def _among(options: Mapping[str, str]) -> str:
    return "".join(re.escape(letter) for letter in sorted({letter.upper() for letter in options}))


def _is_meant(text: str, match: re.Match[str], options: Mapping[str, str]) -> bool:
    """Whether a letter is chosen: not denied before or behind it, no article and no pronoun."""
    letter, after = match["letter"].upper(), text[match.end("letter") : match.end("letter") + NEARBY]
    if REJECTED.search(text[max(0, match.start() - NEARBY) : match.start()]):
        return False
    own = options.get(letter, "").casefold()
    # An option's own words may deny something themselves ("B. is not a cat"); then they refuse nothing.
    if REFUSED.match(after) and not (own and after.lstrip(").]: -\"'").casefold().startswith(own)):
        return False
    # A word in small letters behind it makes "A" an article and "I" a pronoun, unless it is one that follows letters.
    goes_on = re.match(r"\s[^\W\d_A-Z" + CJK + "]", after) and not AFTER_LETTER.match(after)
    return not (letter in "AI" and goes_on) and not (
        letter == "I" and re.match(r"\s(?:was|must|would|should)\b", after)
    )


def _has_second(text: str, match: re.Match[str], among: str) -> bool:
    """Whether another letter is named in the same breath: "A or B", "A, B"."""
    second = re.compile(
        rf"[)\]\"']*(?:,?\s?(?:or\b|and\b|/|&|或|和|与|及)\s?|(?P<comma>,)\s?)(?i:{NOUN}\s)?[(\[]?(?P<letter>[{among}])"
        rf"{NOT_IN_WORD}(?(comma)(?=[)\]\"'.]*\s?(?:$|\n|,|and\b|or\b)))"
    ).match(text, match.end("letter"))
    return second is not None and second["letter"] != match["letter"].upper() and _is_meant(text, second, {})


def _stands_alone(text: str, match: re.Match[str]) -> bool:
    """Whether the words around a bare letter let it name an option: "vitamin B" and "B cells" do not."""
    before, after = text[max(0, match.start() - NEARBY) : match.start()], text[match.end() : match.end() + NEARBY]
    ends = re.match(rf"[)\]\"'}}$]*(?:$|[.,;:!?\n](?!\w\.)|\s?[(\-]|\s?[{CJK}])", after) or AFTER_LETTER.match(after)
    named = NAMED_IN_CJK.search(before) or re.match(r"[)\]\"']*(?:选项|项|項)", after)
    return bool(ends and (LEADS_TO_LETTER.search(before) or named))


def _heads(text: str, among: str) -> list[re.Match[str]]:
    """Letters that begin what is said about an option."""
    verb = (
        "is|are|was|shows?|matches|fits|seems|looks|must|would|should|has|can|cannot|can't|does|doesn't|isn't|describes?|depicts?"
        "|represents?|contains?"
    )
    found = re.finditer(
        rf"(?:^|\n|[.;,!?]\s?|\b(?:and|but|while|whereas|only)\s|-\s|只有|仅有|仅)[(\[\"'#>•-]{{0,6}}\s?(?:(?i:{NOUN})\s?)?[(\[\"']?"
        rf"(?P<letter>[{among}]|[{among.lower()}](?=[).:](?!\w\.)))[)\]\"']*(?:选项|项|項)?"
        rf"(?=\s?(?P<sign>[:.)=→-])|\s(?:{verb})\b|\s?(?:right|wrong|correct|incorrect|true|false|yes|no)\s?(?:[.,;\n]|$)"
        rf"|[{CJK}]|\s?[✓✔✅☑√✗✘❌×☒])",
        text,
    )
    joined = re.compile(rf"(?<!\w)[{among}][)\]\"']*,?\s?$")  # "B and C are right" judges two at once
    return [
        match
        for match in found
        if not _has_second(text, match, among)
        and not (match[0].startswith("and") and joined.search(text[max(0, match.start() - NEARBY) : match.start()]))
    ]


def _is_list(text: str, heads: list[re.Match[str]], options: Mapping[str, str]) -> bool:
    """Whether the options are gone through one after the other, so that the first letter says nothing."""
    if len({match["letter"].upper() for match in heads}) < 2:
        return False
    body = text[heads[0].end() : heads[1].start()].strip(" :.)-")
    signs = [bool(match["sign"]) for match in heads[:2]]  # "A. a cat. Option B is no cat." explains a choice
    return bool(body) and (all(signs) or (not any(signs) and heads[0]["letter"].upper() == min(options)))


def _judged(text: str, heads: list[re.Match[str]], options: Mapping[str, str]) -> tuple[set[str], set[str]]:
    """The letters whose verdict is good, and is bad; an option's own words ("right", "yes") are no verdict."""
    good: set[str] = set()
    bad: set[str] = set()
    ends = [match.start() for match in heads[1:]] + [len(text)]
    for head, end in zip(heads, ends, strict=False):
        letter, body = head["letter"].upper(), text[head.end() : end].lstrip(" :.)]-=→\"'")
        own = options.get(letter, "")
        # The option's own words may read "right" or "no", and judge nothing.
        body = body[len(own) :] if own and body.casefold().startswith(own.casefold()) else body
        verdict = VERDICT.search(body if len(heads) > 1 else re.split(r"[.,;\n]", body, maxsplit=1)[0])
        if verdict:
            (good if verdict["good"] else bad).add(letter)
    # A letter that is judged both ways is not chosen.
    return good - bad, bad


def _concluded(text: str, among: str, options: Mapping[str, str]) -> str | None:
    """The letter that the last sentence ends with, if it names no other."""
    sentence = [part for part in re.split(r"(?<=[.!?;])\s?|\n", text) if re.search(r"\w", part)][-1:]
    named = list(re.finditer(rf"{STANDING}(?P<letter>[{among}]){NOT_IN_WORD}", sentence[0] if sentence else ""))
    if len({match["letter"] for match in named}) != 1 or not re.fullmatch(r"\W*", sentence[0][named[-1].end() :]):
        return None
    meant = _is_meant(sentence[0], named[-1], options) and _stands_alone(sentence[0], named[-1])
    return named[-1]["letter"] if meant and not sentence[0].endswith("?") else None


def _number(match: re.Match[str]) -> float | None:
    if match["word"]:
        # In "the left one" the word is a pronoun.
        if match["word"].lower() == "one" and PRONOUN_ONE.search(match.string[: match.start()][-NEARBY:]):
            return None
        value: float | None = spelled_number(match["word"].removesuffix(" and a half")) + (0.5 if match["half"] else 0)
    elif match["cjk"]:
        value = _cjk(match)
    else:
        value = _written(match)
    if value is None or not abs(value) < float("inf"):
        return None
    return -value if match["minus"] else value


def _written(match: re.Match[str]) -> float | None:
    """Digits with all that may stand around them."""
    digits = match["digits"]
    digits = (
        re.sub("[. ]", "", digits).replace(",", ".")
        if re.search(r"[. ]\d{3},", digits)
        else re.sub(r"[, ']", "", digits)
    )
    value = float(digits + (f"e{match['e']}" if match["e"] else ""))
    if match["under"]:
        if not int(match["under"]):
            return None
        value /= int(match["under"])
    try:
        value *= 10.0 ** int(match["power"] or 0)
        value = value ** int(match["exponent"]) if match["exponent"] else value
    except (OverflowError, ZeroDivisionError):
        return None
    # "1 1/2": the whole part is added after the fraction.
    value += float(match["mixed"] or 0)
    after, unit = (match["after"] or "").lower(), match["unit"] or ""
    if after == "%" or after.startswith("per"):
        return value / 100
    # "5m" is a length, "$5m" five million.
    money = {"m": 1e6}.get(unit, 1.0) if match["currency"] else 1.0
    return value * SCALES.get(after, CJK_SCALES.get(after, 1.0)) * SUFFIXES.get(match["suffix"] or "", 1.0) * money


def _cjk(match: re.Match[str]) -> float | None:
    """Chinese numerals; a single one counts alone, announced, or before a measure word: "一样" holds no number."""
    before, after = match.string[: match.start()][-NEARBY:], match.string[match.end() :][:1]
    alone = not re.search(rf"[{CJK}]$", before) and not re.match(rf"[{CJK}]", after)
    announced = re.search(r"(?:是|为|:|等于|有|共)$", before)
    if before.endswith("第") or (len(match["cjk"]) < 2 and not (alone or announced or match["counted"])):
        return None
    return cjk_number(match["cjk"])
