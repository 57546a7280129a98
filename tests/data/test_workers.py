"""A pack is decoded with what can be decoded of it, in the process that asks or in others; test_loader.py kills these."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sicog_mcore.config import Experiment
from sicog_mcore.data.encode import Encoder
from sicog_mcore.data.index.index_settings import index_folder
from sicog_mcore.data.plan import PackPlan
from sicog_mcore.data.resume import EpochRows, open_rows
from sicog_mcore.data.sources import open_sources
from sicog_mcore.data.workers import PackBuilder, PackDecoder
from sicog_mcore.errors import DataError
from tests.builders import tiny_experiment, write_dataset


def builder_of(experiment: Experiment) -> PackBuilder:
    samples = open_sources(experiment.data.sources, experiment.data)
    encoder = Encoder(experiment.model, experiment.data)
    return PackBuilder(EpochRows(samples), encoder, experiment.model, experiment.data)


def plans() -> Iterator[PackPlan]:
    for number in range(100):
        yield PackPlan(5, 0, number, (number % 4, 4))


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    write_dataset(tmp_path, 6)
    return tiny_experiment(tmp_path)


def test_what_cannot_be_decoded_leaves_a_hole(experiment: Experiment, tmp_path: Path) -> None:
    builder = builder_of(experiment)
    (tmp_path / "images" / "s4.jpg").unlink()
    batch, rejected = builder.build(PackPlan(5, 0, 0, (1, 4, 2)))
    assert batch.sample_ids == ("s1", "s2")
    assert [(one.id, one.reason, one.epoch) for one in rejected] == [("s4", "image_missing", 5)]
    blank, none = builder.build(PackPlan(5, 0, 0, ()))
    assert blank.num_tokens == 0 and none == []


def test_packs_come_in_the_order_of_their_plans(experiment: Experiment) -> None:
    decoder = PackDecoder(builder_of(experiment), plans(), experiment.data, pin_memory=False)
    assert [next(decoder)[0].sample_ids for _ in range(3)] == [("s0", "s4"), ("s1", "s4"), ("s2", "s4")]
    decoder.close()


def test_what_planning_says_is_passed_on(experiment: Experiment) -> None:
    def broken() -> Iterator[PackPlan]:
        yield PackPlan(0, 0, 0, (0,))
        raise DataError("too many bad rows")

    decoder = PackDecoder(builder_of(experiment), broken(), experiment.data, pin_memory=False)
    next(decoder)
    with pytest.raises(DataError, match="too many bad rows"):
        next(decoder)
    decoder.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_index_that_is_deleted_while_a_run_goes_on_is_one_message(experiment: Experiment, workers: int) -> None:
    rows = pickle.loads(pickle.dumps(open_rows(experiment).rows.without_sizes()))  # as workers get them
    builder = PackBuilder(rows, Encoder(experiment.model, experiment.data), experiment.model, experiment.data)
    shutil.rmtree(index_folder(experiment))
    data = replace(experiment.data, workers=workers)
    decoder = PackDecoder(builder, plans(), data, pin_memory=False)
    with pytest.raises(DataError) as caught:
        next(decoder)
    assert "was the index deleted" in str(caught.value) and "Traceback" not in str(caught.value)
    decoder.close()
