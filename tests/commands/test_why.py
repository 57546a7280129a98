"""Why a row is there, as a value: the item's records, and the steps that consumed its rows."""

from __future__ import annotations

import json
from pathlib import Path

from sicog_mcore.cognition.curation.curated_round import curate
from sicog_mcore.commands.why import WhyOptions, explain
from tests.curation import Said, curation, item, write_round


def test_an_explanation_has_records_and_steps(tmp_path: Path) -> None:
    said = (Said("caption", "A cup on a table.", 0.9), Said("caption", "A mug on a table.", 0.8))
    folder = write_round(tmp_path, [item(tmp_path, "shelf", said), item(tmp_path, "other", said, 1)])
    curate(curation(tmp_path, [folder], forms=("chain",)), folder)
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"step": step, "ids": ids} for step, ids in ((1, ["shelf#chain"]), (4, ["x", "shelf#chain"]), (5, ["y"]))]
    (run / "consumed-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = explain(WhyOptions(sample="shelf#chain", round=folder, run=(run,)))
    assert (found.origin.generation.id, found.origin.decision.id) == ("shelf", "shelf")
    assert len(found.origin.scores) == 1 and len(found.origin.scores[0].scores) == 2
    assert found.consumed[run]["shelf#chain"] == [1, 4]
    assert set(found.consumed[run]) == set(found.origin.row_ids)
