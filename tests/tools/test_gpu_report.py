"""The report measures full packs of real slice geometry, and every number stands beside its device and versions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sicog_mcore.commands.device_speed import ANSWER_TOKENS, IMAGES, random_batch
from sicog_mcore.data.batch import IGNORED_LABEL
from sicog_mcore.presets import tiny, uhd_qwen2_0_5b
from tools.gpu_report import main


def test_batch_of_the_real_size_is_full_and_its_slices_have_336_px() -> None:
    experiment = uhd_qwen2_0_5b()
    batch = random_batch(experiment, seed=0)
    assert batch.num_tokens > 0.8 * experiment.data.token_budget or batch.num_slices > 24
    assert batch.num_images >= len(IMAGES) - 1 and batch.num_slices > 2 * batch.num_images
    assert int((batch.labels != IGNORED_LABEL).sum()) == ANSWER_TOKENS * batch.num_images
    pixels = batch.grids.prod(-1) * experiment.model.tower.patch_px**2
    assert pixels.max() <= 336**2 and pixels.float().mean() > 0.8 * 336**2
    assert torch.equal(batch.tokens, random_batch(experiment, seed=0).tokens)


@pytest.mark.slow
def test_report_is_one_line_and_a_json_file_with_device_and_versions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "cpu.json"
    assert main(["--preset", "tiny", "--packs", "1", "--out", str(out)]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("tiny, 1 packs of 1,024 tokens (") and "tokens/s" in line and "| cpu; Python " in line
    report = json.loads(out.read_text())
    assert report["device"] == "cpu" and report["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert len(report["step_s"]) == 10 and report["tokens_per_s"] > 0 and report["mfu"] is None
    assert report["pack_fill"] * tiny().data.token_budget == pytest.approx(random_batch(tiny(), 0).num_tokens)
