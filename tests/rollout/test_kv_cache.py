"""Decoding with a cache gives what decoding without one gives, and reads nothing twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sicog_mcore.build import build_model, plan_build
from sicog_mcore.data.batch import EncodedSample
from sicog_mcore.data.encode import Encoder
from sicog_mcore.data.sample import ImageRef, Turn
from sicog_mcore.model.vlm import VisionLanguageModel
from sicog_mcore.parallel.topology import start_topology, stop_topology
from sicog_mcore.rollout.kv_cache import CachedDecoder, PromptTree, join_prompts
from tests.builders import tiny_experiment, write_image
from tests.greedy import greedy

EXPERIMENT = tiny_experiment(Path("unused"))
# (height, width) in px; 0, 2, 3, 4 and 6 slices under the tiny preset. None is an item without an image.
SIZES = (None, (64, 64), (100, 180), (300, 140), (200, 200), (240, 340))
TEXTS = ("Describe this image in detail.", "Describe this image step by step, please.", "What color is it?")
LOGITS = 2e-5  # absolute; the sums of attention run in another order
TOKENS = 8


@pytest.fixture(scope="module")
def model() -> Iterator[VisionLanguageModel]:
    topology = start_topology(EXPERIMENT.parallel, seed=0)
    (chunk,) = build_model(plan_build(EXPERIMENT), topology).chunks
    assert isinstance(chunk, VisionLanguageModel)
    with torch.no_grad():  # far from uniform, so that the most probable token is never a close call
        chunk.language_model.output_layer.weight.mul_(20)
    yield chunk.eval()
    stop_topology()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[list[EncodedSample]]:
    """For each item its three prompts."""
    folder, encoder, items = tmp_path_factory.mktemp("images"), Encoder(EXPERIMENT.model, EXPERIMENT.data), []
    for number, size in enumerate(SIZES):
        images = ()
        if size is not None:
            write_image(folder / f"{number}.png", *size, seed=number)
            images = (ImageRef(str(folder / f"{number}.png")),)
        turns = [(Turn("user", "<image>\n" * len(images) + text),) for text in TEXTS]
        items.append(encoder.encode_prompts(str(number), images, turns))
    return items


def encoder_chat() -> Encoder:
    return Encoder(EXPERIMENT.model, EXPERIMENT.data)


def answers(model: VisionLanguageModel, trees: list[PromptTree], uses: list[int], slots: int) -> list[list[list[int]]]:
    """Greedy tokens of every answer of every item, ``slots`` items at a time."""
    decoder, done = CachedDecoder(model, slots, len(uses)), []
    for start in range(0, len(trees), slots):
        batch = trees[start : start + slots]
        logits = decoder.read(range(len(batch)), batch, [uses] * len(batch))
        rows, drawn = list(range(len(batch) * len(uses))), []
        while True:
            tokens = logits.argmax(-1)
            drawn.append(tokens)
            if len(drawn) == TOKENS:
                break
            logits = decoder.step(rows, tokens.tolist())
        done += torch.stack(drawn, dim=-1).unflatten(0, (len(batch), len(uses))).tolist()
    return done


def test_slices_of_the_items_run_from_none_to_six(prompts: list[list[EncodedSample]]) -> None:
    assert [max(0, len(item[0].grids) - 1) for item in prompts] == [0, 0, 2, 3, 4, 6]


@pytest.mark.slow
def test_greedy_tokens_equal_those_without_a_cache(
    model: VisionLanguageModel, prompts: list[list[EncodedSample]]
) -> None:
    chat = encoder_chat().chat
    found = answers(model, [join_prompts(item) for item in prompts], [0, 1, 2], slots=4)
    for item, tokens in zip(prompts, found, strict=True):
        for prompt, own in zip(item, tokens, strict=True):
            _, expected = greedy(model, EXPERIMENT, chat, prompt, TOKENS)
            assert own[: len(expected)] == expected


def test_logits_of_prompts_equal_those_of_the_whole_model(
    model: VisionLanguageModel, prompts: list[list[EncodedSample]]
) -> None:
    found = CachedDecoder(model, 6, 3).read(range(6), [join_prompts(item) for item in prompts], [[0, 1, 2]] * 6)
    expected = torch.stack(
        [torch.from_numpy(greedy(model, EXPERIMENT, encoder_chat().chat, p, 1)[0])[-1] for i in prompts for p in i]
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=LOGITS * 20)


def test_what_prompts_have_in_common_stands_once(prompts: list[list[EncodedSample]]) -> None:
    tree, alone = join_prompts(prompts[5]), prompts[5]
    assert tree.prefix > len(alone[0].image_slots)
    assert len(tree.tokens) == tree.prefix + sum(len(p.tokens) - tree.prefix for p in alone)
    assert torch.equal(tree.image_slots, alone[0].image_slots)
    assert tree.prompt_lengths == tuple(len(p.tokens) for p in alone)
    assert join_prompts(alone[:1]).suffixes == (1,)


def test_prompts_that_show_their_image_late_are_read_right(model: VisionLanguageModel, tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 100, 180, seed=1)
    texts = ("Look: <image>\nWhat is it?", "<image>\nWhat is it?")
    encoder = encoder_chat()
    items = encoder.encode_prompts("a", (ImageRef(str(tmp_path / "a.png")),), [(Turn("user", t),) for t in texts])
    tree = join_prompts(items)
    assert len(tree.image_slots) == 2 * len(items[0].image_slots)
    found = CachedDecoder(model, 1, 2).read([0], [tree], [[0, 1]])
    for row, prompt in zip(found, items, strict=True):
        expected = greedy(model, EXPERIMENT, encoder.chat, prompt, 1)[0][-1]
        torch.testing.assert_close(row, torch.from_numpy(expected), rtol=0, atol=LOGITS * 20)


def test_a_place_is_given_to_another_item_while_its_neighbour_goes_on(
    model: VisionLanguageModel, prompts: list[list[EncodedSample]]
) -> None:
    trees = [join_prompts(item) for item in prompts]
    alone = answers(model, trees, [0, 2], slots=1)
    decoder = CachedDecoder(model, 2, 2)
    logits = decoder.read([0, 1], [trees[1], trees[2]], [[0, 2]] * 2)
    drawn = [logits.argmax(-1)]
    for _ in range(3):
        drawn.append(decoder.step([0, 1, 2, 3], drawn[-1].tolist()).argmax(-1))
    fresh = decoder.read([0], [trees[5]], [[0, 2]]).argmax(-1)
    late = [torch.cat([fresh, drawn[-1][2:]])]
    for _ in range(3):
        late.append(decoder.step([0, 1, 2, 3], late[-1].tolist()).argmax(-1))
    for number in (0, 1):
        assert torch.stack([d[number] for d in drawn]).tolist() == alone[1][number][:4]
        assert torch.stack([d[number] for d in late]).tolist() == alone[5][number][:4]
        later = torch.stack([d[2 + number] for d in [*drawn[:3], *late]]).tolist()
        assert later == alone[2][number][:7]
