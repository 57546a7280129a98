"""A run that is started again on changed data: refused before it touches anything, or told and with a defined course."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from sicog_mcore.errors import EXIT_CONFIG, EXIT_OK
from sicog_mcore.launcher import start_training
from sicog_mcore.stages import PRETRAIN
from tests.builders import tiny_experiment, write_dataset
from tests.e2e.runs import LAUNCHER, consumed_ids

pytestmark = pytest.mark.slow
NUM_ROWS = 24


def _contents(folder: Path) -> dict[str, bytes]:
    """All files but the index, which holds what changed rows measure before they are compared."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0] != "index"]
    return {str(path): path.read_bytes() for path in files}


def test_a_run_on_changed_rows_is_refused_or_starts_an_epoch_or_takes_what_was_appended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_dataset(tmp_path, NUM_ROWS)
    output = tmp_path / "run"
    experiment = tiny_experiment(
        tmp_path,
        output=str(output),
        train={"packs_per_step": 1, "tensorboard": False},
        data={"token_budget": 512, "window_samples": 8, "workers": 0},
        checkpoint={"every_steps": 1, "keep_last": 9},
    )

    def start(steps: int, *more: str) -> tuple[int, str]:
        config = tmp_path / "run.yaml"
        config.write_text(yaml.safe_dump(experiment.to_dict()))
        code = start_training([LAUNCHER, "--config", str(config), "--train.steps", str(steps), *more], {}, PRETRAIN)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    assert start(2)[0] == EXIT_OK
    first, rows, before = consumed_ids(output), path.read_text(), _contents(output)
    left = NUM_ROWS - sum(map(len, first.values()))
    path.write_text("\n".join(reversed(rows.splitlines())))
    code, printed = start(3)
    assert code == EXIT_CONFIG and f"  - {path}: its 24 rows are in another order\n" in printed
    assert "Traceback" not in printed and _contents(output) == before

    new = {"id": "new", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}
    path.write_text(rows + json.dumps(new) + "\n")
    code, printed = start(3)
    assert code == EXIT_OK and "epoch 0 is finished on the 24 rows it began with, they join in epoch 1" in printed
    ids = [name for step in consumed_ids(output).values() for name in step]
    assert len(set(ids)) == len(ids) and "new" not in ids
    left -= len(consumed_ids(output)[3])

    code, printed = start(4, "--data.token_budget", "640", "--data.on_change", "restart_epoch")
    assert code == EXIT_OK and "data.token_budget: 512 -> 640" in printed
    assert f"the data starts anew at epoch 1; {left} rows of epoch 0 are skipped" in printed
    state_file = output / "checkpoints" / "step_00000004" / "state.json"
    state = json.loads(state_file.read_text())["state"]
    assert state["loader"]["epoch"] == 1 and state["data"]["rows_left"] == 25 - len(consumed_ids(output)[4])
