"""Sorts the keys of a row that its reader does not use: harmless, unknown, or with content that would be lost silently.

In: a row, the keys that are used   Out: UnreadKeys; counts for the user
Next: generation/items.py, annotation/annotated_rows.py
A picture, film or sound that is not read is known by its key (`images`, `img_path`, `video`), by its value (`cat.jpg`,
`data:image/...`), or by a tag in the text (`<img>`, `<video>`), so that no list of keys has to be complete.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sicog_mcore.data.rows import BuildSample, JsonRow
from sicog_mcore.data.sample import IMAGE_PLACEHOLDER, ImageRef, Sample
from sicog_mcore.errors import SampleError

# Words of a key that name a picture, and those that name what nothing here can read.
PICTURES = frozenset(
    "image images img imgs picture pictures pic pics photo photos figure figures jpg jpeg png webp pixels".split()
)
FILMS = frozenset(
    "video videos audio audios sound sounds speech clip clips frame frames gif mp4 wav mp3 depth pdf".split()
)
# Words of a key that is about a picture without being one.
ABOUT = frozenset(
    "width height size sizes w h shape id ids hash sha256 md5 phash num number count total has is format mode ratio "
    "aspect source sources dataset license author date caption captions label labels description tokens type class "
    "category score similarity aesthetic origin".split()
)
# Keys that hold a part of what is asked, or that say how a row is to be learnt.
MEANING = frozenset(
    "question questions query queries instruction instructions input inputs prompt prompts problem text message "
    "messages conversation dialog dialogue dialogs history context contexts passage lecture hint hints choices options "
    "choice option candidates a b c d e system system_prompt system_message tools functions few_shot".split()
)
CONTROL = frozenset(
    "loss loss_mask loss_weight losses weight weights sample_weight mask masks train train_on ignore no_loss".split()
)
# Keys that change nothing about what is asked: origin, size, kind and number of a row, and labels.
IRRELEVANT = frozenset(
    "id ids uid uuid idx index row_id item_id sample_id question_id qid pid key source sources data_source dataset "
    "dataset_name dataset_id origin url urls link page license licence author split subset fold date time timestamp "
    "created_at version model model_name generator annotator annotation_source caption_source width height size sizes "
    "length num_tokens token_count n_tokens category categories subcategory sub_category type task tasks task_type tag "
    "tags topic subject domain field grade skill skills difficulty level language lang locale name title file_name "
    "filename path file metadata meta extra info comment comments notes note status score scores rating quality "
    "similarity aesthetic nsfw safe punsafe pwatermark watermark hash md5 sha256 answer answers answer_type "
    "multiple_choice_answer direct_answers correct_choice_idx ground_truth gt gold label labels target targets output "
    "outputs response responses solution explanation rationale caption captions description reference references "
    "chosen rejected record form objects bbox bboxes boxes".split()
)
TURN_KEYS = frozenset(("from", "role", "value", "content"))
OWN_ORIGIN = frozenset(("record", "form", "prompt"))  # what curation writes into each of its rows

FILM_TAG = re.compile(
    r"<\|?/?(?:video|audio|speech|sound)(?:[_ ]?\d+|_pad|_start|_end)?\|?>|<(?:video|audio)\s[^<>]*>", re.I
)
PICTURE_TAG = re.compile(
    r"<\|?/?(?:image|img|picture|photo|vision|imagehere|image_placeholder)(?:[_ ]?\d+|_pad|_start|_end|_token)?\|?>"
    r"|<img\s[^<>]*>|\[(?:img|image)(?:[_ ]?\d+)?\]",
    re.I,
)
MEDIA_VALUE = re.compile(
    r"data:(?:image|video|audio)/|[^\n]*\.(?:jpe?g|png|webp|gif|bmp|tiff?|avif|heic|svg|mp4|avi|mov|mkv|webm|wav|mp3|flac|"
    r"npy|pdf)(?:[?#][^\s]*)?$",
    re.I,
)
LONGEST_PATH = 1024
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+")
SHOWN = 8


@dataclass(frozen=True)
class UnreadKeys:
    """The keys of a row besides those that are used; keys whose value is empty say nothing and are left out.

    Attributes:
        media: keys with a picture, film or sound that is not the row's image.
        meaning: keys with a part of the question, or with a system prompt.
        control: keys that say how the row is to be learnt.
        unknown: all others that are not known to be irrelevant.
    """

    media: tuple[str, ...] = ()
    meaning: tuple[str, ...] = ()
    control: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


def unread_keys(row: JsonRow, used: Collection[str]) -> UnreadKeys:
    """Sorts the keys of a row that its reader does not use.

    Args:
        used: keys that the reader uses; "image" is taken for the place of the row's pictures.
    """
    pictures = [value for value in _leaves(row.get("image")) if isinstance(value, str) and value.strip()]
    found: dict[str, list[str]] = {"media": [], "meaning": [], "control": [], "unknown": []}
    is_ours = row.keys() >= OWN_ORIGIN
    for key, value in row.items():
        if key in used or is_blank(value) or (is_ours and key in OWN_ORIGIN):
            continue
        # Fields of turns are judged by their last part.
        name = key.rpartition(".")[2].strip().lower().replace("-", "_")
        if _is_media(key, value, pictures):
            found["media"].append(key)
        elif name in MEANING:
            found["meaning"].append(key)
        elif name in CONTROL:
            found["control"].append(key)
        elif name not in IRRELEVANT and not _words(key) & (PICTURES | FILMS):
            found["unknown"].append(key)
    return UnreadKeys(**{name: tuple(keys) for name, keys in found.items()})


def turn_fields(turns: Iterable[object]) -> JsonRow:
    """Gives the fields of turns besides speaker and text as fields of the row, with names like "conversations.image"."""
    found: JsonRow = {}
    for turn in turns:
        for key, value in turn.items() if isinstance(turn, dict) else ():
            if key not in TURN_KEYS:
                found.setdefault(f"conversations.{key}", []).append(value)
    return found


def unread_media(keys: Sequence[str], text: str, num_images: int) -> SampleError | None:
    """Gives the error of a row that brings, or speaks of, a picture, film or sound which is not read; None without one.

    Args:
        keys: ``media`` of the row's unread keys.
        text: of the row's questions; a tag in it stands for something that is shown.
        num_images: that the row brings under "image".
    """
    tags = [match[0] for pattern in (FILM_TAG, PICTURE_TAG) for match in pattern.finditer(text)]
    tags = list(dict.fromkeys(tag for tag in tags if tag != IMAGE_PLACEHOLDER or not num_images))
    if not keys and not tags:
        return None
    found = [f"the key{'s' if len(keys) > 1 else ''} {', '.join(map(repr, keys))}"] if keys else []
    found += [f"{', '.join(tags)} in the text"] if tags else []
    fix = "only 'image' is read: put the path of a picture there, or remove the row"
    reason, own = ("media_unread", "besides its image") if num_images else ("no_image", "and no image")
    return SampleError(reason, f"the row has {' and '.join(found):.300} {own}; {fix}")


def is_blank(value: object) -> bool:
    """Whether a value says nothing: null, blank text, or a list or object of nothing else."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Mapping):
        return all(map(is_blank, value.values()))
    return value is None or (isinstance(value, list) and all(map(is_blank, value)))


