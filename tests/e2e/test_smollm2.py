"""A real pre-trained decoder, SmolLM2-135M-Instruct, in one step of alignment: frozen, it still teaches the resampler."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sicog_mcore.config import SourceConfig
from tests.builders import write_dataset
from tests.e2e.runs import train_ranks
from tests.tools.test_import_gguf import needs_wheel, smollm2_experiment
from tools import import_gguf

pytestmark = [pytest.mark.slow, needs_wheel]


def test_one_alignment_step_on_a_real_decoder(tmp_path: Path) -> None:
    decoder, data = tmp_path / "smollm2", tmp_path / "data"
    assert import_gguf.main(["--out", str(decoder)]) == 0
    write_dataset(data, 6)
    base = smollm2_experiment(decoder)
    experiment = replace(
        base,
        output=str(tmp_path / "run"),
        data=replace(
            base.data,
            sources=(SourceConfig(path=str(data / "data.jsonl"), images=str(data / "images")),),
            token_budget=512,  # two rows with the largest images do not fit
            max_bad_rate=0.5,
            workers=0,
        ),
        init=replace(base.init, decoder=str(decoder)),
        optim=replace(base.optim, lr=1e-3, freeze=("tower", "decoder")),
        train=replace(base.train, steps=2, samples_per_step=6, precision="fp32", tensorboard=False),
    )
    first, second = train_ranks(experiment, 1)
    # A random decoder starts at log(vocabulary), about 10.8; a pre-trained one knows the text already.
    assert first["loss"] < 5.0 and second["loss"] < first["loss"]
