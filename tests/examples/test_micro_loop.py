"""The micro loop's task, plan and statistics; nothing is trained here."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from examples.micro_loop import digits
from examples.micro_loop.document import write_document
from examples.micro_loop.first_candidate import keep_first
from examples.micro_loop.lanes import run_lanes, seconds_of
from examples.micro_loop.plan import ARMS, BASE, EQUAL, FAST, LONG, UNCURATED, Lane, Regime, ScriptOptions, plan_seed
from examples.micro_loop.results import Kept, Scores, SeedResult, measure_kept, paired
from sicog_mcore.cognition.codec import render
from sicog_mcore.cognition.loop.steps import WorkflowStep
from sicog_mcore.cognition.prompts import ask, find_prompt
from sicog_mcore.cognition.records import Candidate, Decision, Generation, PromptUse, write_records
from sicog_mcore.data.chat import Chat
from sicog_mcore.rollout.requests import Sampling

SMALL = {"labelled": 4, "unlabelled": 5, "validation": 3, "test": 3}


def test_no_digit_is_in_two_pools_and_the_test_is_the_same_for_every_seed() -> None:
    first, second = digits.draw_pools(0), digits.draw_pools(1)
    glyphs = [{picture.glyph for picture in pool} for pool in first.values()]
    assert [len(pool) for pool in glyphs] == list(digits.SIZES.values())
    assert len(set().union(*glyphs)) == sum(map(len, glyphs)) == 1797
    assert first["test"] == second["test"]
    assert {p.glyph for p in first["labelled"]} != {p.glyph for p in second["labelled"]}
    # Smaller pools take nothing from the test either.
    small = digits.draw_pools(0, SMALL)
    assert small["test"] == first["test"][:3]
    assert not {p.glyph for p in small["unlabelled"]} & glyphs[-1]


def test_pictures_say_the_truth_about_their_digits() -> None:
    target = load_digits().target
    for picture in digits.draw_pools(3)["validation"]:
        assert picture.digit == digits.NAMES[target[picture.glyph]]
        assert picture.caption == f"a {picture.ink} {picture.digit} on {picture.ground}"
        assert picture.steps[-1] == picture.caption


def test_renderings_of_a_digit_differ_in_colours_only() -> None:
    pools = digits.draw_pools(0, SMALL, renderings=3)
    glyphs = [picture.glyph for picture in pools["unlabelled"]]
    assert glyphs == glyphs[:5] * 3
    assert len({picture.id for picture in pools["unlabelled"]}) == 15
    assert pools["labelled"] == digits.draw_pools(0, SMALL)["labelled"]


def test_a_task_is_written_whole_and_views_move_its_pictures(tmp_path: Path) -> None:
    digits.write_task(tmp_path / "task", 7, SMALL)
    lines = {file.stem: file.read_text().splitlines() for file in (tmp_path / "task").glob("*.jsonl")}
    assert {name: len(rows) for name, rows in lines.items()} == {
        "labelled": 12,  # a plain description, a chain, and a conversation of three questions for each picture
        "unlabelled": 5,
        "unlabelled_truth": 10,
        "validation": 3,
        "validation_questions": 9,
        "test": 3,
        "test_questions": 9,
    }
    assert all("conversations" not in json.loads(row) for row in lines["unlabelled"])
    digits.write_views(tmp_path / "task", tmp_path / "views", 7)
    for row in lines["unlabelled"]:
        image = json.loads(row)["image"]
        assert (tmp_path / "views" / image).read_bytes() != (tmp_path / "task" / image).read_bytes()


def test_the_tokenizer_loses_nothing_and_writes_fixed_wordings_as_one_token(tmp_path: Path) -> None:
    digits.make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    chat = Chat(str(tmp_path / "tokenizer.json"), "plain", "")
    picture = digits.draw_pools(0, SMALL)["labelled"][0]
    chain = render(picture.steps, "cod")
    for text, length in ((picture.caption, 5), (chain, 19), (ask(find_prompt("cod"), "", 0), 1)):
        ids = chat.tokenizer.encode(text)
        assert (len(ids), chat.decode(ids)) == (length, text)
    assert chat.tokenizer.size <= 64  # model.decoder.vocab_size in model.yaml


def test_all_arms_but_the_base_take_equally_many_steps(tmp_path: Path) -> None:
    regime = Regime(pretrain_steps=30, finetune_steps=50)
    lanes = plan_seed(regime, 0, "test", tmp_path)
    assert len(lanes) == len(ARMS)
    for lane in lanes:
        trained = [step.options.values["train.steps"] for step in lane.steps if step.name[:5] == "stage"]
        assert sum(trained) == (50 if lane.after is None else 80)
    assert {LONG, EQUAL, BASE} <= ARMS.keys()


def test_what_a_step_reads_is_written_by_one_before_it(tmp_path: Path) -> None:
    for regime in (Regime(), FAST):
        first, *others = plan_seed(regime, 0, "test", tmp_path)
        for lane in others:
            written = [path for step in first.steps for path in step.outputs]
            for step in (*first.steps, *lane.steps) if lane is others[0] else lane.steps:
                own = [path for path in (*step.inputs, *step.images) if path.is_relative_to(tmp_path)]
                assert all(any(path.is_relative_to(out) for out in written) for path in own), step.name
                written += step.outputs


def test_no_two_steps_write_to_the_same_place(tmp_path: Path) -> None:
    places = [
        path
        for lane in plan_seed(Regime(), 0, "test", tmp_path)
        for step in lane.steps
        for path in (step.leftovers or step.outputs)
    ]
    for number, place in enumerate(places):
        assert not any(place.is_relative_to(other) for other in places[:number] + places[number + 1 :])


def _step(folder: Path, name: str, out: str, source: str) -> WorkflowStep:
    script = folder / f"{name}.py"
    script.write_text(source)
    options = ScriptOptions(())
    return WorkflowStep(name=name, verb=(str(script),), options=options, inputs=(script,), outputs=(folder / out,))


def test_lanes_run_in_order_once_and_a_failure_stops_what_comes_after(tmp_path: Path) -> None:
    grow = f"open({str(tmp_path / 'a')!r}, 'a').write('x')"
    first = Lane(tmp_path, (_step(tmp_path, "first", "a", grow),))
    good = Lane(
        tmp_path / "good", (_step(tmp_path, "good", "b", f"open({str(tmp_path / 'b')!r}, 'w').write('y')"),), tmp_path
    )
    bad = Lane(tmp_path / "bad", (_step(tmp_path, "bad", "c", "raise SystemExit(3)"),), tmp_path)
    never = Lane(tmp_path / "never", (_step(tmp_path, "never", "d", "1"),), tmp_path / "bad")
    assert not run_lanes([first, good, bad, never], 2)
    assert ((tmp_path / "a").read_text(), (tmp_path / "b").read_text()) == ("x", "y")
    assert not (tmp_path / "never").exists()
    assert run_lanes([first, good], 2)
    assert (tmp_path / "a").read_text() == "x"
    assert seconds_of([first, good]) > 0


def test_paired_intervals_are_those_of_students_t() -> None:
    found = paired([10.0, 20.0, 30.0, 40.0], [14.5, 22.1, 38.2, 50.9])
    # The prototype's figures: differences 4.5, 2.1, 8.2, 10.9 give 6.4 +- 6.2.
    assert found.mean == pytest.approx(6.425)
    assert found.half == pytest.approx(3.182446 * np.std([4.5, 2.1, 8.2, 10.9], ddof=1) / 2, rel=1e-6)
    assert round(found.half, 1) == 6.2
    assert found.is_above_zero
    assert not paired([1.0, 2.0], [2.0, 1.0]).is_above_zero
    assert math.isnan(paired([1.0], [2.0]).half)
    with pytest.raises(ValueError, match="no pairs"):
        paired([1.0], [2.0, 3.0])


def _generation(item: str, captions: list[str]) -> Generation:
    candidates = tuple(Candidate("caption", i, i, text, 5, -1.0, "stop") for i, text in enumerate(captions))
    prompts = (PromptUse("caption", 1, len(captions)),)
    return Generation(item, "caption", f"{item}.png", "0", "", prompts, "native", "0", Sampling(), 0, (9,), candidates)


def test_precision_is_of_the_chosen_and_random_is_of_all_candidates(tmp_path: Path) -> None:
    records = [
        _generation("a", ["a red two on gray", "a red two on navy", "a red six on gray", "two or six"]),
        _generation("b", ["a blue nine on gray"] * 4),
        _generation("c", ["a blue one on gray"] * 4),
    ]
    write_records(tmp_path / "generations.jsonl", records)
    kept = [Decision("a", True, "kept", chosen=1), Decision("b", True, "kept", chosen=0), Decision("c", False, "x")]
    write_records(tmp_path / "kept" / "decisions.jsonl", kept)
    found = measure_kept(tmp_path / "generations.jsonl", tmp_path / "kept", {"a": "two", "b": "four", "c": "one"})
    assert found == Kept(share=pytest.approx(200 / 3), precision=50.0, random=pytest.approx(50.0))
    assert found.gain == pytest.approx(0)
    assert [Kept(share, 80.0, 71.9).passes for share in (9.0, 50.0, 91.0)] == [False, True, False]
    assert not Kept(50.0, 79.8, 71.9).passes


def test_the_first_candidate_is_what_one_draw_would_have_given() -> None:
    record = replace(_generation("a", ["x", "y"]), prompt_tokens=(9, 8))
    record = replace(record, prompts=(*record.prompts, PromptUse("cod", 1, 3)))
    first = keep_first(record)
    assert first.prompts == (PromptUse("caption", 1, 1),)
    assert (first.candidates, first.prompt_tokens) == (record.candidates[:1], (9,))


def test_the_document_says_what_the_numbers_say() -> None:
    def seed(number: int, gain: float) -> SeedResult:
        arms = {BASE: 60.0, EQUAL: 61.0, UNCURATED: 65.0 + number % 2, "curated 0.9": 61.0 + gain, "oracle": 80.0}
        arms["curated 0.8"] = 61.0 - gain
        kept = {"curated-0.9": Kept(50.0, 80.0 + number, 65.0)}
        return SeedResult(number, {arm: Scores(value, 90.0, 70.0) for arm, value in arms.items()}, kept)

    text = write_document([seed(0, 3.0), seed(1, 4.0), seed(2, 5.0)], Regime(), "test", 120.0)
    assert "| curated 0.9 | 65.0 | +4.0 ± 2.5 | +5.0 ± 2.5 | -0.3 ± 2.9 | 90.0 | 70.0 |" in text
    assert "| curated-0.9 | 50.0 | 81.0 | 65.0 | +16.0 ± 2.5 | +15.0, +16.0, +17.0 | 3 of 3 |" in text
    assert "Goal for `curated 0.9`: +4.0 ± 2.5 points of digits against equal steps: it helps." in text
    assert (
        "`curated 0.9` against uncurated: -0.3 ± 2.9: what the selection itself brings: no difference is shown." in text
    )
    assert "These are 2 intervals: were none of the arms better, in up to 5 % of such experiments" in text
    assert "Gate for `curated-0.9`: holds (3 of 3 seeds)." in text
    assert "no difference is shown" in write_document([seed(0, -3.0), seed(1, 4.0)], Regime(), "test", 0.0)
    assert "it harms" in write_document([seed(0, -3.0), seed(1, -3.1)], Regime(), "test", 0.0)
    alone = write_document([seed(0, 3.0)], Regime(), "test", 0.0)
    assert "one seed says nothing" in alone and "nan" not in alone
