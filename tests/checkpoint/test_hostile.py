"""A checkpoint from elsewhere runs nothing: whoever opens it, with whatever in it, gets one message."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from sicog_mcore.build import build_model, plan_build
from sicog_mcore.checkpoint.store import CheckpointStore, RunState
from sicog_mcore.config import Experiment
from sicog_mcore.errors import EXIT_CONFIG, CheckpointError, SicogError
from sicog_mcore.parallel.topology import start_topology, stop_topology
from sicog_mcore.train.step import NextToken, train_step
from tests.batches import random_batches
from tests.builders import TOKENIZER, tiny_experiment, write_dataset
from tests.checkpoint.hostile import HOSTILE, make_hostile, recommit
from tests.dist import Rank, run_ranks
from tools import convert

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Path]:
    """An experiment, and a checkpoint of step 3 of it."""
    root = tmp_path_factory.mktemp("source")
    write_dataset(root, 4)
    experiment = tiny_experiment(root, data={"token_budget": 512})
    (folder,) = run_ranks(_save, 1, experiment)
    return experiment, folder


def _save(rank: Rank, experiment: Experiment) -> Path:
    topology = rank.start(experiment.parallel)
    model = build_model(plan_build(experiment), topology)
    train_step(model, random_batches(experiment, 2), lr=1e-3, objective=NextToken())
    return CheckpointStore(experiment, topology).save(model, RunState(3))


def resume(experiment: Experiment, run: Path) -> None:
    experiment = replace(experiment, output=str(run))
    topology = start_topology(experiment.parallel, seed=0)
    store = CheckpointStore(experiment, topology)
    found = store.find()
    assert found.step == 3
    store.load(build_model(plan_build(experiment), topology), 3)


def load_without_a_search(experiment: Experiment, run: Path) -> None:
    """The second line: what a rank does whose files differ from those that rank 0 looked at."""
    experiment = replace(experiment, output=str(run))
    topology = start_topology(experiment.parallel, seed=0)
    CheckpointStore(experiment, topology).load(build_model(plan_build(experiment), topology), 3)


def start_from(experiment: Experiment, run: Path) -> None:
    experiment = replace(experiment, init=replace(experiment.init, checkpoint=str(run)))
    build_model(plan_build(experiment), start_topology(experiment.parallel, seed=0))


def fill_one_part(experiment: Experiment, run: Path) -> None:
    experiment = replace(
        experiment, init=replace(experiment.init, resampler=str(run / "checkpoints" / "step_00000003"))
    )
    build_model(plan_build(experiment), start_topology(experiment.parallel, seed=0))


def generate(experiment: Experiment, run: Path) -> None:
    from sicog_mcore.rollout.load import joined, load_model, read_checkpoint

    with joined(read_checkpoint(run, tokenizer=TOKENIZER), 1) as (build, topology):
        load_model(build, topology)


def measure_perplexity(experiment: Experiment, run: Path) -> None:
    from sicog_mcore.train.held_out import measure_losses

    init = replace(experiment.init, checkpoint=str(run))
    measure_losses(replace(experiment, init=init), start_topology(experiment.parallel, seed=0))


def by_command(*words: str) -> Callable[[Experiment, Path], None]:
    """tools/convert.py; raises what its exit code stands for."""

    def call(experiment: Experiment, run: Path) -> None:
        arguments = [word.replace("RUN", str(run)) for word in words]
        if (code := convert.main(arguments)) != 0:
            error = SicogError("by its exit code")
            error.exit_code = code
            raise error

    return call


TRUSTING = "load"
COMMANDS: dict[str, Callable[[Experiment, Path], None]] = {
    TRUSTING: load_without_a_search,
    "resume": resume,
    "init.checkpoint": start_from,
    "init.resampler": fill_one_part,
    "generate": generate,
    "perplexity": measure_perplexity,
    "inspect": by_command("inspect", "RUN"),
    "export": by_command("export", "--checkpoint", "RUN", "--out", "RUN/exported", "--tokenizer", TOKENIZER),
}


def outcomes(
    names: Iterable[str], experiment: Experiment, run: Path, environment: Mapping[str, str] = MappingProxyType({})
) -> dict[str, tuple[int, bool]]:
    """Exit code of each command, and whether a program has run by then; in a process of its own, for models stay behind."""
    (found,) = run_ranks(_outcomes, 1, list(names), experiment, run, dict(environment))
    return found


def _outcomes(
    _: Rank, names: list[str], experiment: Experiment, run: Path, environment: dict[str, str]
) -> dict[str, tuple[int, bool]]:
    os.environ.update(environment)
    return {name: (_outcome(COMMANDS[name], experiment, run), marker(run).exists()) for name in names}


def _outcome(command: Callable[[Experiment, Path], None], experiment: Experiment, run: Path) -> int:
    """Exit code; an exception that is none of ours is a traceback, and fails the test."""
    try:
        command(experiment, run)
    except SicogError as error:
        assert str(error)
        return error.exit_code
    finally:
        stop_topology()
    return 0


def marker(run: Path) -> Path:
    """Names the file that a program in a checkpoint would leave."""
    return run.with_name("ran")


def test_every_command_opens_the_real_one(source: Any, tmp_path: Path) -> None:
    experiment, folder = source
    shutil.copytree(folder, tmp_path / "run" / "checkpoints" / folder.name)
    assert outcomes(COMMANDS, experiment, tmp_path / "run") == dict.fromkeys(COMMANDS, (0, False))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_checkpoint_runs_nothing_and_is_one_message(name: str, source: Any, tmp_path: Path) -> None:
    experiment, folder = source
    make_hostile(name, tmp_path / "run", folder, marker(tmp_path / "run"))
    found = outcomes(COMMANDS, experiment, tmp_path / "run")
    assert not any(ran for _, ran in found.values())
    # Of the command that trusts another rank's look, only that it runs no program is asked.
    codes = {command: code for command, (code, _) in found.items() if command != TRUSTING}
    assert codes == dict.fromkeys(codes, EXIT_CONFIG)


def test_the_payloads_would_run(source: Any, tmp_path: Path) -> None:
    """A plain reader runs the programs in them; otherwise the test above proves nothing."""
    make_hostile("reduce_system", tmp_path / "run", source[1], tmp_path / "one")
    pickle.loads((tmp_path / "run" / "checkpoints" / source[1].name / ".metadata").read_bytes())
    make_hostile("in_common", tmp_path / "run", source[1], tmp_path / "two")
    torch.load(tmp_path / "run" / "checkpoints" / source[1].name / "common.pt", weights_only=False)
    assert (tmp_path / "one").exists() and (tmp_path / "two").exists()


def test_an_environment_that_asks_for_full_pickles_changes_nothing(source: Any, tmp_path: Path) -> None:
    make_hostile("in_common", tmp_path / "run", source[1], marker(tmp_path / "run"))
    found = outcomes([TRUSTING], source[0], tmp_path / "run", {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"})
    assert found == {TRUSTING: (EXIT_CONFIG, False)}


def test_a_state_of_fp8_is_not_handed_on(source: Any, tmp_path: Path) -> None:
    """Transformer Engine would open its bytes as a pickle."""
    from sicog_mcore.checkpoint.trusted_files import _require_no_extra_state

    state = torch.frombuffer(bytearray(pickle.dumps({"scale": 1})), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="fp8"):
        _require_no_extra_state({"model": {"decoder.layers.0._extra_state": state}}, tmp_path)
    _require_no_extra_state({"model": {"a._extra_state": None, "b._extra_state": torch.empty(0), "c": state}}, tmp_path)


def test_other_files_beside_it_are_never_opened(source: Any, tmp_path: Path) -> None:
    experiment, folder = source
    place = tmp_path / "run" / "checkpoints" / folder.name
    shutil.copytree(folder, place)
    (place / "notes.pkl").write_bytes(b"cposix\nsystem\n(S'touch never'\ntR.")
    assert outcomes(["resume"], experiment, tmp_path / "run") == {"resume": (0, False)}
    recommit(place)
    assert outcomes(["resume"], experiment, tmp_path / "run") == {"resume": (0, False)}
