"""Every key of a row and of its turns is used, known not to matter, reported, or refused by name: one table says which."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sicog_mcore.config import DataConfig, SourceConfig
from sicog_mcore.data.pairs import build_pair
from sicog_mcore.data.row_keys import IGNORED, IGNORED_BESIDE_IMAGE, IGNORED_IN_TURNS, WEIGHT
from sicog_mcore.data.rows import build_sample
from sicog_mcore.data.sample import Turn
from sicog_mcore.data.sources import SampleIndex, open_sources
from sicog_mcore.errors import SampleError

USED, IRRELEVANT, REPORTED, REFUSED = "used", "irrelevant", "reported", "refused"
TEXT = [{"from": "human", "value": "What colour?"}, {"from": "gpt", "value": "Blue."}]
SEEN = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "Blue."}]
MANY_KEYS = 30_000


def _open(folder: Path, *rows: dict[str, Any] | bytes, pairs: bool = False) -> SampleIndex:
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (folder / "a.png").touch()
    source = SourceConfig(path=str(folder / "rows.jsonl"), images=str(folder))
    return open_sources([source], DataConfig(), build_pair if pairs else build_sample)


def _refusal(index: SampleIndex, row: int = 0) -> SampleError:
    with pytest.raises(SampleError) as raised:
        index.read(row)
    return raised.value


def _fate(index: SampleIndex, key: str) -> str:
    """What becomes of a key of the only row; a refusal must name it, both at the start and when the row is read."""
    try:
        index.read(0)
    except SampleError as error:
        assert error.reason == "key_unsupported" and repr(key) in error.detail, error
        [note] = index.notes
        assert note.startswith("refused: ") and repr(key) in note and note.endswith("rows.jsonl:1"), note
        return REFUSED
    if key == WEIGHT and any("multiplied" in note for note in index.notes):  # it is used
        assert index.notes[0].startswith(f"losses are multiplied by the row's key {key!r}") and len(index.notes) == 1
        return USED
    assert not index.notes or index.notes[0].startswith(f"key {key!r}") and len(index.notes) == 1, index.notes
    return REPORTED if index.notes else IRRELEVANT


# key and value, in a row without an image, and in a row with one
TABLE: tuple[tuple[str, object, str, str], ...] = (
    *((key, "x", IRRELEVANT, IRRELEVANT) for key in sorted(IGNORED)),
    *((key, "x", REFUSED, IRRELEVANT) for key in ("image_id", "image_url", "image_name", "img_id")),
    *((key, "a.jpg", REFUSED, IRRELEVANT) for key in ("file_name", "filename", "coco_url", "flickr_url")),
    # Pictures under other names: beside an image of its own the row loses nothing by a path or an address.
    *(
        (key, "a.png", REFUSED, REPORTED)
        for key in ("image_path", "img", "Image_Path", "imagePath", "image-file", "pic")
    ),
    *((key, [[0.5]], REFUSED, REPORTED) for key in ("pixel_values", "pixels")),
    *((key, ["b.png"], REFUSED, REFUSED) for key in ("images", "image_paths", "pictures", "IMAGES", "imgs", "frames")),
    ("images", ["sub/a.png"], REFUSED, REPORTED),  # the same picture by another path
    ("images", ["a.png", "b.png"], REFUSED, REFUSED),
    *((key, "", IRRELEVANT, IRRELEVANT) for key in ("images", "video", "tools", "system_prompt", "foo")),
    *((key, [], IRRELEVANT, IRRELEVANT) for key in ("images", "videos", "history", "messages")),
    *((key, None, IRRELEVANT, IRRELEVANT) for key in ("image_path", "audio", "loss", "weight", "objects")),
    ("tools", "[]", IRRELEVANT, IRRELEVANT),
    *(
        (key, "a.mp4", REFUSED, REFUSED)
        for key in ("video", "videos", "audio", "Video", "video_path", "speech", "sound")
    ),
    # Anything that names a picture, if the row has none.
    ("shot", "x/1.JPG", REFUSED, REPORTED),
    ("visual", ["a.webp", "b.webp"], REFUSED, REPORTED),
    ("clip", "a.webm", REFUSED, REPORTED),
    # What decides what is learnt.
    ("loss", False, REFUSED, REFUSED),
    ("loss", True, IRRELEVANT + "?", IRRELEVANT + "?"),
    ("loss_mask", [0, 1], REFUSED, REFUSED),
    ("weight", 1, IRRELEVANT, IRRELEVANT),
    *(("weight", value, USED, USED) for value in (0.5, 70, 1e-6, 1e6)),
    *(
        ("weight", value, REFUSED, REFUSED)
        for value in (0, -1, True, "0.5", "70 kg", [0.5], {"a": 1}, 1e-7, 1e7, 10**400)
    ),
    ("weights", [1, 2], REFUSED, REFUSED),
    ("mask", 1, REFUSED, REFUSED),
    ("mask", [0, 1, 1], REFUSED, REFUSED),
    ("mask", {"size": [4, 4], "counts": "x"}, REPORTED, REPORTED),
    ("mask", [[1, 2, 3]], REPORTED, REPORTED),
    ("train_on", "last", REFUSED, REFUSED),
    ("train_on_inputs", True, REFUSED, REFUSED),
    ("mask_history", 1, REFUSED, REFUSED),
    ("tools", [{"name": "f"}], REFUSED, REFUSED),
    ("functions", '[{"name": "f"}]', REFUSED, REFUSED),
    ("history", [["q", "a"]], REFUSED, REFUSED),
    ("messages", [{"role": "user", "content": "q"}], REFUSED, REFUSED),
    ("kto_tag", False, REFUSED, REFUSED),
    ("label", True, REFUSED, REFUSED),
    ("label", "cat", REPORTED, REPORTED),
    ("chosen", "a", REFUSED, REFUSED),
    ("rejected", {"from": "gpt", "value": "b"}, REFUSED, REFUSED),
    ("rejected_response", "b", REFUSED, REFUSED),
    ("system_prompt", "Be brief.", REFUSED, REFUSED),
    ("System", "Be brief.", REFUSED, REFUSED),
    ("Conversations", TEXT[:1], REFUSED, REFUSED),
    ("Image", "b.png", REFUSED, REFUSED),
    # What a conversation was made of, and what nobody knows.
    *((key, "x", REPORTED, REPORTED) for key in ("instruction", "input", "output", "query", "response", "completion")),
    *((key, "x", REPORTED, REPORTED) for key in ("prompt", "question", "answer", "caption", "text", "foo", "imgae")),
    *((key, 3, REPORTED, REPORTED) for key in ("turns", "objects", "bbox")),
)


@pytest.mark.parametrize(("key", "value", "without", "with_image"), TABLE)
def test_every_key_has_its_fate(tmp_path: Path, key: str, value: object, without: str, with_image: str) -> None:
    rows: tuple[tuple[dict[str, Any], str], ...] = (
        ({"id": "r", "conversations": TEXT}, without),
        ({"id": "r", "image": "a.png", "conversations": SEEN}, with_image),
    )
    for row, expected in rows:
        fate = _fate(_open(tmp_path, row | {key: value}), key)
        assert fate == expected if not expected.endswith("?") else fate != REFUSED, row


TURN_TABLE: tuple[tuple[str, object, str, str], ...] = (  # of the user's turn, and of the assistant's
    *((key, "x", IRRELEVANT, IRRELEVANT) for key in sorted(IGNORED_IN_TURNS)),
    ("loss", False, REPORTED, REFUSED),
    ("loss", True, REFUSED, REPORTED),
    ("weight", 0, REPORTED, REFUSED),
    ("weight", 0.5, REFUSED, REFUSED),
    ("mask", 1, REPORTED, REFUSED),
    ("train", False, REPORTED, REFUSED),
    ("loss_weight", 2, REFUSED, REFUSED),
    *((key, ["b.png"], REFUSED, REFUSED) for key in ("images", "image_url", "video", "Audios")),
    ("tool_calls", [{"name": "f"}], REFUSED, REFUSED),
    ("function_call", {"name": "f"}, REFUSED, REFUSED),
    ("reasoning_content", "because", REFUSED, REFUSED),
    ("thinking", "because", REFUSED, REFUSED),
    ("tool_calls", None, IRRELEVANT, IRRELEVANT),
    ("name", "Ann", REPORTED, REPORTED),
    ("end_turn", True, REPORTED, REPORTED),
)


@pytest.mark.parametrize(("key", "value", "of_user", "of_assistant"), TURN_TABLE)
def test_every_key_of_a_turn_has_its_fate(
    tmp_path: Path, key: str, value: object, of_user: str, of_assistant: str
) -> None:
    for changed, expected in ((0, of_user), (1, of_assistant)):
        turns = [{**turn, **({key: value} if number == changed else {})} for number, turn in enumerate(TEXT)]
        assert _fate(_open(tmp_path, {"id": "r", "conversations": turns}), key) == expected


def test_notes_have_the_number_of_rows_and_the_first_place(tmp_path: Path) -> None:
    rows = [{"id": str(n), "conversations": TEXT, **({"foo": n} if n % 2 else {})} for n in range(1200, 3660)]
    rows[7]["Imagge"] = rows[9]["Imagge"] = "x"
    assert _open(tmp_path, *rows).notes == (
        f"key 'foo' is not used: 1,230 rows, first at {tmp_path}/rows.jsonl:2",
        f"key 'Imagge' is not used (did you mean 'image'?): 2 rows, first at {tmp_path}/rows.jsonl:8",
    )


def test_rows_that_curation_wrote_need_no_note(tmp_path: Path) -> None:
    row = {"id": "a#direct", "conversations": TEXT, "record": "a", "form": "plain", "prompt": "direct"}
    assert _open(tmp_path, row).notes == ()
    (note,) = _open(tmp_path, {key: value for key, value in row.items() if key != "record"}).notes
    assert "'prompt'" in note


def test_notes_stay_short_and_printable(tmp_path: Path) -> None:
    rows = [{"id": str(n), "conversations": TEXT, f"\x1b[2J{n}\u202e": 1, f"v{n}": "a.png"} for n in range(1500)]
    index = _open(tmp_path, *rows)
    assert len(index.notes) <= 20 and all(note.isprintable() and len(note) < 600 for note in index.notes)
    assert sum("\\x1b[2J" in note for note in index.notes) >= 5
    assert sum(" more of this kind, the most frequent of them: " in note for note in index.notes) == 2


def test_a_row_of_very_many_keys_costs_little(tmp_path: Path) -> None:
    keys = {f"k{n}": n for n in range(MANY_KEYS)}
    row = json.dumps({"id": "r", "conversations": [{**TEXT[0], **keys}, TEXT[1]], **keys}).encode()
    assert len(row) > 2**19
    parsed = json.loads(row)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    json.loads(row)
    parsing = time.process_time() - started
    del parsed
    started = time.process_time()
    index = _open(tmp_path, row)
    assert time.process_time() - started < 10 * parsing + 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
    assert len(index.notes) < 20 and len("".join(index.notes)) < 5000
    assert index.read(0).id == "r"
    missing = _open(tmp_path, json.dumps(keys).encode())
    assert len(_refusal(missing).detail) < 1000


SYSTEM = {"from": "system", "value": "Be brief."}


def test_system_is_the_system_turn(tmp_path: Path) -> None:
    index = _open(tmp_path, {"conversations": TEXT, "system": "Be brief."}, {"conversations": TEXT, "system": ""})
    assert index.notes == () and index.read(1).turns[0].role == "user"
    assert index.read(0).turns == (
        Turn("system", "Be brief."),
        Turn("user", "What colour?"),
        Turn("assistant", "Blue."),
    )
    index = _open(tmp_path, {"conversations": [SYSTEM, *TEXT], "system": "Be brief."})
    assert [turn.role for turn in index.read(0).turns] == ["system", "user", "assistant"]
    assert (
        _refusal(_open(tmp_path, {"conversations": [SYSTEM, *TEXT], "system": "Be long."})).reason == "system_ambiguous"
    )
    assert _refusal(_open(tmp_path, {"conversations": TEXT, "system": ["Be brief."]})).reason == "field_type"
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "system": "Be brief."}
    assert _open(tmp_path, pair, pairs=True).read(0).turns[0] == Turn("system", "Be brief.")


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        (
            {"messages": TEXT, "images": ["a.png"]},
            "rename 'messages' to 'conversations'; the key 'images' holds pictures",
        ),
        ({"conversation": TEXT}, "rename 'conversation' to 'conversations'"),
        ({"Conversations": TEXT}, "rename 'Conversations' to 'conversations'"),
        ({"converstaions": TEXT}, "rename 'converstaions' to 'conversations'"),
        ({"instruction": "q", "input": "", "output": "a"}, "write 'instruction' and 'input' and 'output' as turns"),
        ({"query": "q", "response": "a", "history": [["x", "y"]]}, "write 'query' and 'response' as turns"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "train on it with sicog dpo (launch/train_dpo.py)"),
    ],
)
def test_row_in_another_form_is_told_what_to_rename(tmp_path: Path, row: dict[str, Any], hint: str) -> None:
    index = _open(tmp_path, row)
    error = _refusal(index)
    assert error.reason == "field_missing" and hint in error.detail
    assert any(note.startswith("refused: no key 'conversations'") for note in index.notes)


def test_pair_in_another_form_is_told_what_to_rename(tmp_path: Path) -> None:
    rows = (
        {"conversations": TEXT[:1], "chosen": "a", "rejected_response": "b"},
        {"question": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "b", "images": ["a.png"]},
        {"prompt": "q", "chosen": "a", "rejected": "b", "messages": TEXT},
    )
    index = _open(tmp_path, *rows, pairs=True)
    found = [str(_refusal(index, row)) for row in range(5)]
    assert "rename 'rejected_response' to 'rejected'" in found[0]
    assert "rename 'question' to 'prompt'" in found[1]
    assert found[2].startswith("field_type: prompt is [") and "write turns under 'conversations'" in found[2]
    assert found[3].startswith("key_unsupported: the key 'images' holds pictures")
    assert "'messages' is a second conversation beside 'prompt'" in found[4]


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"from": "human", "role": "user", "value": "q"}, ""),
        ({"from": "human", "value": "q", "content": "q"}, ""),
        ({"from": "human", "role": "assistant", "value": "q"}, "key_unsupported"),
        ({"from": "human", "value": "q", "content": "other"}, "key_unsupported"),
        ({"speaker": "human", "value": "q"}, "field_missing"),
        ({"from": "human", "text": "q"}, "field_missing"),
        ({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}, "field_type"),
    ],
)
def test_turn_says_who_speaks_and_what_once(tmp_path: Path, turn: dict[str, Any], reason: str) -> None:
    index = _open(tmp_path, {"conversations": [turn, TEXT[1]]})
    if not reason:
        assert index.read(0).turns[0] == Turn("user", "q")
        return
    error = _refusal(index)
    assert error.reason == reason
    hints = {"speaker": "rename 'speaker' to 'from'", "text": "rename 'text' to 'value'", "content": ""}
    assert all(hint in error.detail for key, hint in hints.items() if key in turn)


@pytest.mark.parametrize(
    ("raw", "reason", "said"),
    [
        (b'{"image": "a.png", "image": "b.png"}', "key_repeated", "'image' stands twice"),
        (b'{"conversations": [{"from": "human", "from": "gpt"}]}', "key_repeated", "'from' stands twice"),
        (b'{"x": {"y": 1, "y": 1}}', "key_repeated", "'y' stands twice"),
        (b'{"score": NaN}', "json_invalid", "NaN is no JSON; write null"),
        (b'{"x": [Infinity]}', "json_invalid", "Infinity is no JSON"),
        (b'{"x": -Infinity}', "json_invalid", "-Infinity is no JSON"),
    ],
)
def test_ambiguous_json_is_refused(tmp_path: Path, raw: bytes, reason: str, said: str) -> None:
    error = _refusal(_open(tmp_path, raw))
    assert error.reason == reason and said in error.detail


@pytest.mark.parametrize(
    ("image", "images", "reason"),
    [("", 0, ""), ("  ", 0, ""), (None, 0, ""), ([], 0, ""), ("", 1, "image_count_mismatch")]
    + [
        (["a.png"] * 4097, 4097, "image_count_mismatch"),
        ([""], 0, "field_type"),
        (["a.png", " "], 2, "field_type"),
        ({"path": "a.png"}, 1, "field_type"),
    ],
)
def test_empty_path_is_no_image(tmp_path: Path, image: object, images: int, reason: str) -> None:
    turns = [{"from": "human", "value": "<image>" * images + "q"}, TEXT[1]]
    index = _open(tmp_path, {"image": image, "conversations": turns})
    if reason:
        assert _refusal(index).reason == reason
    else:
        assert index.read(0).images == () and index.notes == ()


KEYS = st.sampled_from(
    ["id", "image", "images", "Image", "conversations", "messages", "system", "prompt", "chosen", "rejected", "video"]
    + [
        "loss",
        "mask",
        "label",
        "weight",
        "history",
        "tools",
        "from",
        "value",
        "role",
        "content",
        "x.png",
        "\x1b",
        "\ud800",
    ]
)
LEAVES = (
    st.none() | st.booleans() | st.integers(-1, 2) | st.sampled_from(["", "a.png", "gpt", "human", "<video>", "\ud800"])
)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(row=st.dictionaries(KEYS, VALUES, max_size=6), pairs=st.booleans())
def test_any_row_is_read_or_refused_and_said_in_printable_lines(
    tmp_path: Path, row: dict[str, Any], pairs: bool
) -> None:
    index = _open(tmp_path, row, pairs=pairs)
    assert all(note.isprintable() for note in index.notes)
    try:
        index.read(0)
    except SampleError as error:
        assert error.detail.isprintable() and len(error.detail) < 2000
        return
    assert not any(note.startswith("refused") for note in index.notes)


def test_tables_name_no_key_twice() -> None:
    assert not IGNORED & IGNORED_BESIDE_IMAGE and not IGNORED & {"image", "conversations", "system"}
