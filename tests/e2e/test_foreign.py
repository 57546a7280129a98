"""A run that starts from foreign files says what it does otherwise than they ask, or ends with one message."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from sicog_mcore.errors import EXIT_CONFIG, EXIT_OK
from sicog_mcore.launcher import start_training
from sicog_mcore.stages import PRETRAIN
from tests.builders import TOKENIZER, tiny_experiment, write_dataset
from tests.checkpoint.foreign import experiment_for, write_decoder
from tests.checkpoint.test_weights import change_config, place_nan
from tests.e2e.runs import LAUNCHER

pytestmark = pytest.mark.slow


def write_tokenizer(folder: Path) -> str:
    """The tokenizer of the tests as a file that cuts and draws, with a configuration beside it that wants a token more."""
    content = json.loads(Path(TOKENIZER).read_text(encoding="utf-8"))
    content["model"]["dropout"] = 0.5
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    return str(folder)


def test_a_run_says_what_it_switches_off_and_ends_before_weights_that_are_no_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path, 4)
    weights = write_decoder(tmp_path / "weights", "qwen2")
    change_config(weights, glow=1)
    train = {"steps": 1, "tensorboard": False, "packs_per_step": 1}
    data = {"tokenizer": write_tokenizer(tmp_path)}
    experiment = tiny_experiment(tmp_path, output=str(tmp_path / "run"), train=train, data=data)
    decoder = replace(experiment_for("qwen2").model.decoder, vocab_size=600)
    experiment = replace(experiment, model=replace(experiment.model, decoder=decoder))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(experiment.to_dict()))
    arguments = [LAUNCHER, "--config", str(tmp_path / "run.yaml")]
    assert start_training(arguments, {}, PRETRAIN) == EXIT_OK
    printed = capsys.readouterr().out.replace("\n", "")
    assert printed.count("would cut every text: switched off") == 1
    assert printed.count("model {'dropout': 0.5} would write the same text differently") == 1
    assert printed.count("add_bos_token is True: transformers would put a token in front of every text") == 1
    arguments += [
        "--init.decoder",
        str(weights),
        "--output",
        str(tmp_path / "two"),
        "--model.decoder.vocab_size",
        "300",
    ]
    arguments += ["--data.tokenizer", _small(tmp_path)]
    assert start_training(arguments, {}, PRETRAIN) == EXIT_OK
    assert "'glow' = 1 is unknown here and not used" in capsys.readouterr().out.replace("\n", "")
    place_nan(weights, "model.layers.1.mlp.up_proj.weight", float("nan"))
    assert start_training([*arguments, "--output", str(tmp_path / "three")], {}, PRETRAIN) == EXIT_CONFIG
    (message,) = capsys.readouterr().err.splitlines()
    assert "NaN or infinite values in 1 tensors: model.layers.1.mlp.up_proj.weight in model.safetensors" in message


def _small(folder: Path) -> str:
    """A tokenizer of bytes and controls only, for a vocabulary of 300."""
    content = json.loads(Path(TOKENIZER).read_text(encoding="utf-8"))
    content["model"]["vocab"] = {token: i for token, i in content["model"]["vocab"].items() if i < 270}
    content["model"]["merges"] = []
    (folder / "small.json").write_text(json.dumps(content), encoding="utf-8")
    return str(folder / "small.json")