class KeyCounter:
    """Counts keys that are not read and are not known to be irrelevant, and remembers where each stood first."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, keys: Iterable[str], origin: str) -> None:
        for key in keys:
            self._counts[key] += 1
            self._first.setdefault(key, origin)

    def watch(self, build: BuildSample, used: Collection[str]) -> BuildSample:
        """Wraps a builder of Samples, so that the keys of every row are counted."""

        def watched(row: JsonRow, images: Sequence[ImageRef], fallback_id: str, origin: str) -> Sample:
            unread = unread_keys(row, used)
            self.add((*unread.media, *unread.meaning, *unread.control, *unread.unknown), origin)
            return build(row, images, fallback_id, origin)

        return watched

    def lines(self) -> Iterator[str]:
        """One line for each key, most frequent first."""
        for key, count in self._counts.most_common(SHOWN):
            rows = "row" if count == 1 else "rows"
            yield f"key {key!r:.80} is not read: {count:,} {rows}, first {self._first[key]}"
        if (more := len(self._counts) - SHOWN) > 0:
            yield f"and {more} other keys that are not read"


def _is_media(key: str, value: object, pictures: Sequence[str]) -> bool:
    """Whether a key holds a picture, film or sound that is none of the row's pictures.

    Without pictures every trace of one counts, even its size; beside pictures a key may repeat them, or say where they
    came from.
    """
    words = _words(key)
    values = [leaf for leaf in _leaves(value) if leaf not in (0, False)]
    is_about = bool(words & ABOUT)
    if not values or (words & FILMS and is_about):
        return False
    if words & FILMS:
        return True
    # Only short texts can be paths; a data URI may have any length.
    looks = any(isinstance(leaf, str) and len(leaf) <= LONGEST_PATH and MEDIA_VALUE.match(leaf) for leaf in values)
    data = any(isinstance(leaf, str) and leaf[:5].lower() == "data:" and MEDIA_VALUE.match(leaf) for leaf in values)
    # A row without pictures asks about one that is missed, so a mere trace of one counts.
    if not pictures:
        return bool(looks or data or words & PICTURES)
    if not words & PICTURES or is_about:
        return False
    names = [leaf for leaf in values if isinstance(leaf, str)]
    # Beside the row's own pictures, a second list may name them once more, or the addresses they came from.
    repeats = bool(names) and all(any(_is_same(leaf, picture) for picture in pictures) for leaf in names)
    are_origins = len(values) <= len(pictures) and all("://" in leaf for leaf in names) and len(names) == len(values)
    return not repeats and not are_origins


def _leaves(value: object) -> Iterator[object]:
    """The values inside lists and objects."""
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif value is not None:
        yield value


def _is_same(one: str, other: str) -> bool:
    """Whether two paths name one file, seen from different folders."""
    return f"/{one}".endswith(f"/{other}") or f"/{other}".endswith(f"/{one}")


def _words(key: str) -> set[str]:
    """The words of a key in lower case: "imgPath", "img_path" and "IMG PATH" alike."""
    return {word.lower() for word in WORD.findall(key)}
