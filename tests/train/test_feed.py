from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from sicog_mcore.config import Experiment
from sicog_mcore.data.resume import LoaderState, open_rows
from sicog_mcore.errors import EXIT_CONFIG, EXIT_GIVE_UP, SicogError
from sicog_mcore.parallel.topology import stop_topology
from sicog_mcore.train.feed import Feed, open_data
from tests.builders import tiny_experiment, write_dataset
from tests.dist import Rank, run_ranks

NUM_ROWS = 24
LAYOUTS: tuple[dict[str, int], ...] = ({}, {"tensor": 2})  # two replicas, or one on two ranks
Outcome = tuple[str, int, str]  # of an error: its kind, exit code and text


def experiment_on(folder: Path, max_bad_rate: float, **parallel: Any) -> Experiment:
    return tiny_experiment(
        folder,
        output=str(folder / f"run{len(parallel)}{max_bad_rate}"),
        data={"window_samples": 8, "max_bad_rate": max_bad_rate},
        train={"packs_per_step": 2},
        parallel=parallel,
    )


def _outcomes(rank: Rank, folder: Path, saved: dict[str, Any]) -> list[list[Outcome | list[Any]]]:
    """For each layout what this rank meets: too many bad pixels, few of them, changed rows, a path that does not exist."""
    results = []
    for number, layout in enumerate(LAYOUTS):
        found: list[Outcome | list[Any]] = []
        strict, mild, lost = (experiment_on(folder / name, limit, **layout) for name, limit in INPUTS)
        topology = Rank(rank.rank, rank.world_size, f"{rank.init_method}-{number}").start(strict.parallel)
        for experiment, data in ((strict, None), (mild, None), (mild, saved), (lost, None)):
            try:
                opened = open_data(experiment, topology, {"window": 1} if data else None, data)
                feed = Feed(experiment, topology, opened, first_step=1)
                while not feed.source or feed.source.loader.state().epoch < 3:
                    feed.next_step()
                    if topology.sum_over_world(_number(feed)).item() >= 3:
                        break
                found.append([one["bad"] for one in feed.data_state().get("bad", ())])
                feed.close()
            except SicogError as error:
                found.append((type(error).__name__, error.exit_code, str(error)))
        results.append(found)
        stop_topology()
    return results


def _number(feed: Feed) -> Any:
    import torch

    return torch.tensor(feed.state().get("epoch", 0))


INPUTS = (("damaged", 0.05), ("damaged", 0.5), ("nowhere", 0.5))


@pytest.mark.slow
def test_what_one_replica_finds_is_judged_by_all_ranks(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "damaged", NUM_ROWS)
    saved = json.loads(
        json.dumps(open_rows(experiment_on(tmp_path / "damaged", 1.0)).state(LoaderState(0, 1, 0), 16, []))
    )
    for picture in sorted((tmp_path / "damaged" / "images").iterdir())[:4]:  # seen by the replica that decodes it
        picture.write_bytes(picture.read_bytes()[:-60])
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    main, other = run_ranks(_outcomes, 2, tmp_path, saved)
    for ours, theirs in zip(main, other, strict=True):
        kind, code, text = ours[0]
        assert (kind, code) == ("DataError", EXIT_GIVE_UP) and theirs[0][:2] == ("PeerError", EXIT_GIVE_UP)
        first, reason, advice = text.splitlines()
        counts = re.match(r"too many bad rows: ([234]) of \d+ rows are bad, .* at most 1 of the set's 24 rows$", first)
        assert counts and reason.startswith(f"  - {counts[1]} x image_truncated, first met at {tmp_path}/")
        assert advice.startswith("all are listed in ")
        assert sum(ours[1]) <= 8 and isinstance(
            ours[1], list
        )  # 4 of 24 in a pass may be, however many passes there are
        assert ours[2] == theirs[2] and ours[2][:2] == ("CheckpointError", EXIT_CONFIG)
        assert "data.jsonl: its 24 rows are in another order" in ours[2][2]
        assert ours[3] == theirs[3] and ours[3][:2] == ("ConfigError", EXIT_CONFIG)
        assert "nowhere/data.jsonl': does not exist" in ours[3][2]
    shutil.rmtree(tmp_path)
