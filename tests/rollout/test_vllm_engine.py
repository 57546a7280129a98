"""vLLM with our embeddings answers as our own model does; run by ``make test-vllm`` in an environment of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sicog_mcore.build import build_chunks, plan_build
from sicog_mcore.cognition.generation.generate import run
from sicog_mcore.cognition.generation.options import GenerationOptions
from sicog_mcore.cognition.records import Generation, read_records
from sicog_mcore.config import ParallelConfig
from sicog_mcore.data.encode import Encoder
from sicog_mcore.data.sample import ImageRef
from sicog_mcore.model.initialise import initialise
from sicog_mcore.parallel.topology import Topology, start_topology, stop_topology
from sicog_mcore.rollout.engine import NativeEngine
from sicog_mcore.rollout.requests import Request, Result, Sampling
from sicog_mcore.rollout.vllm_engine import VllmEngine
from tests.answering import SHARPNESS, write_checkpoint, write_items
from tests.builders import tiny_experiment, write_image

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
EXPERIMENT = tiny_experiment(Path("unused"))
SIZES = ((64, 64), (100, 180), None, (300, 140), (200, 200), (240, 340), (33, 57))  # 0, 2, 3, 4 and 6 slices; no image
ITEMS, SLOTS = 21, 4
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=24)
DRAWN = Sampling(temperature=1.0, top_p=0.9, top_k=0, max_new_tokens=8)
LOG_PROB = 1e-4


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    yield start_topology(EXPERIMENT.parallel, seed=0)
    stop_topology()


@pytest.fixture(scope="module")
def engines(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> tuple[VllmEngine, NativeEngine]:
    (model,) = chunks = build_chunks(plan_build(EXPERIMENT), topology)
    initialise(chunks, seed=5)
    with torch.no_grad():
        model.language_model.output_layer.weight.mul_(SHARPNESS)
    encoder = Encoder(EXPERIMENT.model, EXPERIMENT.data)
    folder = tmp_path_factory.mktemp("export") / "decoder"
    ours = NativeEngine(model, encoder, topology, SLOTS)
    return VllmEngine(model, encoder, topology, folder, SLOTS, 2, GREEDY.max_new_tokens), ours


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> list[Request]:
    folder, made = tmp_path_factory.mktemp("images"), []
    for i in range(ITEMS):
        size, images = SIZES[i % len(SIZES)], ()
        if size is not None:
            write_image(folder / f"{i}.png", *size, seed=i)
            images = (ImageRef(str(folder / f"{i}.png")),)
        texts = tuple("<image>\n" * len(images) + text for text in ("Describe this image in detail.", "What is it?"))
        made.append(Request(f"i{i}", images, texts, ((2 * i,), (2 * i + 1,))))
    return made


def by_id(results: Iterator[Result]) -> dict[str, Result]:
    return {result.id: result for result in results}


def test_greedy_tokens_equal_the_native_engines(
    engines: tuple[VllmEngine, NativeEngine], requests: list[Request]
) -> None:
    theirs, ours = (by_id(engine.generate(requests, GREEDY)) for engine in engines)
    assert theirs.keys() == ours.keys() == {request.id for request in requests}
    for name, result in theirs.items():
        assert result.prompt_tokens == ours[name].prompt_tokens
        for left, right in zip(result.answers, ours[name].answers, strict=True):
            assert [(a.tokens, a.text, a.finish) for a in left] == [(a.tokens, a.text, a.finish) for a in right]
            assert left[0].log_probs == pytest.approx(right[0].log_probs, abs=LOG_PROB)
    assert engines[0].counters == engines[1].counters


def test_seeds_decide_what_is_drawn(engines: tuple[VllmEngine, NativeEngine], requests: list[Request]) -> None:
    first, again = (by_id(engines[0].generate(asked, DRAWN)) for asked in (requests[:6], requests[5::-1]))
    assert first.keys() == again.keys()
    for name, result in first.items():
        for left, right in zip(result.answers, again[name].answers, strict=True):
            assert [(a.tokens, a.text, a.finish) for a in left] == [(a.tokens, a.text, a.finish) for a in right]
            # vLLM chooses by the clock what it computes together, which moves the last bits.
            assert left[0].log_probs == pytest.approx(right[0].log_probs, abs=LOG_PROB)
    tokens = {answer.tokens for result in first.values() for prompt in result.answers for answer in prompt}
    assert len(tokens) > 6


def test_an_image_that_cannot_be_read_fails_alone(
    engines: tuple[VllmEngine, NativeEngine], requests: list[Request], tmp_path: Path
) -> None:
    bad = Request("bad", (ImageRef(str(tmp_path / "none.png")),), requests[0].prompts, requests[0].seeds)
    found = by_id(engines[0].generate([bad, requests[1]], GREEDY))
    assert (found["bad"].failure, found["i1"].failure) == ("image_missing", "")
    alone = by_id(engines[0].generate([replace(bad, id=str(number)) for number in range(5)], GREEDY))
    assert [result.failure for result in alone.values()] == ["image_missing"] * 5


def test_a_whole_run_passes_the_gate_and_names_its_engine(tmp_path: Path) -> None:
    stop_topology()
    write_items(tmp_path, 5)
    try:
        write_checkpoint(tiny_experiment(tmp_path), tmp_path / "model", start_topology(ParallelConfig(), seed=0))
    finally:
        stop_topology()
    options = GenerationOptions(
        checkpoint=tmp_path / "model",
        rows=(tmp_path / "items.jsonl",),
        images=tmp_path / "images",
        prompts=(("cod", 1), ("caption", 1)),
        sampling=DRAWN,
        seed=3,
        out=tmp_path / "out",
        batch=2,
        engine="vllm",
    )
    records = list(read_records(run(options), Generation))
    assert [record.failure for record in records] == ["", "", "no_image", "image_unidentified", ""]
    assert {record.engine.split()[0] for record in records} == {"vllm"}
    assert json.loads((options.out / "parts" / "header.json").read_text())["engine"] == records[0].engine
