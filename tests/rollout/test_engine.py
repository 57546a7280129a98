"""Answers depend on the request alone, and what prompts and answers share is computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sicog_mcore.build import build_model, plan_build
from sicog_mcore.data.encode import Encoder
from sicog_mcore.data.sample import ImageRef
from sicog_mcore.errors import SampleError
from sicog_mcore.model.vlm import VisionLanguageModel
from sicog_mcore.parallel.topology import Topology, start_topology, stop_topology
from sicog_mcore.rollout.engine import NativeEngine, encode_request
from sicog_mcore.rollout.kv_cache import join_prompts
from sicog_mcore.rollout.requests import Request, Result, Sampling, harmless
from tests.builders import tiny_experiment, write_image
from tests.greedy import greedy

EXPERIMENT = tiny_experiment(Path("unused"))
SIZES = ((100, 180), None, (64, 64), (33, 57), (240, 340))  # (height, width) in px
TEXTS = ("Describe this image in detail.", "What color is the circle?")
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=3)
DRAWN = Sampling(temperature=1.0, top_p=0.9, top_k=0, max_new_tokens=7)
LOG_PROB = 1e-4


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    yield start_topology(EXPERIMENT.parallel, seed=0)
    stop_topology()


@pytest.fixture(scope="module")
def model(topology: Topology) -> VisionLanguageModel:
    (chunk,) = build_model(plan_build(EXPERIMENT), topology).chunks
    assert isinstance(chunk, VisionLanguageModel)
    with torch.no_grad():  # far from uniform
        chunk.language_model.output_layer.weight.mul_(10)
    return chunk


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> list[Request]:
    folder, made = tmp_path_factory.mktemp("images"), []
    for number, size in enumerate(SIZES):
        images: tuple[ImageRef, ...] = ()
        if size is not None:
            write_image(folder / f"{number}.png", *size, seed=number)
            images = (ImageRef(str(folder / f"{number}.png")),)
        texts = tuple("<image>\n" * len(images) + text for text in TEXTS)
        made.append(Request(f"i{number}", images, texts, ((10 * number, 10 * number + 1), (10 * number + 2,))))
    return made


def engine(model: VisionLanguageModel, topology: Topology, slots: int) -> NativeEngine:
    return NativeEngine(model, Encoder(EXPERIMENT.model, EXPERIMENT.data), topology, slots)


def by_id(results: Iterator[Result]) -> dict[str, Result]:
    return {result.id: result for result in results}


def tokens_of(results: dict[str, Result], id: str) -> list[list[tuple[int, ...]]]:
    return [[answer.tokens for answer in answers] for answers in results[id].answers]


def test_greedy_answers_equal_those_without_a_cache(
    model: VisionLanguageModel, topology: Topology, requests: Sequence[Request]
) -> None:
    own = engine(model, topology, 2)
    found = by_id(own.generate(requests, GREEDY))
    for request in requests:
        prompts = encode_request(own.encoder, request)
        assert found[request.id].prompt_tokens == tuple(len(prompt.tokens) for prompt in prompts)
        for prompt, answers in zip(prompts, found[request.id].answers, strict=True):
            _, expected = greedy(model, EXPERIMENT, own.encoder.chat, prompt, GREEDY.max_new_tokens)
            assert {answer.tokens for answer in answers} == {tuple(expected)}


def test_an_image_and_what_prompts_share_are_computed_once(
    model: VisionLanguageModel, topology: Topology, requests: Sequence[Request]
) -> None:
    own = engine(model, topology, 3)
    list(own.generate(requests, DRAWN))
    prompts = [encode_request(own.encoder, request) for request in requests]
    trees = [join_prompts(item) for item in prompts]
    assert own.counters.items == len(requests)
    assert own.counters.slices == sum(len(item[0].grids) for item in prompts) == 3 + 0 + 1 + 1 + 7
    assert own.counters.prefill_tokens == sum(len(tree.tokens) for tree in trees)
    for item, tree in zip(prompts, trees, strict=True):
        assert len(tree.tokens) < sum(len(prompt.tokens) for prompt in item) - len(item[0].image_slots)


def test_answers_do_not_depend_on_the_batch_or_on_who_else_asks(
    model: VisionLanguageModel, topology: Topology, requests: Sequence[Request]
) -> None:
    together = by_id(engine(model, topology, 5).generate(requests, DRAWN))
    one_by_one = by_id(engine(model, topology, 1).generate(requests[::-1], DRAWN))
    assert together.keys() == one_by_one.keys() == {request.id for request in requests}
    for id, result in together.items():
        assert tokens_of(together, id) == tokens_of(one_by_one, id)
        for left, right in zip(result.answers, one_by_one[id].answers, strict=True):
            np.testing.assert_allclose(
                np.concatenate([a.log_probs for a in left]), np.concatenate([a.log_probs for a in right]), atol=LOG_PROB
            )
    longer = by_id(engine(model, topology, 2).generate(requests[:1], replace(DRAWN, max_new_tokens=9)))
    first, again = tokens_of(together, "i0")[0][0], tokens_of(longer, "i0")[0][0]
    assert again[: len(first)] == first


def test_answers_differ_between_seeds_and_are_counted(
    model: VisionLanguageModel, topology: Topology, requests: Sequence[Request]
) -> None:
    own = engine(model, topology, 5)
    found = list(own.generate(requests, DRAWN))
    answers = [answer for result in found for prompt in result.answers for answer in prompt]
    assert len({answer.tokens for answer in answers}) > len(answers) // 2
    assert own.counters.decode_tokens == sum(len(answer.tokens) for answer in answers)
    ends = {own.encoder.chat.end_id, own.encoder.chat.pad_id}
    for answer in answers:
        assert (answer.finish == "stop") == (answer.tokens[-1] in ends)
        assert answer.finish == "stop" or len(answer.tokens) == DRAWN.max_new_tokens
        assert len(answer.log_probs) == len(answer.tokens)


def test_a_bad_image_fails_alone(
    model: VisionLanguageModel, topology: Topology, requests: Sequence[Request], tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_bytes(bytes(100))
    bad = replace(requests[0], id="bad", images=(ImageRef(str(tmp_path / "bad.png")),))
    gone = replace(requests[0], id="gone", images=(ImageRef(str(tmp_path / "none.png")),))
    found = by_id(engine(model, topology, 2).generate([bad, requests[2], gone, requests[3]], GREEDY))
    assert {id: result.failure for id, result in found.items() if result.failure} == {
        "bad": "image_unidentified",
        "gone": "image_missing",
    }
    alone = by_id(engine(model, topology, 1).generate(requests[2:4], GREEDY))
    assert tokens_of(found, "i2") == tokens_of(alone, "i2")
    assert tokens_of(found, "i3") == tokens_of(alone, "i3")


def test_prompts_must_show_every_image_once(requests: Sequence[Request]) -> None:
    encoder = Encoder(EXPERIMENT.model, EXPERIMENT.data)
    for text in ("no placeholder", "<image>\n<image>\ntwo"):
        with pytest.raises(SampleError, match="image_count_mismatch"):
            encode_request(encoder, replace(requests[0], prompts=(text,), seeds=((0,),)))


def test_a_placeholder_in_an_answer_becomes_text() -> None:
    encoder = Encoder(EXPERIMENT.model, EXPERIMENT.data)
    text = harmless("before <image> after <|im_end|>")
    assert "<image>" not in text
    ids = encoder.chat.tokenizer.encode(text)
    assert not {encoder.chat.end_id, encoder.chat.pad_id, -1} & set(ids)


def test_no_requests_give_no_results(model: VisionLanguageModel, topology: Topology) -> None:
    assert list(engine(model, topology, 2).generate([], GREEDY)) == []
