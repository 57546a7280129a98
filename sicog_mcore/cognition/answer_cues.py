"""The cues of answers: patterns of the words and signs by which a letter, yes or no, a number or a text is known.

Out: compiled patterns, and parts of patterns   Used by: answer_grammar.py, which says in which order they count
All of them are for text in plain form (spelling.py), but for the wrappers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from sicog_mcore.cognition.spelling import CJK, NUMBER_WORDS, SCALES, TENS

NEARBY = 48  # characters around a letter that decide whether it is meant
# Three families write their thoughts differently: <think>, ◁think▷ and [THINK].
THOUGHT = re.compile(r"(?:<|◁|\[(?=/?THINK\]))(?P<close>/?)(?i:think|thinking|thoughts?|reasoning|reflection)[>▷\]]")
TAG = re.compile(r"<(?P<close>/?)(?i:answer|final_answer|conclusion)>|<\|(?:begin|(?P<end>end))_of_box\|>")
# A key that means the answer, then a text in either kind of quotes, or a number.
JSON = re.compile(
    r"[\"'](?i:(?:final|correct)?[_ ]?answer|choice|答案)[\"']\s?:\s?(?:\"([^\"\n]*)\"|'([^'\n]*)'|(-?[\d.]+))"
)
BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?:\s?(?=\{)|\s(?P<bare>\w+))")
JOINED = re.compile(r"[\s$,.;&/]*(?:and|or|和|或|与)?[\s$]*")  # between two answers that are given side by side

NOUN = r"(?:option|choice|letter|answer|figure|image|picture|statement|选项|選択肢)"
FILLER = r"(?:(?:most\s)?likely|probably|clearly|definitely|therefore|thus|indeed|simply)\s"
BE = r"(?:is|was|would\sbe|must\sbe|should\sbe|will\sbe|has\sto\sbe|ist|est|es)"
# Behind a letter that names an option: no further letter, no "'s", "-ray", "+", "#" or ".g". Signs of CJK may follow,
# for these scripts leave no space. STANDING is the same in front of it.
NOT_IN_WORD = rf"(?![^\W{CJK}]|'\w|-\w|[+#]|\.[A-Za-z]\b)"
STANDING = rf"(?<![^\W{CJK}])(?<!')(?<!\b[A-Za-z]\.)"
OPEN = r"\s?[(\[{\"'<$]{0,3}\s?"
STATED = (  # what the answer stands behind, in any kind of answer
    r"\b(?:answer|(?:correct|right|best|final)\s(?:choice|option|letter|answer|one)|(?:my|the)\s(?:choice|pick|guess)|antwort"
    r"|r[ée]ponse|respuesta)(?:\s(?:choice|option|letter))?(?:\s(?:to|for|of|here)\b[^.:?!\n]{0,60}?)?"
    rf"(?:\s{BE}(?![^\W{CJK}])\s?:?|\s?(?:[:=]|->|→))"
    # A heading "Answer" with the answer below, or "####", which marks the last line of GSM8K's answers.
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
# Up to five small words may stand between "not" and the letter, unless one of them begins a new thought ("but", "so").
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
# "A" and "I" are words as well. In front of a noun they are an article and a pronoun; in front of these they are
# letters.
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
# The first hit counts, so "not correct" is bad. "right" is a side as well: "the right hand", "on the right" judge
# nothing.
VERDICT = re.compile(
    r"(?P<bad>(?i:\b(?:not|isn't|never)\b|n't\b|\b(?:incorrect|wrong|false|no|inaccurate|cannot|impossible)\b)"
    r"|不|错|误|✗|✘|❌|×|☒)"
    r"|(?P<good>(?i:\b(?:correct|true|yes|accurate)\b|\bright\s(?:answer|option|choice|one)\b"
    r"|(?<!the\s)(?<!to\s)(?<!on\s)(?<!top\s)(?<!bottom\s)\bright\b"
    r"(?!\s(?:side|hand|of|corner|arm|leg|half|part|end|to|now|next|above))"
    r"|\b(?:fits|matches)\b(?=\s?(?:$|[.,;!\n]|best\b|the\s(?:picture|image|description)\b))"
    r"|\b(?:is|as)\sthe\s(?:best\s)?(?:answer|match)\b)|正确|正しい|符合|对(?!于|比|应|面|称|象)|✓|✔|✅|☑|√)"
)

# Signs that go on as a question ("是否", "是不是", "有没有") are no answer; neither is "no" in "no. 3" or "no doubt".
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
# Within a clause "no" denies a thing ("no cat"); only in front of a pause does it answer.
WORDS = re.compile(r"(?i:\b(?P<yes>yes|yeah)\b|\b(?P<no>no)\b(?!\.\s?\d)(?=\W*(?:$|[.,;!\n])))")
NEGATION = re.compile(r"(?i:\b(?:no|not|none|never|neither|nothing|nobody)\b|n't\b)|没(?!错)|(?<!是)不是|并非")
# "Not red but blue" answers another question than yes or no.
CONTRAST = re.compile(
    r"(?i:\b(?:but|instead|rather|only|however|except|although|though|it\sis|it's|they\sare)\b)|而是|而|但|只"
)
HEDGED = re.compile(r"\s*(?:/|,?\s?(?i:and|or|或|和)\b)\s?(?i:yes|no|not|maybe|是|否)\b")

SUFFIXES: Mapping[str, float] = {"k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "mn": 1e6, "bn": 1e9, "tn": 1e12}
UNITS = (  # that stand right behind a number; any may stand behind a space
    r"(?:[mglhtsVAWNJLCF]|(?i:[mckµμ]m|in|ft|yds?|mi|km/?h|kph|mph|[mkµμ]g|lbs?|oz|[mc]l|ms|secs?|mins?|hrs?|px|[kmg]w|[kmg]?wh"
    r"|[km]v|ma|[kmg]?hz|[kmgt]b|kj|k?cal|k?pa|kn|mol|deg|rad|usd|eur|rmb))"
)
# Groups of three by comma, apostrophe or space, and the Indian way, 12,34,567.
GROUPED = r"\d{1,3}(?:[,']\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}|\d{1,3}(?: \d{3})+(?! ?\d)"
# A decimal comma counts only behind groups ("1.234,5"): "1,5" may be a list of two numbers.
WHOLE = rf"(?:\d{{1,3}}(?:[. ]\d{{3}})+,\d+(?![\d,])|(?:{GROUPED}|\d+)(?:\.\d+)?|\.\d+)"
SPELLED = "|".join(sorted(NUMBER_WORDS, key=len, reverse=True))
# Number words, from the inside out: up to ninety-nine, then with hundreds, then with thousands and more (in QUANTITY).
TO_99 = (
    rf"(?:(?:(?:{TENS.replace(' ', '|')})[- ](?:one|two|three|four|five|six|seven|eight|nine)|{SPELLED}"
    r"|a(?=[ -](?:hundred|thousand)))\b)"
)
CHUNK = rf"(?:{TO_99}(?:[- ]hundred\b(?:[- ](?:and[- ])?{TO_99})?)?)"
SCALE = r"(?:thousand|million|billion|trillion)\b"
# Never a piece of something longer: the borders refuse words, decimals, powers, fractions, times such as 12:30. With
# re.A the signs of CJK are no letters, so a number may stand right beside them.
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
