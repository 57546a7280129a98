"""Steps that count samples: as many packs as the samples need, the same number for every replica."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from sicog_mcore.data.batch import PackedBatch
from sicog_mcore.data.loader import Loader, LoaderState
from sicog_mcore.data.quarantine import Quarantine
from tests.builders import tiny_experiment, write_dataset

SAMPLES, PER_STEP = 20, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write_dataset(path, SAMPLES)
    return path


def steps(folder: Path, num: int, rank: int = 0, size: int = 1, **options: Any) -> list[list[PackedBatch]]:
    """Batches of the first steps of one replica."""
    experiment = tiny_experiment(
        folder,
        data={"token_budget": 512},
        train={"samples_per_step": PER_STEP},
        parallel=options.get("parallel", {}),
    )
    quarantine = Quarantine(folder / "quarantine.jsonl", 1.0, 10)
    loader = Loader(experiment, rank, size, quarantine, options.get("state", LoaderState()))
    found: list[list[PackedBatch]] = []
    for _ in range(num):
        found.append([next(loader)])
        while not loader.ends_step:
            found[-1].append(next(loader))
    options.get("states", []).append(asdict(loader.state()))
    loader.close()
    return found


def ids(batches: list[PackedBatch]) -> list[str]:
    return sorted(sample for batch in batches for sample in batch.sample_ids)


def test_a_step_holds_exactly_the_samples_it_counts_until_the_epoch_ends(folder: Path) -> None:
    epoch = steps(folder, 4)
    assert [len(ids(step)) for step in epoch] == [PER_STEP, PER_STEP, PER_STEP, SAMPLES % PER_STEP]
    assert sorted(sample for step in epoch for sample in ids(step)) == sorted(f"s{i}" for i in range(SAMPLES))


def test_replicas_share_a_step_in_equal_numbers_of_packs(folder: Path) -> None:
    alone = steps(folder, 4)
    shares = [steps(folder, 4, rank, 3) for rank in range(3)]
    for number, step in enumerate(alone):
        parts = [share[number] for share in shares]
        assert len({len(part) for part in parts}) == 1
        assert ids([batch for part in parts for batch in part]) == ids(step)
        blank = [batch for part in parts for batch in part if not batch.sample_ids]
        assert len(blank) == -len(step) % 3 and all(batch.num_tokens == 0 for batch in blank)


def test_the_interleaved_schedule_gets_whole_groups_of_packs(folder: Path) -> None:
    interleaved = steps(folder, 4, parallel={"pipeline": 2, "virtual_pipeline": 2})
    assert all(len(step) % 2 == 0 for step in interleaved)
    assert [ids(step) for step in interleaved] == [ids(step) for step in steps(folder, 4)]


def test_a_later_step_is_reached_from_its_state(folder: Path) -> None:
    states: list[dict[str, int]] = []
    steps(folder, 2, states=states)
    resumed = steps(folder, 3, state=LoaderState(**states[0]))
    assert [ids(step) for step in resumed[:2]] == [ids(step) for step in steps(folder, 4)[2:]]
