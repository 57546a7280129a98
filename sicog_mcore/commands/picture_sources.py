"""Where pictures of the demonstrations come from: other installed packages, or this one alone.

In: name of a source   Out: a folder of shapes with questions, photographs by name   Next: demo_data.py, loop_demo_data.py
What the package brings are photographs in the public domain or under CC0, reduced to 288 px, and shapes drawn by rule; they
need no other package. The same packages give the same bytes.
"""

from __future__ import annotations

import importlib.util
import json
import random
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image, ImageDraw

from sicog_mcore.files import hash_file, hash_json

PictureKind = Literal["packages", "own"]

CAPTIONS = Path(__file__).with_name("demo_captions.json")
OWN_PHOTOGRAPHS = Path(__file__).with_name("demo_pictures")
DISTRIBUTIONS: Mapping[str, str] = {
    "easy_vqa": "easy-vqa",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
}
SHAPES = ("circle", "rectangle", "triangle")
COLOURS: Mapping[str, tuple[int, int, int]] = {
    "black": (20, 20, 20),
    "blue": (30, 60, 220),
    "brown": (130, 75, 30),
    "gray": (128, 128, 128),
    "green": (20, 150, 50),
    "red": (215, 30, 30),
    "teal": (0, 128, 128),
    "yellow": (235, 200, 0),
}
SIDE, SMALLEST, LARGEST = 64, 14, 30  # px: the image, and the shape in it
LIGHTEST, DARKEST = 255, 225  # of a background
MOST_DRAWN = 4000
SEED = 2503


class MissingPackage(Exception):
    """A package whose images are needed is not installed."""


class Pictures(Protocol):
    """A source of pictures.

    Attributes:
        shapes: folder with questions.json, a list of [question, answer, image number], and images/NUMBER.png.
        shape_name: as rows say where their text comes from.
        shape_origin, shape_licence: who made the shapes, and how they may be used.
        versions: what the bytes depend on, by name.
    """

    @property
    def shapes(self) -> Path: ...

    @property
    def shape_name(self) -> str: ...

    @property
    def shape_origin(self) -> str: ...

    @property
    def shape_licence(self) -> str: ...

    @property
    def versions(self) -> Mapping[str, str]: ...

    def photograph(self, entry: Mapping[str, Any]) -> Path | None:
        """Returns the file of a photograph of demo_captions.json; None where the source has it not."""
        ...


def package_folder(package: str) -> Path:
    """Returns the folder of an installed package, found without importing it.

    Raises:
        MissingPackage: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingPackage(
            f"{DISTRIBUTIONS[package]} is not installed, but its images are needed; run: pip install -e .[demo], or"
            " pip install 'sicog_mcore[demo]' without a checkout, or give --pictures own"
        )
    return Path(spec.origin).parent


class InstalledPictures:
    """Shapes of easy-vqa, photographs inside scikit-image, scikit-learn and matplotlib.

    Raises:
        MissingPackage: one of them is not installed.
    """

    shape_name, shape_origin, shape_licence = "easy-vqa", "easy-vqa by Victor Zhou", "MIT"

    def __init__(self) -> None:
        self._folders = {package: package_folder(package) for package in DISTRIBUTIONS}

    @property
    def shapes(self) -> Path:
        return self._folders["easy_vqa"] / "data" / "train"

    @property
    def versions(self) -> Mapping[str, str]:
        return {name: metadata.version(name) for name in DISTRIBUTIONS.values()}

    def photograph(self, entry: Mapping[str, Any]) -> Path | None:
        return self._folders[entry["package"]] / str(entry["file"])


class OwnPictures:
    """Photographs that lie in this package, and shapes that are drawn into a folder.

    Args:
        folder: for the shapes; empty.
        count: number of shapes.
    """

    shape_name, shape_origin, shape_licence = "shapes drawn by rule", "drawn by sicog_mcore", "Apache-2.0"

    def __init__(self, folder: Path, count: int) -> None:
        if count > MOST_DRAWN:
            raise ValueError(f"--vqa-images {count}: at most {MOST_DRAWN} shapes are drawn; ask for at most that many")
        self.shapes = folder
        draw_shapes(folder, count)

    @property
    def versions(self) -> Mapping[str, str]:
        photographs = {path.name: hash_file(path) for path in sorted(OWN_PHOTOGRAPHS.glob("*.jpg"))}
        own = {"pictures": hash_json(photographs), "drawing": hash_file(Path(__file__))}
        return {**own, "pillow": metadata.version("pillow")}

    def photograph(self, entry: Mapping[str, Any]) -> Path | None:
        path = OWN_PHOTOGRAPHS / f"{Path(entry['file']).stem}.jpg"
        return path if path.is_file() else None


@contextmanager
def open_pictures(kind: PictureKind, count: int) -> Iterator[Pictures]:
    """Yields a source of pictures with at least so many shapes, where it has as many.

    Raises:
        MissingPackage: "packages", and one of them is not installed.
        ValueError: "own", and more shapes than are drawn.
    """
    if kind == "packages":
        yield InstalledPictures()
        return
    with tempfile.TemporaryDirectory() as folder:
        yield OwnPictures(Path(folder), count)


def draw_shapes(folder: Path, count: int) -> None:
    """Draws ``count`` images of 64 x 64 px with one shape each, and writes questions.json beside images/."""
    numbers = random.Random(SEED)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    questions: list[tuple[str, str, int]] = []
    for number in range(count):
        shape, colour = numbers.choice(SHAPES), numbers.choice(list(COLOURS))
        _draw(numbers, shape, COLOURS[colour]).save(folder / "images" / f"{number}.png")
        other = numbers.choice([known for known in SHAPES if known != shape])
        questions += [
            ("What shape is in the image?", shape, number),
            (f"What color is the {shape}?", colour, number),
            (f"Is there a {shape} in the image?", "yes", number),
            (f"Does the image contain a {other}?", "no", number),
        ]
    (folder / "questions.json").write_text(json.dumps(questions), encoding="utf-8")


def _draw(numbers: random.Random, shape: str, colour: tuple[int, int, int]) -> Image.Image:
    tint = (numbers.randint(DARKEST, LIGHTEST), numbers.randint(DARKEST, LIGHTEST), numbers.randint(DARKEST, LIGHTEST))
    image = Image.new("RGB", (SIDE, SIDE), tint)
    height, width = numbers.randint(SMALLEST, LARGEST), numbers.randint(SMALLEST, LARGEST)
    if shape == "circle":
        height = width
    top, left = numbers.randint(0, SIDE - 1 - height), numbers.randint(0, SIDE - 1 - width)
    box = (left, top, left + width, top + height)
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "rectangle":
        pen.rectangle(box, fill=colour)
    else:
        pen.polygon([(left + width // 2, top), (left, top + height), (left + width, top + height)], fill=colour)
    return image
