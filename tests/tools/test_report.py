"""The command writes one page, says what is in it, and names what it cannot use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sicog_mcore.checkpoint.commit import commit, step_folder, temporary_folder
from sicog_mcore.presets import tiny
from tests.browser import find_browser, open_browser
from tests.rounds import make_item, write_image, write_round
from tools.report import main

FORMAT = 1  # of state.json
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\u202e{{ 7 * 7 }}"
SLOWEST_S = 2.0
LARGEST_BYTES = 20_000_000


def arguments(folder: Path) -> list[str]:
    (folder / "images").mkdir(exist_ok=True, parents=True)
    return ["--round", str(folder), "--images", str(folder / "images"), "--preset", "tiny"]


def test_the_page_lies_in_the_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_round(tmp_path, [make_item("a", ["x", "y"]), make_item("b", [])])
    assert main([*arguments(tmp_path), "--max-items", "1"]) == 0
    size = (tmp_path / "report.html").stat().st_size
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}: 1 of 2 items, {size / 1e6:.1f} MB\n"
    assert not list(tmp_path.glob("*.partial"))


def test_drift_is_said_on_the_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rich = [make_item(f"i{i}", [f"thing {i} stands left of object {i * 7}", "x"], 0.8) for i in range(60)]
    poor = [make_item(f"i{i}", ["a picture of a thing on a table"] * 2, 1.0) for i in range(60)]
    before, now = write_round(tmp_path / "round_1", rich), write_round(tmp_path / "round_2", poor)
    out = tmp_path / "elsewhere" / "page.html"
    assert main([*arguments(now), "--previous", str(before), "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 60 of 60 items")
    assert main([*arguments(now), "--previous", str(before), "--out", str(out)]) == 0
    assert capsys.readouterr().out.endswith("; caption in round_2: alarm\n")


def test_sources_are_named_on_the_command_line(tmp_path: Path) -> None:
    item = make_item("a", ["x", "y"])
    elsewhere, round_ = write_round(tmp_path / "run", [item]), write_round(tmp_path / "round", [item])
    for name in ("generations.jsonl", "scores.jsonl"):
        (round_ / name).unlink()
    source = [str(elsewhere / "generations.jsonl"), str(elsewhere / "scores.jsonl")]
    assert main(arguments(round_)) == 2
    assert main([*arguments(round_), "--source", *source]) == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--max-items", "0"], "--max-items is 0; at least 1 is needed"),
        (["--thresholds", "85"], "each must lie between 0 and 1"),
        (["--previous", "nowhere"], "nowhere is no folder"),
        (["--checkpoint", "x"], "not allowed with argument"),
    ],
)
def test_a_mistake_is_named(change: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_round(tmp_path, [make_item("a", ["x", "y"])])
    with pytest.raises(SystemExit) as error:
        main([*arguments(tmp_path), *change])
    assert error.value.code == 2 and said in capsys.readouterr().err


def test_a_damaged_round_ends_with_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_round(tmp_path, [make_item("a", ["x", "y"])])
    (folder / "scores.jsonl").unlink()
    assert main(arguments(tmp_path)) == 2
    found = capsys.readouterr()
    assert found.out == "" and found.err.startswith("report: ") and "scores.jsonl does not exist" in found.err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_the_model_can_be_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = write_image(tmp_path / "images", "a.png", 224, 224)
    write_round(tmp_path, [make_item("a", ["x", "y"], **image)])
    step = step_folder(tmp_path / "run" / "checkpoints", 3)
    temporary_folder(step).mkdir(parents=True)
    command = [*arguments(tmp_path)[:-2], "--checkpoint"]
    assert main([*command, str(tmp_path / "run")]) == 2
    assert "has no committed checkpoint" in capsys.readouterr().err
    (temporary_folder(step) / "state.json").write_text(json.dumps({"format": FORMAT, "experiment": tiny().to_dict()}))
    commit(step)
    for path in (step, tmp_path / "run"):
        assert main([*command, str(path)]) == 0
        assert "2 × 2 slices of" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed")
def test_a_browser_opens_500_items_fast_filters_them_and_runs_nothing_foreign(tmp_path: Path) -> None:
    images = [write_image(tmp_path / "images", f"{'n' * i}.png", 480, 640) for i in range(1, 11)]
    text = "a cup stands on the table beside a spoon " * 25
    items = [make_item(f"i{i}", [f"{text}{n}" for n in range(3)], 0.9, **images[i % 10]) for i in range(460)]
    items += [make_item(f"d{i}", ["needle", HOSTILE], 0.6, reason="agreement", task="answer") for i in range(39)]
    items.append(make_item("f", [], question=HOSTILE))
    write_round(tmp_path, items)
    assert main(arguments(tmp_path)) == 0
    file = tmp_path / "report.html"
    assert file.stat().st_size < LARGEST_BYTES

    with open_browser(tmp_path / "profile") as page:
        page.size(1280, 900)
        assert any(page.show(file) < SLOWEST_S for _ in range(10))  # once the machine lets it
        shown = "document.getElementById('shown').textContent"
        count = "document.querySelectorAll('article:not([hidden])').length"
        assert page.value(shown) == "500 of 500 items"

        page.value("document.getElementById('search').focus()")
        for letter in "Needle":
            page.press(letter, letter)
        page.value("new Promise(done => setTimeout(done, 300))")
        assert page.value(shown) == "39 of 500 items" and page.value(count) == 39
        page.value("document.querySelector('#filters button').focus()")
        page.press("Enter", "\r")
        page.value("new Promise(done => setTimeout(done, 300))")
        assert page.value(count) == 500

        page.value("document.getElementById('low').focus()")
        for letter in "0.7":
            page.press(letter, letter)
        page.value("new Promise(done => setTimeout(done, 300))")
        assert page.value(count) == 460  # neither the low ones nor the one without a score
        page.value("document.querySelector('#filters button').click(), new Promise(done => setTimeout(done, 300))")
        page.value("document.querySelector('input[name=reason]').focus()")
        page.press(" ", " ")
        page.value("new Promise(done => setTimeout(done, 300))")
        assert page.value(count) == 40  # all that were not kept

        for width in (1280, 420):
            page.size(width, 900, dark=width == 420)
            assert page.value("document.documentElement.scrollWidth <= innerWidth")
        assert page.value("document.querySelectorAll('article img[onerror], article script').length") == 0
        assert all(address.startswith(("data:image/webp", file.as_uri())) for address in page.requests())
        happened = {event["method"] for event in page.events}
        assert not happened & {"Log.entryAdded", "Runtime.exceptionThrown", "Page.javascriptDialogOpening"}
