"""A row becomes a Sample only if every field, turn, placeholder and path is what it should be."""

from __future__ import annotations

from pathlib import Path

import pytest

from sicog_mcore.data.rows import build_sample, image_paths, is_unsafe_path, locate_image, parse_row
from sicog_mcore.data.sample import ImageRef, Sample, Turn
from sicog_mcore.errors import SampleError

ANSWER = {"from": "gpt", "value": "That."}
IMAGE = ImageRef("/data/a.png")


def _build(*turns: dict[str, object], images: int = 0, **fields: object) -> Sample:
    return build_sample({"conversations": list(turns), **fields}, [IMAGE] * images, "rows-0", "rows.jsonl:1")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("<image>\nWhat?", "<image>\nWhat?"),
        ("<image>What?", "<image>What?"),
        ("What? <image>", "<image>\nWhat?"),
        ("Here\n<image>\nis one", "<image>\nHere\n\nis one"),
    ],
)
def test_single_image_is_moved_to_the_start_of_its_turn(written: str, read: str) -> None:
    assert _build({"from": "human", "value": written}, ANSWER, images=1).turns[0].text == read


def test_several_images_keep_their_places() -> None:
    text = "First <image> then <image>"
    sample = _build({"from": "human", "value": text}, ANSWER, images=2)
    assert sample.turns[0].text == text and sample.images == (IMAGE, IMAGE)


def test_both_spellings_of_roles_mean_the_same() -> None:
    llava = _build({"from": "system", "value": "s"}, {"from": "human", "value": "q"}, ANSWER)
    messages = [("system", "s"), ("user", "q"), ("assistant", "That.")]
    assert llava == _build(*({"role": role, "content": text} for role, text in messages))
    assert llava.turns == (Turn("system", "s"), Turn("user", "q"), Turn("assistant", "That."))


@pytest.mark.parametrize(("given", "expected"), [("x", "x"), (7, "7"), (None, "rows-0"), ("", "rows-0")])
def test_id_is_a_text_or_a_number_or_made_from_the_row(given: object, expected: str) -> None:
    assert _build({"from": "human", "value": "q"}, ANSWER, id=given).id == expected


@pytest.mark.parametrize("given", [True, 1.5, ["x"]])
def test_other_ids_are_refused(given: object) -> None:
    with pytest.raises(SampleError, match="field_type: id is"):
        _build({"from": "human", "value": "q"}, ANSWER, id=given)


def test_messages_say_what_was_found_and_what_was_expected() -> None:
    with pytest.raises(SampleError) as raised:
        _build({"from": "human", "value": "<image> <image>"}, ANSWER, images=1)
    assert str(raised.value) == (
        "image_count_mismatch: found 2 <image> in user turns and 0 in the system turn for 1 images; write one per image"
    )
    with pytest.raises(SampleError, match=r"json_invalid: Expecting .* column 8 .*; repair or remove the row"):
        parse_row(b'{"id": }')


def test_image_field_is_a_path_a_list_or_absent() -> None:
    rows = ({}, {"image": None}, {"image": "a"}, {"image": ["a", "b"]})
    assert [image_paths(row) for row in rows] == [[], [], ["a"], ["a", "b"]]


@pytest.mark.parametrize(
    "path", ["/a", "//h/a", "..", "a/../b", "a\\..\\b", "C:/a", "c:a", "a\0", "file:a", "s3://b/a"]
)
def test_path_that_may_leave_the_folder_is_unsafe(path: str) -> None:
    assert is_unsafe_path(path)


@pytest.mark.parametrize("path", ["a", "./a", "a/b.jpg", "a..b", "..a", "a b/ü.png", "12:30.png"])
def test_ordinary_path_is_safe(path: str) -> None:
    assert not is_unsafe_path(path)


def test_link_is_followed_inside_the_folder_only(tmp_path: Path) -> None:
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    (root / "inside.png").symlink_to(root / "sub" / "a.png")
    (root / "outside").symlink_to(tmp_path)
    (tmp_path / "images-2").mkdir()
    (root / "sibling").symlink_to(tmp_path / "images-2")
    assert locate_image("inside.png", str(root)) == ImageRef(str(root / "sub" / "a.png"))
    for path in ("outside/a.png", "sibling/a.png"):
        with pytest.raises(SampleError, match="image_path_unsafe"):
            locate_image(path, str(root))


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " \n\t",
        "\u200b\u200b",
        "\ufeff",
        "\u2060 \u200d",
        "\xad",
        "\u202e\u202c",
        "\u3164",
        "\u2800",
        "\ufe0f",
        "\U000e0041",
    ],
)
def test_answer_that_shows_nothing_is_empty(answer: str) -> None:
    with pytest.raises(SampleError, match="answer_empty: turn 1 has no text to learn"):
        _build({"from": "human", "value": "q"}, {"from": "gpt", "value": answer})


@pytest.mark.parametrize("answer", [".", "0", "\u200b1", "é", "e\u0301", "是", "👍", "👨\u200d👩", "\ue000", "क्"])
def test_answer_of_one_sign_is_an_answer(answer: str) -> None:
    assert _build({"from": "human", "value": "q"}, {"from": "gpt", "value": answer}).turns[1].text == answer
