"""Every input of the zoo ends as expected: a reason code, or the right pixels."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable

import numpy as np
import pytest

from sicog_mcore.config import DataConfig, SourceConfig
from sicog_mcore.data.decode import decode_image, read_bytes, read_size
from sicog_mcore.data.sources import SampleIndex, open_sources
from sicog_mcore.errors import SampleError
from tests.data.zoo import IMAGES_FOLDER, OK, ROWS_FILE, ZooCase, build_zoo

LIMITS = DataConfig()


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> tuple[SampleIndex, dict[str, ZooCase]]:
    folder = tmp_path_factory.mktemp("zoo") / "data"
    cases = build_zoo(folder)
    source = SourceConfig(path=str(folder / ROWS_FILE), images=str(folder / IMAGES_FOLDER))
    return open_sources([source], LIMITS), {case.name: case for case in cases}


def _pixels(index: SampleIndex, row: int) -> list[np.ndarray]:
    """All that a loader does with a row before it is cut into slices."""
    encoded = [read_bytes(ref) for ref in index.read(row).images]
    sizes = [read_size(data, LIMITS) for data in encoded]
    images = [decode_image(data, LIMITS) for data in encoded]
    assert [image.shape[:2] for image in images] == sizes
    return images


def _outcome(index: SampleIndex, row: int) -> str:
    try:
        _pixels(index, row)
    except SampleError as error:
        assert error.detail and pickle.loads(pickle.dumps(error)).reason == error.reason
        return error.reason
    return OK


def test_every_input_has_its_outcome(zoo: tuple[SampleIndex, dict[str, ZooCase]]) -> None:
    index, cases = zoo
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {name: _outcome(index, case.row) for name, case in cases.items()}
    assert len(index) == len(cases)
    assert found == {name: case.expected for name, case in cases.items()}


def test_the_zoo_is_large_and_has_every_reason_once(zoo: tuple[SampleIndex, dict[str, ZooCase]]) -> None:
    reasons = [case.expected for case in zoo[1].values()]
    assert len(reasons) - reasons.count(OK) >= 40 and reasons.count(OK) >= 20
    assert set(reasons) - {OK} == {
        *("key_repeated", "key_unsupported", "system_ambiguous", "media_missing"),
        *("json_invalid", "not_utf8", "line_too_long", "field_missing", "field_type", "role_unknown", "turns_order"),
        *("answer_empty", "image_token_in_answer", "image_count_mismatch", "image_path_unsafe", "duplicate_id"),
        *("image_missing", "image_unreadable", "image_empty", "image_unidentified", "image_too_large", "image_aspect"),
        *("image_animated", "image_truncated", "image_corrupt"),
    }


def test_lines_are_numbered_as_an_editor_shows_them(zoo: tuple[SampleIndex, dict[str, ZooCase]]) -> None:
    index, cases = zoo
    assert index.origin(0).endswith(f"{ROWS_FILE}:1") and index.origin(5).endswith(f"{ROWS_FILE}:11")
    last = cases["good_after_all_that"]
    sample = index.read(last.row)
    assert sample.origin.endswith(f"{ROWS_FILE}:{2 * last.row + 1}") and sample.id == f"zoo-{last.row}"


def _is_gradient(image: np.ndarray) -> bool:
    grey = image[:, :, 0].astype(int).ravel()
    return grey[0] == 0 and grey[-1] == 255 and bool((np.diff(grey) >= 0).all()) and len(set(grey)) == 256


@pytest.mark.parametrize(
    ("name", "size", "holds"),
    [
        ("exif_rotated.jpg", (64, 48), lambda image: image[0, -1, 1] < 20 and image[0, 0, 1] > 200),
        ("exif_rotated.png", (64, 48), lambda image: image[0, -1].tolist() == [0, 0, 0]),
        ("cmyk.jpg", (48, 64), lambda image: image[:, :, 0].min() > 240 and image[:, :, 1:].max() < 15),
        ("grey_16_bit.png", (48, 64), _is_gradient),
        ("grey_32_bit.tif", (48, 64), _is_gradient),
        ("grey_float.tif", (48, 64), _is_gradient),
        ("one_bit.png", (48, 64), lambda image: set(np.unique(image)) == {0, 255}),
        ("alpha.png", (48, 64), lambda image: (image[:, :32] == 255).all() and image[0, 40].tolist() == [255, 0, 0]),
        ("grey_alpha.png", (48, 64), lambda image: (image[:, :32] == 255).all() and image[0, 40].tolist() == [76] * 3),
        ("palette_alpha.png", (48, 64), lambda image: (image[:, :32] == 255).all() and image[0, 40, 1] == 0),
        ("palette.gif", (48, 64), lambda image: np.abs(image[:, :, 1] - np.arange(48)[:, None] * 5.0).mean() < 12),
        ("one_pixel.png", (1, 1), lambda image: image[0, 0].tolist() == [0, 0, 0]),
        ("narrow.png", (3, 600), lambda image: image[2, 0, 1] == 10),
    ],
)
def test_tricky_image_has_its_true_pixels(
    zoo: tuple[SampleIndex, dict[str, ZooCase]], name: str, size: tuple[int, int], holds: Callable[[np.ndarray], bool]
) -> None:
    index, cases = zoo
    [image] = _pixels(index, cases[name].row)
    assert image.shape == (*size, 3) and image.dtype == np.uint8
    assert holds(image)
