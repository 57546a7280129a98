from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sicog_mcore import presets
from sicog_mcore.data.batch import IGNORED_LABEL
from sicog_mcore.data.collate import collate
from sicog_mcore.data.encode import Encoder
from sicog_mcore.data.sample import ImageRef, Sample, Turn
from sicog_mcore.errors import SampleError
from tests.builders import data_config, write_image

MODEL = presets.tiny().model
SIZES = ((64, 64), (112, 112), (113, 112), (240, 240), (300, 140), (80, 400), (90, 130), (1, 150), (500, 500))
PAD, END = 0, 2


def image(folder: Path, height: int, width: int) -> ImageRef:
    path = folder / f"{height}x{width}.png"
    write_image(path, height, width, seed=height)
    return ImageRef(str(path))


def sample(*images: ImageRef, answer: str = "The circle is red.") -> Sample:
    question = "<image>\n" * len(images) + "What color is it?"
    return Sample("s", "data.jsonl:1", (Turn("user", question), Turn("assistant", answer)), images)


@pytest.mark.parametrize("layout", ["stitched", "per_slice"])
@pytest.mark.parametrize("template", ["chatml", "llama3", "plain"])
def test_measured_length_is_the_encoded_length(tmp_path: Path, layout: str, template: str) -> None:
    slicing = replace(MODEL.slicing, layout=layout)
    encoder = Encoder(replace(MODEL, slicing=slicing), data_config(template=template, token_budget=8192))
    images = [image(tmp_path, *size) for size in SIZES]
    for shown in ([], [images[0]], images[1:3], images[3:6], images[:1] * 3, images[6:]):
        row = sample(*shown)
        measured, encoded = encoder.measure(row), encoder.encode(row)
        assert measured.num_tokens == len(encoded.tokens) == len(encoded.labels)
        assert measured.num_slices == len(encoded.grids)
        assert encoded.num_images == len(shown) and not measured.is_truncated
        limits = {"token_budget": 8192, "pad_id": PAD, "queries": 16, "patch_dim": MODEL.tower.patch_dim}
        collate([encoded, encoded], **limits)  # validates: every visual token once, grids cover the patches


def test_labels_are_the_next_supervised_token(tmp_path: Path) -> None:
    encoder = Encoder(MODEL, data_config())
    encoded = encoder.encode(sample(image(tmp_path, 240, 240)))
    tokens, labels = encoded.tokens.tolist(), encoded.labels.tolist()
    answer = encoder.chat.tokenizer.encode("The circle is red.")
    assert [label for label in labels if label != IGNORED_LABEL] == [*answer, END]
    assert all(label in (IGNORED_LABEL, after) for label, after in zip(labels, tokens[1:], strict=False))
    assert labels[-1] == IGNORED_LABEL


def test_visual_tokens_and_separators_stand_where_the_marker_was(tmp_path: Path) -> None:
    encoder = Encoder(MODEL, data_config())
    encoded = encoder.encode(sample(image(tmp_path, 112, 224)))  # 1 x 2 slices and the overview
    newline, comma = (encoder.chat.tokenizer.encode(text)[0] for text in ("\n", ","))
    start = int(encoded.image_slots[0])
    stitched = encoded.tokens[start : start + 4 * 9 + 1 + 16].tolist()
    assert stitched == ([PAD] * 8 + [newline]) * 4 + [comma] + [PAD] * 16
    assert encoded.visual_rows[:8].tolist() == [0, 1, 2, 3, 16, 17, 18, 19]  # a line crosses both slices
    assert torch.equal(encoded.tokens[encoded.image_slots], torch.full((48,), PAD))


def test_rows_of_a_second_image_follow_those_of_the_first(tmp_path: Path) -> None:
    encoder = Encoder(MODEL, data_config())
    encoded = encoder.encode(sample(image(tmp_path, 112, 224), image(tmp_path, 64, 64)))
    assert encoded.visual_rows[48:].tolist() == list(range(48, 64))
    assert encoded.grids.shape == (4, 2) and int(encoded.grids.prod(-1).sum()) == len(encoded.patches)


def test_text_only_sample_has_empty_visual_parts() -> None:
    encoded = Encoder(MODEL, data_config()).encode(sample())
    assert encoded.patches.shape == (0, 588) and encoded.grids.shape == (0, 2) and encoded.image_slots.numel() == 0


@pytest.mark.parametrize(
    ("limits", "reason", "detail"),
    [
        ({"token_budget": 60}, "too_long", "tokens, at most 60 fit"),
        ({"token_budget": 60, "too_long": "truncate"}, "too_long", "at most 60"),  # the image alone is longer
        ({"slice_budget": 2}, "too_many_slices", "3 slices, at most 2"),
    ],
)
def test_sample_over_a_budget_is_refused(tmp_path: Path, limits: dict[str, int], reason: str, detail: str) -> None:
    encoder = Encoder(MODEL, data_config(**limits))
    row = sample(image(tmp_path, 112, 224))
    for use in (encoder.measure, encoder.encode):
        with pytest.raises(SampleError, match=detail) as caught:
            use(row)
        assert caught.value.reason == reason


def test_truncation_cuts_the_end_of_the_last_answer_only(tmp_path: Path) -> None:
    row = sample(image(tmp_path, 64, 64), answer="The circle is red. " * 50)
    whole = Encoder(MODEL, data_config()).encode(row)
    encoder = Encoder(MODEL, data_config(token_budget=100, too_long="truncate"))
    cut = encoder.encode(row)
    assert encoder.measure(row) == replace(encoder.measure(row), num_tokens=100, is_truncated=True)
    assert torch.equal(cut.tokens, whole.tokens[:100]) and torch.equal(cut.labels[:99], whole.labels[:99])
    assert cut.labels[99] == IGNORED_LABEL and (cut.labels != IGNORED_LABEL).any()
    assert END not in cut.labels  # an answer that was cut does not teach to stop


def test_sample_without_an_answer_has_no_labels() -> None:
    encoder = Encoder(MODEL, data_config())
    with pytest.raises(SampleError, match="no_labels"):
        encoder.measure(Sample("s", "data.jsonl:1", (Turn("user", "Hello"),)))


def test_damaged_pixels_are_found_when_encoding(tmp_path: Path) -> None:
    ref = image(tmp_path, 240, 240)
    damaged = Path(ref.path).read_bytes()
    Path(ref.path).write_bytes(damaged[: len(damaged) // 2])
    encoder = Encoder(MODEL, data_config())
    assert encoder.measure(sample(ref)).num_slices > 1
    with pytest.raises(SampleError, match="image_truncated"):
        encoder.encode(sample(ref))


def test_prompt_is_the_sample_up_to_its_answer(tmp_path: Path) -> None:
    encoder = pickle.loads(pickle.dumps(Encoder(MODEL, data_config())))
    row = sample(image(tmp_path, 240, 240))
    prompt, whole = encoder.encode_prompt(row), encoder.encode(row)
    length = len(prompt.tokens)
    assert torch.equal(prompt.tokens, whole.tokens[:length]) and torch.equal(prompt.patches, whole.patches)
    assert (prompt.labels == IGNORED_LABEL).all()
    assert encoder.chat.decode(whole.tokens[length:].tolist()) == "The circle is red.\n"
