r"""The grammar of answers: which rule reads a letter, yes or no, a number or a text out of what a model wrote.

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

from sicog_mcore.cognition.spelling import (
    CJK,
    CJK_SCALES,
    NUMBER_WORDS,
    SCALES,
    TENS,
    cjk_number,
    plain,
    spelled_number,
)

Value = TypeVar("Value")

NEARBY = 48  # characters around a letter that decide whether it is meant
THOUGHT = re.compile(r"(?:<|◁|\[(?=/?THINK\]))(?P<close>/?)(?i:think|thinking|thoughts?|reasoning|reflection)[>▷\]]")
TAG = re.compile(r"<(?P<close>/?)(?i:answer|final_answer|conclusion)>|<\|(?:begin|(?P<end>end))_of_box\|>")
JSON = re.compile(
    r"[\"'](?i:(?:final|correct)?[_ ]?answer|choice|答案)[\"']\s?:\s?(?:\"([^\"\n]*)\"|'([^'\n]*)'|(-?[\d.]+))"
)
BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?:\s?(?=\{)|\s(?P<bare>\w+))")
JOINED = re.compile(r"[\s$,.;&/]*(?:and|or|和|或|与)?[\s$]*")  # between two answers that are given side by side

NOUN = r"(?:option|choice|letter|answer|figure|image|picture|statement|选项|選択肢)"
FILLER = r"(?:(?:most\s)?likely|probably|clearly|definitely|therefore|thus|indeed|simply)\s"
BE = r"(?:is|was|would\sbe|must\sbe|should\sbe|will\sbe|has\sto\sbe|ist|est|es)"
NOT_IN_WORD = rf"(?![^\W{CJK}]|'\w|-\w|[+#]|\.[A-Za-z]\b)"
STANDING = rf"(?<![^\W{CJK}])(?<!')(?<!\b[A-Za-z]\.)"
OPEN = r"\s?[(\[{\"'<$]{0,3}\s?"
STATED = (  # what the answer stands behind, in any kind of answer
    r"\b(?:answer|(?:correct|right|best|final)\s(?:choice|option|letter|answer|one)|(?:my|the)\s(?:choice|pick|guess)|antwort"
    r"|r[ée]ponse|respuesta)(?:\s(?:choice|option|letter))?(?:\s(?:to|for|of|here)\b[^.:?!\n]{0,60}?)?"
    rf"(?:\s{BE}(?![^\W{CJK}])\s?:?|\s?(?:[:=]|->|→))"
    r"|(?:^|\n)#{0,6}\s?(?:the\s)?(?:final\s)?answer\s?\n|(?:^|\n)#{4}\s(?=[^\n]*$)"
    r"|\[(?:答案|正解)\]|(?:答案|正解|答え|解答)(?:选项)?(?:应该|应当|应|就|只能)?(?:选择|选|是|为|為|は|[:=])\s?:?"
    r"|正确(?:的)?(?:选项|答案|的)?(?:应该|应|就)?(?:是|为|為|:)\s?:?|(?:정답|답)(?:은|는|\s?:)"
)
CHOSEN = (  # what only a letter stands behind
    r"|答案|(?:选择|选定|选|選擇|選)(?:的?是|了|:)?|选项(?:是|为)|正しいのは|(?:정답|답)"
    r"|\b(?:choose|select|opt\sfor|go\swith|going\swith)"
)
SO = (  # the same, where the sentence must end with it
    r"\b(?:so|therefore|thus|hence|then|overall|in\sconclusion|conclusion)\b\s?[:,]?\s?"
    rf"(?:(?:it|that|this)?(?:'s|\s?{BE}))?|(?:故|所以|因此|综上所述|综上|因而|可知|则)[,:]?\s?(?:是|为)?|(?:→|=>|⇒)"
)
REJECTED = re.compile(  # before a letter, or before what states it
    r"(?:(?i:\b(?:not|nor|neither|cannot|never)|n't)(?:\s(?!but\b|it\b|rather\b|so\b|and\b|then\b|as\b|since\b|because\b)[a-z']+){0,5}\s"
    r"|(?i:\b(?:than|except|unlike|over|wrong|incorrect|false|excludes?|excluding|without|eliminated?|instead\sof|opposed\sto"
    r"|rules?\sout|ruled\sout))(?:\s(?!but\b|it\b|so\b|and\b|then\b|[Tt]he\b)[a-z']+){0,3}\s"
    r"|(?i:\b(?:if|whether|suppose)(?:\s(?:the|it|that|correct|right|answer|option|choice|is|was|were|be)){0,5}\s)"
    r"|[^\S\n]?(?:不|没|別|(?<!分)别|勿|排除|并非|除了?|比|错误(?:的)?)(?:能|应该|应|该|可以|可|会|要|是|选择|选|为|像|答案|选项)*)[(\[\"']*$"
)
REFUSED = re.compile(  # behind a letter
    r"[)\]\"']*\s?(?i:(?:is|are|was|looks|seems|would\sbe|can\sbe|must\sbe)\s(?:also\s|clearly\s|definitely\s|just\s)?"
    r"(?:wrong|incorrect|false|impossible|eliminated|excluded|ruled|out\b|no\b)|(?:is|was|can|does|do|would|could)(?:n't|\s?not\b))"
    r"|[)\]\"'.:\-]*\s?(?i:(?:wrong|incorrect|false|no|not)\b(?=\s?(?:$|[.,;!\n]|because|since))"
    r"|[^.\n]{0,30}?,\s(?:so|which\sis)\s(?:no|not|wrong|false|incorrect)\b)"
    r"|[)\]\"':]*\s?(?i:not\b)|[)\]\"']*(?:选项|项|是|都|也|显然|明显|:)*\s?(?:不|错|误|×|✗|✘|❌)"
)
AFTER_LETTER = re.compile(  # words that follow a letter, and no article
    r"\s(?:because|since|as|for|and|or|is|are|was|but|which|that|with|in|on|over|not|rather|instead|here|based|given|due|from|by"
    r"|shows?|matches|fits|seems|looks|must|would|should|has|describes?|depicts?|represents?|it\sis)\b"
)
LEADS_TO_LETTER = re.compile(
    r"(?:^|[.!?;:,\n=→(\[\"'{$>]\s?|(?:\b(?i:is|was|be|are|shows?|depicts?|displays?|match|matches|fits?|describes?"
    r"|choose|chose|pick|select|take|say|guess|think|believe|with|to|option|choice|letter|figure|image|picture|photo|panel|diagram"
    r"|graph|statement|answer|but|so|thus|therefore|hence|then|see|sees|means?|leaves|definitely|probably|clearly|likely|maybe|perhaps"
    r"|only|just|both|either|ist|est|es)|'s)\s)[(\[\"']*$"
)
NAMED_IN_CJK = re.compile(r"[是为為选選择擇项項取即于应為は](?:[(\[\"'\s]*)$")
VERDICT = re.compile(
    r"(?P<bad>(?i:\b(?:not|isn't|never)\b|n't\b|\b(?:incorrect|wrong|false|no|inaccurate|cannot|impossible)\b)"
    r"|不|错|误|✗|✘|❌|×|☒)"
    r"|(?P<good>(?i:\b(?:correct|true|yes|accurate)\b|\bright\s(?:answer|option|choice|one)\b"
    r"|(?<!the\s)(?<!to\s)(?<!on\s)(?<!top\s)(?<!bottom\s)\bright\b"
    r"(?!\s(?:side|hand|of|corner|arm|leg|half|part|end|to|now|next|above))"
    r"|\b(?:fits|matches)\b(?=\s?(?:$|[.,;!\n]|best\b|the\s(?:picture|image|description)\b))"
    r"|\b(?:is|as)\sthe\s(?:best\s)?(?:answer|match)\b)|正确|正しい|符合|对(?!于|比|应|面|称|象)|✓|✔|✅|☑|√)"
)

YES = r"(?:yes|yeah|yep|yup|はい|是(?!否|不是)|对(?!不|于|比)|有(?!没有|无|可能)|네|예)"
NO = (
    r"(?:no(?!\.?\s?\d|\s(?:doubt|idea|question|way\sto)\b)|nope|nah|いいえ"
    r"|否|没(?!错)|不(?=是|对|会|行|在|存在|\W|$)|无(?=\W|$)|并不|아니요|아니오)"
)
NO_ANSWER = re.compile(  # a negation that says nothing about the question
    r"\bnot\s(?:sure|certain|clear|possible|enough|only|just|able)|\bno\s(?:doubt|question|idea|way\sto|information|image|picture)"
    r"|\b(?:do|does|did)(?:n't|\snot)\s(?:know|have|provide)|\b(?:cannot|can't|can\snot|unable|could\snot|couldn't)\b|\bno\.?\s?\d"
    r"|不(?:知道|确定|清楚|能|一定|仅|但|错)|无法|看不清|\bunclear\b|\bsorry\b"
    r"|,\snot\b|\b(?:says?|saying|reads?|reading)\s\W{0,2}no\b",
    re.I,
)
FIRST_WORD = re.compile(rf"\W*(?:(?i:well|sure|ok|okay|oh|so)\b[\s,.!]*)?(?i:(?P<yes>{YES})|(?P<no>{NO}))(?![a-z])")
WORDS = re.compile(r"(?i:\b(?P<yes>yes|yeah)\b|\b(?P<no>no)\b(?!\.\s?\d)(?=\W*(?:$|[.,;!\n])))")
NEGATION = re.compile(r"(?i:\b(?:no|not|none|never|neither|nothing|nobody)\b|n't\b)|没(?!错)|(?<!是)不是|并非")
CONTRAST = re.compile(
    r"(?i:\b(?:but|instead|rather|only|however|except|although|though|it\sis|it's|they\sare)\b)|而是|而|但|只"
)
HEDGED = re.compile(r"\s*(?:/|,?\s?(?i:and|or|或|和)\b)\s?(?i:yes|no|not|maybe|是|否)\b")

SUFFIXES: Mapping[str, float] = {"k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "mn": 1e6, "bn": 1e9, "tn": 1e12}
UNITS = (  # that stand right behind a number; any may stand behind a space
    r"(?:[mglhtsVAWNJLCF]|(?i:[mckµμ]m|in|ft|yds?|mi|km/?h|kph|mph|[mkµμ]g|lbs?|oz|[mc]l|ms|secs?|mins?|hrs?|px|[kmg]w|[kmg]?wh"
    r"|[km]v|ma|[kmg]?hz|[kmgt]b|kj|k?cal|k?pa|kn|mol|deg|rad|usd|eur|rmb))"
)
GROUPED = r"\d{1,3}(?:[,']\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}|\d{1,3}(?: \d{3})+(?! ?\d)"
WHOLE = rf"(?:\d{{1,3}}(?:[. ]\d{{3}})+,\d+(?![\d,])|(?:{GROUPED}|\d+)(?:\.\d+)?|\.\d+)"
SPELLED = "|".join(sorted(NUMBER_WORDS, key=len, reverse=True))
TO_99 = (
    rf"(?:(?:(?:{TENS.replace(' ', '|')})[- ](?:one|two|three|four|five|six|seven|eight|nine)|{SPELLED}"
    r"|a(?=[ -](?:hundred|thousand)))\b)"
)
CHUNK = rf"(?:{TO_99}(?:[- ]hundred\b(?:[- ](?:and[- ])?{TO_99})?)?)"
SCALE = r"(?:thousand|million|billion|trillion)\b"
QUANTITY = re.compile(
    r"(?<![\w.,^/])(?<!\d[:/])(?P<minus>(?:-|(?i:minus|negative)\s)?)(?:(?P<currency>[$€£¥])\s?)?"
    rf"(?:(?:(?P<mixed>\d{{1,3}}) (?=\d+/\d))?(?P<digits>{WHOLE})(?:(?i:e)(?P<e>[-+]?\d{{1,3}}))?"
    r"(?:\s?/\s?(?P<under>\d{1,9}))?"
    r"(?:\s?[×xX*·]\s?10\s?\^\s?\(?(?P<power>[-+]?\d{1,3})\)?|\^\(?(?P<exponent>[-+]?\d{1,3})\)?)?"
    rf"(?:\s?(?P<after>%|(?i:per\s?cent|{'|'.join(SCALES)})\b|[万萬亿億])|(?P<suffix>{'|'.join(SUFFIXES)})(?!\w)"
    rf"|(?P<unit>{UNITS})(?:\^?[23])?(?:/[a-z]{{1,4}})?(?!\w))?(?!\w|\^|\s?/\s?\d|[.,:]\d)"
    rf"|(?P<word>\b(?i:(?:{CHUNK} {SCALE},? (?:and )?)*{CHUNK}(?: {SCALE})?)(?P<half> and a half)?)(?![-\w])"
    r"|(?P<cjk>(?:百分之)?[零〇一二两兩三四五六七八九十百千万萬亿億]+(?:点[零〇一二三四五六七八九]+)?)"
    r"(?P<counted>[个只條条张位名本辆匹枚人米元岁次])?)",
    re.A,
)
NUMBER_CUE = re.compile(
    r"(?:\b(?i:answer|result|total|sum|difference|product)(?:\s(?i:is|are|equals|would\sbe|should\sbe))?\s?[:=]?\s?|[=≈]\s?"
    r"|(?:答案|结果|总共|一共|共有|共|等于|总数|答え|合計)(?:是|为|は|:|有)?\s?)"
    r"(?:(?i:about|approximately|around|roughly|only|exactly)\s|[~≈]\s?)?[(]?"
)
PRONOUN_ONE = re.compile(r"(?i:\b(?:the|this|that|which|each|no|any|some|every|another|first|last)\s(?:\w+\s)?)$")
SENTENCE_END = re.compile(
    r"\n|(?<!\b[A-Z])(?<!\b[A-Z][a-z])(?<!\bMrs)[.!?](?:\s(?=[A-Z])|(?=[" + CJK + "]))"
)  # no "Dr. No"
REASON = re.compile(r"[\s,;(-]*(?:\b(?i:because|since)\b|因为|由于)|[,;]\s(?i:as|for)\s")


class Reading(NamedTuple, Generic[Value]):
    """What a text says.

    Attributes:
        value: None where nothing can be read.
        rule: that read it; empty without a value.
        failure: why there is none; empty otherwise.
    """

    value: Value | None
    rule: str = ""
    failure: str = ""


def spoken(text: str) -> str | None:
    """The text without what a model thinks aloud; None if a thought does not end, so that no answer was reached."""
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
    for name, find in (("answer_tag", _tagged), ("json", _in_json), ("boxed", _boxed)):
        found = find(said)
        if not found:
            continue
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
    alone = [lone_letter(line, options).value for line in said.split("\n")[-2:]]
    if alone[-1]:
        echoed = alone[0] not in (None, alone[-1])  # lines of letters are the options again
        return Reading(None, "", "several_answers") if echoed else Reading(alone[-1], "last_line")
    cue = re.compile(
        rf"(?:(?i:{STATED}{CHOSEN})|(?P<so>(?i:{SO})))(?:\s?(?i:{FILLER}))?(?:\s?(?i:(?:the\s)?{NOUN}))?{OPEN}"
        rf"(?P<letter>(?i:[{among}])){NOT_IN_WORD}(?(so)(?=[)\]\"'}}$>]*\s?(?:$|[.,;!\n]|because\b|since\b)))"
    )
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
    right, wrong = _judged(said, heads, options)
    if len(right) == 1:
        return Reading(right.pop(), "verdict")
    concluded = _concluded(said, among, options)
    lead = re.compile(
        rf"[(\[\"'#>•-]{{0,6}}\s?(?i:{NOUN}\s)?[(\[]?(?P<letter>[{among}]|[{among.lower()}](?=[)\].:]))"
        rf"(?:[)\]]|[.:](?=\s|$|[{CJK}])|\s?[,;-](?=\s|[{CJK}])(?!\s?[{among}]{NOT_IN_WORD})|(?=\s(?:because|since)\b)|(?=因|\n))"
    ).match(said)
    letter = lead["letter"].upper() if lead and _is_meant(said, lead, options) else ""
    alone = set(re.findall(rf"(?m)^\W*([{among}])\W*$", said))
    if letter and alone <= {letter} and (letter not in listed or listed - {letter} <= wrong):
        if concluded not in (None, letter):
            return Reading(None, "", "several_answers")
        return Reading(letter, "leading_letter")
    if concluded:
        return Reading(concluded, "conclusion")
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
        ends = {match.end() for match in NUMBER_CUE.finditer(said)}
        cued = [value for start, value in found if start in ends]
        if cued:
            return Reading(cued[-1], rule or "cue")
        if found:
            values = {value for _, value in found}
            return Reading(values.pop(), rule or "only_number") if len(values) == 1 else Reading(None, "", "no_number")
    return Reading(None, "", "no_number")


def read_text(text: str) -> Reading[str]:
    """What a wrapper holds, or what is announced up to its reason or the sentence's end; or else all that is spoken."""
    part = unwrap(text)
    if part.value is None:
        return part
    said = plain(part.value)
    announced = re.finditer(rf"(?i:{STATED})(?:\s?(?i:{FILLER}))?", said)
    cues = [m for m in announced if not REJECTED.search(said[max(0, m.start() - NEARBY) : m.start()])]
    if not cues:
        return Reading(said if part.rule == "boxed" else part.value, part.rule or "whole")
    stated = said[cues[-1].end() :].strip()
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
    if REFUSED.match(after) and not (own and after.lstrip(").]: -\"'").casefold().startswith(own)):
        return False
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
        body = body[len(own) :] if own and body.casefold().startswith(own.casefold()) else body
        verdict = VERDICT.search(body if len(heads) > 1 else re.split(r"[.,;\n]", body, maxsplit=1)[0])
        if verdict:
            (good if verdict["good"] else bad).add(letter)
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
    value += float(match["mixed"] or 0)
    after, unit = (match["after"] or "").lower(), match["unit"] or ""
    if after == "%" or after.startswith("per"):
        return value / 100
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
