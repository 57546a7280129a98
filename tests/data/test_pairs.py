"""A pair of answers becomes one sample whose two conversations share the slices of its image."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sicog_mcore.data.batch import IGNORED_LABEL, EncodedSample, PackedBatch, Segment
from sicog_mcore.data.collate import collate
from sicog_mcore.data.encode import Encoder
from sicog_mcore.data.loader import Loader
from sicog_mcore.data.pairs import build_pair, conversations
from sicog_mcore.data.quarantine import Quarantine
from sicog_mcore.data.sample import ImageRef, Sample, Turn
from sicog_mcore.data.sources import SampleIndex, open_sources
from sicog_mcore.errors import SampleError
from tests.pairs import pair_experiment, write_pairs

IMAGE = ImageRef("/data/a.png")
ROW = {"id": "p", "prompt": "What?", "chosen": "That.", "rejected": "This."}


def build(images: int = 0, **fields: object) -> Sample:
    row = {name: value for name, value in {**ROW, **fields}.items() if value is not None}
    return build_pair(row, [IMAGE] * images, "rows-0", "rows.jsonl:1")


def test_prompt_gets_a_placeholder_for_each_image_it_does_not_mention() -> None:
    assert build(images=1).turns == (Turn("user", "<image>\nWhat?"), Turn("assistant", "That."))
    assert build(images=2).turns[0].text == "<image>\n<image>\nWhat?"
    assert build(images=1, prompt="What? <image>").turns[0].text == "<image>\nWhat?"
    assert build().turns[0].text == "What?"


def test_turns_before_the_answer_may_be_a_conversation() -> None:
    earlier = [("system", "s"), ("human", "<image>\nq"), ("gpt", "a"), ("human", "And?")]
    pair = build(1, prompt=None, conversations=[{"from": role, "value": text} for role, text in earlier])
    chosen, rejected = conversations(pair)
    assert chosen[:-1] == rejected[:-1] and len(chosen) == 5
    assert (chosen[-1], rejected[-1]) == (Turn("assistant", "That."), Turn("assistant", "This."))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"rejected": " That. "}, "pair_equal"),
        ({"chosen": "  "}, "answer_empty"),
        ({"rejected": ""}, "answer_empty"),
        ({"chosen": None}, "field_missing"),
        ({"rejected": None}, "field_missing"),
        ({"prompt": None}, "field_missing"),
        ({"prompt": 3}, "field_type"),
        ({"chosen": ["That."]}, "field_type"),
        ({"chosen": [{"role": "assistant", "content": "That."}]}, "field_type"),
        ({"chosen": {"from": "human", "value": "That."}}, "role_unknown"),
        ({"chosen": {"role": "robot", "content": "That."}}, "role_unknown"),
        ({"rejected": {"from": "gpt"}}, "field_missing"),
        ({"rejected": {"from": "gpt", "value": ["This."]}}, "field_type"),
        ({"rejected": {"from": "gpt", "value": "\u200b"}}, "answer_empty"),
        ({"rejected": {"from": "gpt", "value": "This.", "loss": False}}, "key_unsupported"),
        ({"chosen": {"from": "gpt", "value": "This."}}, "pair_equal"),
        ({"prompt": None, "conversations": "q"}, "field_type"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "prompt_ambiguous"),
        ({"prompt": None, "conversations": [{"from": "gpt", "value": "a"}]}, "turns_order"),
        ({"prompt": "<image> and <image>"}, "image_count_mismatch"),
        ({"rejected": "An <image>"}, "image_token_in_answer"),
        ({"chosen": "\ud800"}, "not_utf8"),
    ],
)
def test_row_that_is_no_pair_is_refused_with_its_reason(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(SampleError) as raised:
        build(**fields)  # type: ignore[arg-type]
    assert raised.value.reason == reason


@pytest.mark.parametrize("names", [("from", "value", "gpt"), ("role", "content", "assistant")])
def test_answers_may_be_turns_of_the_assistant(names: tuple[str, str, str]) -> None:
    speaker, text, role = names
    turns = {name: {speaker: role, text: ROW[name]} for name in ("chosen", "rejected")}
    assert build(**turns) == build()
    assert build(chosen=turns["chosen"]) == build()


@pytest.mark.parametrize("name", ["chosen", "rejected"])
def test_field_that_is_no_answer_is_named(name: str) -> None:
    for value in (3, ["That."], {"from": "human", "value": "x"}, {"value": "x"}, {"from": "gpt", "value": 3}):
        with pytest.raises(SampleError, match=name):
            build(**{name: value})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder, 6)
    return folder


def parts(folder: Path, **data: object) -> tuple[SampleIndex, Encoder]:
    experiment = pair_experiment(folder, data=data)
    return open_sources(experiment.data.sources, experiment.data, build_pair), Encoder(
        experiment.model, experiment.data
    )


def test_encoded_pair_is_both_conversations_with_one_set_of_slices(folder: Path) -> None:
    samples, encoder = parts(folder)
    for row in range(len(samples)):
        pair = samples.read(row)
        chosen, rejected = (encoder.encode(replace(pair, turns=turns, answers=())) for turns in conversations(pair))
        encoded = encoder.encode(pair)
        length = len(chosen.tokens)
        assert encoded.segments == (Segment(length, 1.0), Segment(len(rejected.tokens), 1.0))
        for name in ("tokens", "labels", "visual_rows"):
            both = torch.cat([vars(chosen)[name], vars(rejected)[name]])
            assert torch.equal(vars(encoded)[name], both), name
        assert torch.equal(encoded.image_slots, torch.cat([chosen.image_slots, rejected.image_slots + length]))
        assert torch.equal(encoded.patches, chosen.patches) and torch.equal(encoded.grids, chosen.grids)
        measured = encoder.measure(pair)
        assert (measured.num_tokens, measured.num_slices) == (len(encoded.tokens), len(encoded.grids))


def pack(encoded: list[EncodedSample], experiment_folder: Path) -> PackedBatch:
    model = pair_experiment(experiment_folder).model
    return collate(
        encoded, token_budget=1024, pad_id=0, queries=model.resampler.queries, patch_dim=model.tower.patch_dim
    )


def test_packed_pairs_are_neighbouring_segments_on_the_same_resampler_rows(folder: Path) -> None:
    samples, encoder = parts(folder)
    encoded = [encoder.encode(samples.read(row)) for row in (0, 1, 2)]  # sliced, unsliced, without an image
    batch = pack(encoded, folder)
    lengths = [segment.length for pair in encoded for segment in pair.segments]
    assert batch.group_sizes.tolist() == [2, 2, 2] and batch.sample_ids == ("p0", "p1", "p2")
    assert batch.cu_seqlens.diff().tolist()[: len(lengths)] == lengths and batch.num_tokens == sum(lengths)
    assert batch.positions[: sum(lengths)].tolist() == [place for length in lengths for place in range(length)]
    assert batch.num_slices == sum(len(pair.grids) for pair in encoded)
    segments = torch.searchsorted(batch.cu_seqlens.long(), batch.image_slots, right=True) - 1
    rows = [set(batch.visual_rows[segments == segment].tolist()) for segment in range(6)]
    assert rows[::2] == rows[1::2] and len(rows[0]) > 0 and rows[4] == set()
    assert rows[0] | rows[2] == set(range(batch.num_slices * 16)) and not rows[0] & rows[2]
    assert batch.segment_reference.shape == batch.segment_weights.shape == (0,)


def test_inconsistent_pairs_are_refused(folder: Path) -> None:
    samples, encoder = parts(folder)
    batch = pack([encoder.encode(samples.read(0))], folder)
    rows = batch.visual_rows.clone()
    rows[0], rows[1] = batch.visual_rows[1], batch.visual_rows[0]  # every row is still used twice
    with pytest.raises(ValueError, match="'p0'.*every segment of a group uses each visual token"):
        replace(batch, visual_rows=rows).validate(16)
    with pytest.raises(ValueError, match="every segment of a group uses each visual token"):
        replace(batch, group_sizes=torch.tensor([1, 1])).validate(16)
    with pytest.raises(ValueError, match="the groups have at least one segment each, and cover the samples"):
        replace(batch, group_sizes=torch.tensor([1])).validate(16)


def test_groups_of_any_size_share_a_pack(folder: Path) -> None:
    samples, encoder = parts(folder)
    pair = samples.read(0)
    four = replace(pair, answers=("One.", "Two.", "Three and four."), weights=(1.0, 0.5, 2.0, 0.25))
    batch = pack([encoder.encode(one) for one in (pair, replace(pair, answers=()), four)], folder)
    assert batch.group_sizes.tolist() == [2, 1, 4] and batch.num_slices == 3 * len(encoder.encode(pair).grids)
    assert batch.segment_weights.tolist() == [1.0, 1.0, 1.0, *four.weights]
    ends = batch.cu_seqlens[1:8].tolist()
    answers = [batch.labels[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    assert [int((labels != IGNORED_LABEL).sum()) > 0 for labels in answers] == [True] * 7


@pytest.mark.parametrize("too_long", ["quarantine", "truncate"])
def test_pair_over_the_budget_is_never_cut(folder: Path, too_long: str) -> None:
    samples, encoder = parts(folder, token_budget=80, too_long=too_long)
    pair = samples.read(2)
    for turns in conversations(pair):
        encoder.encode(replace(pair, turns=turns, answers=()))  # each alone would fit
    with pytest.raises(SampleError, match="too_long"):
        encoder.measure(pair)


def test_loader_packs_a_pair_as_a_unit_and_quarantines_what_is_none(folder: Path, tmp_path: Path) -> None:
    rows = (folder / "data.jsonl").read_text().splitlines()
    plain = {"id": "plain", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    equal = {"id": "equal", "prompt": "q", "chosen": "a", "rejected": "a"}
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([*rows, json.dumps(plain), json.dumps(equal)]) + "\n")
    (tmp_path / "images").symlink_to(folder / "images")
    experiment = pair_experiment(tmp_path, train={"packs_per_step": 1}, data={"token_budget": 512, "max_bad_rate": 1.0})
    quarantine = Quarantine(tmp_path / "bad.jsonl", 1.0, 100)
    loader = Loader(experiment, 0, 1, quarantine)
    seen: list[str] = []
    while loader.state().epoch == 0:
        batch = next(loader)
        assert batch.group_sizes.tolist() == [2] * len(batch.sample_ids) != []
        ends = batch.cu_seqlens[1 : batch.num_segments + 1]
        labels = [bool((part != IGNORED_LABEL).any()) for part in batch.labels.tensor_split(ends.long())]
        assert labels == [True] * batch.num_segments + [False] * (len(labels) - batch.num_segments)
        seen += batch.sample_ids
    loader.close()
    assert sorted(seen) == [f"p{i}" for i in range(6)]
    assert quarantine.reasons == {"field_missing": 1, "pair_equal": 1}
