"""Keys of rows and of their turns: used, known not to matter, or named; a row that would lose its meaning is refused.

In: a parsed row   Out: what is wrong with its keys, which of them nobody uses   Next: rows.py, row_survey.py
A key is looked up by its letters and digits alone, so that "Image_Path", "image-path" and "imagePath" are one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from reprlib import Repr
from typing import Any, NamedTuple

ROW_KEYS = frozenset(("id", "image", "conversations", "system"))
PAIR_KEYS = ROW_KEYS | {"prompt", "chosen", "rejected"}
LLAVA_TURN, MESSAGE_TURN = frozenset(("from", "value")), frozenset(("role", "content"))
TURN_KEYS = LLAVA_TURN | MESSAGE_TURN

# Where a row comes from, what it is about, how it was made and judged: true of it, but nothing that a model reads.
IGNORED = frozenset(
    """
    source sources dataset dataset_name data_source subset split task task_name task_type type category categories
    subcategory topic domain tags keywords lang language license licence license_url metadata meta meta_data info extra
    url page_url doc_url source_url website title author date created_at updated_at timestamp time version format
    index idx row_id row_index uid uuid guid qid question_id sample_id data_id item_id conversation_id conv_id key
    width height original_width original_height image_width image_height image_size img_size resolution aspect_ratio
    exif md5 sha256 sha1 hash phash checksum status error_message num_failed
    score scores similarity clip_score aesthetic aesthetic_score quality quality_score rating difficulty nsfw punsafe
    pwatermark confidence length num_tokens token_count num_turns model model_name model_id generator annotator
    record form corruption caption_source
    """.split()
)
# Keys that curation writes into each of its rows: the record it comes from, its form, and the model's prompt.
CURATED = frozenset(("record", "form", "prompt"))
# The name of a picture, which the row gives by ``image`` already.
IGNORED_BESIDE_IMAGE = frozenset("image_id image_url image_name img_id file_name filename coco_url flickr_url".split())
IGNORED_IN_TURNS = frozenset(
    "id idx index turn turn_id uid timestamp time created_at lang language model source score length num_tokens".split()
)

PICTURE = frozenset(
    """
    imagepath imagefile imagefilename imageurl imageuri imagename imageid imgid imagebytes imagebase64 imagedata
    img imgpath imgfile imgurl imgname picture picturepath pictureurl photo photopath pic pixelvalues pixels
    jpg jpeg png webp base64 screenshot screenshotpath
    """.split()
)
PICTURES = frozenset(
    """
    images imagepaths imagefiles imageurls imagelist imageids imgs imgpaths imglist imgurls pictures photos pics frames
    framepaths screenshots
    """.split()
)
FILM_OR_SOUND = frozenset(
    """
    video videos videopath videopaths videofile videofiles videourl videourls audio audios audiopath audiopaths
    audiofile audiofiles audiourl audiourls sound sounds speech wav mp3 mp4 music pointcloud
    """.split()
)
DIALOGUE = frozenset(("messages", "conversation", "dialog", "dialogue", "dialogs", "turns", "chat", "chats"))
HISTORY = frozenset(("history", "histories"))
SYSTEM = frozenset(("systemprompt", "systemmessage", "sysprompt", "systemtext"))
TOOLS = frozenset(("tools", "tool", "functions", "functioncall", "toolcalls", "toolchoice"))
PREFERENCE = frozenset(
    ("chosen", "rejected", "rejectedresponse", "rejectedresponses", "chosenresponse", "rejectedmessages", "ktotag")
)
REASONING = frozenset(("reasoningcontent", "reasoning", "thinking", "thought", "thoughts"))
# Keys that decide which tokens are learnt, and the value at which they ask for what is done anyway; None: no value does.
LEARNING: Mapping[str, int | None] = {
    **dict.fromkeys(("loss", "lossweight", "lossscale", "weight", "sampleweight", "train", "trainable"), 1),
    **dict.fromkeys(("maskprompt", "maskinputs", "maskinput"), 1),
    **dict.fromkeys(("mask", "maskhistory", "trainoninputs", "trainoninput", "trainonprompt"), 0),
    **dict.fromkeys(("lossmask", "trainon", "lossweights", "weights"), None),
}
LABEL = "label"
# Optional key of a row that is no pair: by which number the losses of its answers are multiplied, in a mean over tokens
# whose weights are divided by. It stands in no set of used keys, because its value decides whether it may be used.
WEIGHT = "weight"
# Losses are summed in fp32: beyond these the mean over a step would be NaN or 0, with a step that never comes right.
LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6
NAMED = PICTURE | PICTURES | FILM_OR_SOUND | DIALOGUE | HISTORY | SYSTEM | TOOLS | PREFERENCE | {LABEL, *LEARNING}
# Question and answer in fields of their own; beside ``conversations`` they are what it was made of.
TEXTS = ("instruction", "input", "output", "query", "response", "prompt", "completion", "question", "answer", "text")
SUGGESTIONS: Mapping[str, tuple[str, ...]] = {
    "conversations": (*sorted(DIALOGUE), *TEXTS, "caption"),
    "prompt": ("question", "query", "instruction"),
    "chosen": ("chosenresponse", "response", "accepted", "preferred", "answer"),
    "rejected": ("rejectedresponse", "rejectedresponses", "rejectedmessages"),
    "from": ("speaker", "author", "sender"),
    "value": ("text", "message", "utterance"),
}
MEDIA_FILE = re.compile(
    r"[^\n]{1,4096}\.(?:jpe?g|png|webp|gif|bmp|tiff?|avif|heic|jp2|svg|mp4|avi|mov|mkv|webm|wav|mp3|flac|ogg|m4a)", re.I
)

NO_LETTERS = re.compile(r"[\W_]+")
MAX_KEY_CHARS = 60  # of a key as it is looked up and shown
MAX_KEYS_SHOWN = 12
MAX_LOOKED_AT = 1000  # elements of one value
MAX_FAULTS = 3
EMPTY_TEXTS = ("[]", "{}")
LEARNT_ANYWAY = "what is learnt cannot be chosen: every answer is, and nothing else; remove the key or the row"
WEIGHT_REMEDY = "the losses of the row's answers are multiplied by it; change, rename or remove the key"
LLAVA_EXAMPLE = '"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]'


class KeyFault(NamedTuple):
    """A fault that keeps a row from being used: its key, and what was found, expected, and the remedy."""

    key: str
    detail: str


def shown(value: object) -> str:
    """The start of a value of any size, escaped, in bounded time."""
    short = Repr()
    short.maxstring = short.maxother = 60
    short.maxlist = short.maxdict = short.maxtuple = 4
    return short.repr(value)[:80]


def shown_keys(row: Mapping[str, Any]) -> str:
    """The keys of a row, by name; those beyond the first dozen by their number."""
    names = sorted(row)
    more = f" and {len(names) - MAX_KEYS_SHOWN} more" if len(names) > MAX_KEYS_SHOWN else ""
    return f"{[name[:MAX_KEY_CHARS] for name in names[:MAX_KEYS_SHOWN]]}{more}"


def is_empty(value: object) -> bool:
    """Whether a value says nothing: null, blank text, an empty list or object, also one that is written as a text."""
    if isinstance(value, str):
        return len(value) <= MAX_KEY_CHARS and value.strip() in ("", *EMPTY_TEXTS)
    return value is None or (isinstance(value, list | dict) and not value)


def unused_keys(row: Mapping[str, Any], used: frozenset[str], has_images: bool) -> Iterator[str]:
    """Keys that hold something which is neither used nor known not to matter."""
    # Only all three together are the sign of curation: "prompt" alone may be a question.
    own = CURATED if row.keys() >= CURATED else frozenset()
    for key, value in row.items():
        is_known = key in used or key in own or key in IGNORED or (has_images and key in IGNORED_BESIDE_IMAGE)
        is_known = is_known or (key == WEIGHT and "rejected" not in used)
        if not is_known and not is_empty(value):
            yield key


def row_faults(row: Mapping[str, Any], used: frozenset[str], num_images: int) -> list[KeyFault]:
    """The keys whose meaning would be lost; a few of them at most.

    Args:
        row: the parsed row.
        used: keys that have a meaning in this run: ROW_KEYS or PAIR_KEYS.
        num_images: images of the row.
    """
    # Nearly all rows end here, with two comparisons of sets and no look at any value.
    if row.keys() <= used or row.keys() <= (allowed := used | IGNORED):
        return []
    faults: list[KeyFault] = []
    for key in row:
        if key in allowed or is_empty(row[key]):
            continue
        detail = _row_fault(key, row, used, num_images)
        if detail:
            faults.append(KeyFault(key[:MAX_KEY_CHARS], detail))
            if len(faults) == MAX_FAULTS:
                break
    return faults


def turn_faults(turn: Mapping[str, Any], is_answer: bool) -> list[KeyFault]:
    """The keys of a turn whose meaning would be lost.

    Args:
        turn: the parsed turn.
        is_answer: whether it is learnt.
    """
    keys = turn.keys()
    # Nearly all turns end here.
    if keys == LLAVA_TURN or keys == MESSAGE_TURN:
        return []
    faults = []
    for key, value in turn.items():
        if key in TURN_KEYS or key in IGNORED_IN_TURNS or is_empty(value):
            continue
        plain, key = _plain(key), key[:MAX_KEY_CHARS]
        name = f"the turn's key {key!r}"
        if plain in PICTURE or plain in PICTURES or plain in FILM_OR_SOUND:
            faults.append(KeyFault(key, f"{name} holds {shown(value)}; write images into the row's field 'image'"))
        elif plain in LEARNING and not _is_neutral(plain, value, is_answer):
            faults.append(KeyFault(key, f"{name} is {shown(value)}; {LEARNT_ANYWAY}"))
        elif plain in TOOLS:
            faults.append(KeyFault(key, f"{name} calls a tool, which no template can write; remove the row"))
        elif plain in REASONING:
            faults.append(KeyFault(key, f"{name} is not read; write it into the turn's text, or remove it"))
        if len(faults) == MAX_FAULTS:
            break
    return faults


def row_weight(row: Mapping[str, Any]) -> float:
    """The weight of a row whose keys have no fault; 1 where it names none."""
    value = row.get(WEIGHT)
    return 1.0 if is_empty(value) else float(value)  # type: ignore[arg-type]  # row_faults has seen it


def changed_weight(row: Mapping[str, Any], used: frozenset[str]) -> float | None:
    """The weight of a row where it is used and not 1; None for all other rows."""
    value = row.get(WEIGHT)
    return float(value) if "rejected" not in used and _is_weight(value) and value != 1 else None  # type: ignore[arg-type]


def suggestion(row: Mapping[str, Any], wanted: str) -> str:
    """Which key may be meant where ``wanted`` is missing, as an end of a sentence; empty if none looks like it."""
    plain = {_plain(key): key for key in list(row)[:MAX_LOOKED_AT]}
    # Names that are in use elsewhere come before names that merely look alike.
    known = [plain[name] for name in (wanted, *SUGGESTIONS.get(wanted, ())) if name in plain]
    if not known:
        known = [plain[name] for name in get_close_matches(wanted, list(plain), n=1, cutoff=0.75)]
    if not known:
        return ""
    if wanted == "conversations" and _plain(known[0]) not in (*DIALOGUE, wanted) and isinstance(row[known[0]], str):
        names = " and ".join(repr(key) for key in known[:3])
        return f"; write {names} as turns: {LLAVA_EXAMPLE}"
    return f"; rename {known[0][:MAX_KEY_CHARS]!r} to {wanted!r}"


def did_you_mean(key: str, used: frozenset[str]) -> str:
    """A used key that looks like this one, in brackets; empty if none does."""
    plain = _plain(key)
    close = [plain] if plain in used else get_close_matches(plain, used, n=1, cutoff=0.75)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _row_fault(key: str, row: Mapping[str, Any], used: frozenset[str], num_images: int) -> str:
    """Why the row cannot be used with this key; empty if it can."""
    plain, value = _plain(key), row[key]
    name = f"the key {key[:MAX_KEY_CHARS]!r}"
    if key == WEIGHT and "rejected" not in used:
        wanted = f"expected a number from {LEAST_WEIGHT:g} to {MOST_WEIGHT:,.0f}"
        return "" if _is_weight(value) else f"{name} is {shown(value)}, {wanted}; {WEIGHT_REMEDY}"
    # The key differs from a used one in case or signs alone, so it was surely meant.
    if plain in used and plain != "id":  # all used keys are plain themselves
        return "" if row.get(plain) == value else f"{name} is not known; rename it to {plain!r}"
    # An unknown key is harmless, unless its value shows that a picture was to be given.
    if plain not in NAMED:
        file = "" if num_images else _media_file(value)
        return (
            file and f"{name} names {file}, but the row has no image; write it under 'image' with <image> in the text"
        )
    if plain in FILM_OR_SOUND:
        return f"{name} holds {shown(value)}, and films and sound cannot be learnt; remove the row"
    # A list that only repeats the row's images, maybe by other paths, is left alone.
    if plain in PICTURES and not _are_given(value, row.get("image")):
        return f"{name} holds pictures, expected under 'image'; rename it, and write one <image> for each"
    if plain in PICTURE and not num_images:
        return f"{name} holds a picture, expected under 'image'; rename it, and write <image> where it belongs"
    if plain in DIALOGUE and isinstance(value, list) and row.get("conversations") != value:
        other = next((field for field in ("conversations", "prompt") if field in used and field in row), "")
        return other and f"{name} is a second conversation beside {other!r}; keep one of them"
    if plain in HISTORY:
        return f"{name} holds earlier turns, expected under 'conversations'; write them there"
    if plain in SYSTEM:
        return f"{name} is not known; rename it to 'system'"
    if plain in TOOLS:
        return f"{name} names tools, which no template can write; remove the row"
    if plain in PREFERENCE and key not in used:
        return _preference_fault(name, used)
    if plain == LABEL and isinstance(value, bool):  # of answers to like or dislike; other labels name a class
        return f"{name} says whether the answer is good, but every answer is learnt; remove the key or the row"
    if plain in LEARNING and not _is_neutral(plain, value, is_answer=True):
        return f"{name} is {shown(value)}; {LEARNT_ANYWAY}"
    return ""


def _preference_fault(name: str, used: frozenset[str]) -> str:
    if "rejected" in used:
        return f"{name} is not known; pairs have the keys 'chosen' and 'rejected'"
    return f"{name} belongs to preference data; train on it with sicog dpo (launch/train_dpo.py), or remove the key"


def _is_weight(value: object) -> bool:
    """Whether a value is a number that losses can be multiplied by."""
    return isinstance(value, int | float) and not isinstance(value, bool) and LEAST_WEIGHT <= value <= MOST_WEIGHT


def _is_neutral(plain: str, value: object, is_answer: bool) -> bool:
    """Whether a control key asks for what is done anyway: answers are learnt, nothing else."""
    if plain in ("mask", "weight") and not all(isinstance(number, int | float) for number in _elements(value)):
        return True  # the outline of an object, or what a thing weighs: not about learning
    wanted = LEARNING[plain]
    return wanted is not None and value == (wanted if is_answer else 1 - wanted)


def _are_given(pictures: object, image: object) -> bool:
    """Whether a second list names no other pictures than the field ``image``, at most by other paths."""
    names, given = ([_base(path) for path in _elements(value)] for value in (pictures, image))
    return names == given


def _base(path: object) -> object:
    return re.split(r"[/\\]", path)[-1] if isinstance(path, str) else path


def _media_file(value: object) -> str:
    """The first file of a picture, a film or sound that a value names."""
    if not isinstance(value, str | list):
        return ""
    found = (text for text in _elements(value) if isinstance(text, str) and len(text) < 5000)
    return next((shown(text) for text in found if MEDIA_FILE.fullmatch(text)), "")


def _elements(value: object) -> Iterator[object]:
    yield from value[:MAX_LOOKED_AT] if isinstance(value, list) else [value]


def _plain(key: str) -> str:
    return NO_LETTERS.sub("", key[:MAX_KEY_CHARS]).lower()
