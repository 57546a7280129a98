"""Rows that have no index are measured as the encoder says, and the bad ones are told with their reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sicog_mcore.data.encode import Encoder
from sicog_mcore.data.measure_rows import measure_rows
from sicog_mcore.data.sources import open_sources
from tests.builders import tiny_experiment, write_dataset


def test_every_row_is_measured_or_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, 12)
    (tmp_path / "images" / "s3.png").unlink()
    experiment = tiny_experiment(tmp_path)
    samples = open_sources(experiment.data.sources, experiment.data)
    encoder = Encoder(experiment.model, experiment.data)
    sizes, refused = measure_rows(samples, encoder)
    assert len(sizes) == 12 and sizes.shards.tolist() == [0, 12]
    assert [(one.id, one.reason, one.origin) for one in refused] == [
        ("s3", "image_missing", f"{tmp_path}/data.jsonl:4")
    ]
    assert np.flatnonzero(sizes.reason).tolist() == [3] and sizes.reasons == ("", "image_missing")
    for row in (0, 2, 11):
        encoded = encoder.encode(samples.read(row))
        assert sizes.num_tokens[row] == len(encoded.tokens) and sizes.num_slices[row] == len(encoded.grids)
        assert sizes.attention[row] == len(encoded.tokens) ** 2


def test_no_rows_have_empty_sizes(tmp_path: Path) -> None:
    write_dataset(tmp_path, 1)
    experiment = tiny_experiment(tmp_path)
    sizes, refused = measure_rows(open_sources([], experiment.data), Encoder(experiment.model, experiment.data))
    assert len(sizes) == 0 and refused == [] and sizes.shards.tolist() == [0, 0]
