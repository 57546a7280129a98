"""The gate lets an engine pass that is the trainer's model, and refuses one that differs in anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sicog_mcore.build import build_model, plan_build
from sicog_mcore.data.encode import Encoder
from sicog_mcore.data.sample import ImageRef
from sicog_mcore.errors import EXIT_GIVE_UP
from sicog_mcore.model.vlm import VisionLanguageModel
from sicog_mcore.parallel.topology import Topology, start_topology, stop_topology
from sicog_mcore.rollout.engine import NativeEngine
from sicog_mcore.rollout.parity import ParityError, check_parity
from sicog_mcore.rollout.requests import Counters, Request, Result, Sampling
from tests.answering import SHARPNESS
from tests.builders import tiny_experiment, write_image

EXPERIMENT = tiny_experiment(Path("unused"))
TOO_SMALL_TO_SEE = 1e-5


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    yield start_topology(EXPERIMENT.parallel, seed=0)
    stop_topology()


def build(topology: Topology) -> VisionLanguageModel:
    (chunk,) = build_model(plan_build(EXPERIMENT), topology).chunks
    assert isinstance(chunk, VisionLanguageModel)
    with torch.no_grad():  # far from uniform, as a trained model is
        chunk.language_model.output_layer.weight.mul_(SHARPNESS)
    return chunk


@pytest.fixture(scope="module")
def model(topology: Topology) -> VisionLanguageModel:
    return build(topology)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(EXPERIMENT.model, EXPERIMENT.data)


@pytest.fixture
def requests(tmp_path: Path) -> list[Request]:
    made = []
    for number, size in enumerate(((64, 64), (100, 180), (90, 160), (33, 57))):
        write_image(tmp_path / f"{number}.png", *size, seed=number)
        prompts = ("<image>\nDescribe this image in detail.", "<image>\nWhat is it?")
        made.append(Request(f"i{number}", (ImageRef(str(tmp_path / f"{number}.png")),), prompts, ((1, 2), (3,))))
    return made


class Altered:
    """An engine that answers what another one does, changed on the way."""

    def __init__(self, engine: NativeEngine, **change: object):
        self._engine, self._change = engine, change
        self.counters = Counters()

    @property
    def name(self) -> str:
        return "altered"

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Result]:
        for result in self._engine.generate(requests, sampling):
            answers = tuple(tuple(self._altered(answer) for answer in prompt) for prompt in result.answers)
            yield replace(result, answers=answers, prompt_tokens=self._change.get("lengths", result.prompt_tokens))

    def _altered(self, answer):  # type: ignore[no-untyped-def]
        shift = self._change.get("shift", 0.0)
        return replace(answer, log_probs=(answer.log_probs[0] + shift, *answer.log_probs[1:]))


def test_the_native_engine_is_the_trainers_model(
    model: VisionLanguageModel, encoder: Encoder, topology: Topology, requests: list[Request]
) -> None:
    engine = NativeEngine(model, encoder, topology, 2)
    found = check_parity(engine, model, encoder, requests)
    assert found.items == 3
    assert found.tokens >= 6
    assert found.difference < TOO_SMALL_TO_SEE


def test_items_that_cannot_be_read_are_passed_over(
    model: VisionLanguageModel, encoder: Encoder, topology: Topology, requests: list[Request]
) -> None:
    for request in requests[:3]:
        Path(request.images[0].path).write_bytes(bytes(10))
    engine = NativeEngine(model, encoder, topology, 2)
    assert check_parity(engine, model, encoder, requests).items == 1
    assert check_parity(engine, model, encoder, requests[:3]).items == 0


def test_other_weights_are_refused(
    model: VisionLanguageModel, encoder: Encoder, topology: Topology, requests: list[Request]
) -> None:
    other = build(topology)
    with torch.no_grad():
        for parameter in other.parameters_of("resampler"):
            parameter.neg_()  # the images look different, the text does not
    with pytest.raises(ParityError, match="log-probabilities") as caught:
        check_parity(NativeEngine(other, encoder, topology, 2), model, encoder, requests)
    assert caught.value.exit_code == EXIT_GIVE_UP


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shift": 0.01}, "log-probabilities"),
        ({"shift": float("nan")}, "log-probabilities"),
        ({"lengths": (1, 1)}, "read 1"),
    ],
)
def test_an_engine_that_says_something_else_is_refused(
    model: VisionLanguageModel,
    encoder: Encoder,
    topology: Topology,
    requests: list[Request],
    change: dict[str, object],
    message: str,
) -> None:
    engine = Altered(NativeEngine(model, encoder, topology, 2), **change)
    with pytest.raises(ParityError, match=message):
        check_parity(engine, model, encoder, requests)


def test_prompts_that_training_writes_differently_are_refused(
    model: VisionLanguageModel, topology: Topology, requests: list[Request]
) -> None:
    data = replace(EXPERIMENT.data, system_prompt="You are somebody else.")
    engine = NativeEngine(model, Encoder(EXPERIMENT.model, data), topology, 2)
    with pytest.raises(ParityError):
        check_parity(engine, model, Encoder(EXPERIMENT.model, EXPERIMENT.data), requests)
