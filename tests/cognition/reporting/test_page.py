"""The page shows everything, says nothing that the files do not, and lets nothing in from them but text."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sicog_mcore.cognition.records import write_records
from sicog_mcore.cognition.reporting.page import LONGEST_TEXT, ReportOptions, build_report, heat, read_funnel, visible
from sicog_mcore.cognition.reporting.rounds import RoundItem
from sicog_mcore.errors import RecordError
from sicog_mcore.presets import uhd_qwen2_7b
from tests.rounds import make_item, write_image, write_round

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\" onmouseover='alert(1)' x=\"",
    "javascript:alert(1) {{ 7 * 7 }} {% raw %}",
    "\u202egnp.exe\u202c \u0000\u0007\u001b[31m",
    "</p></article></style><!-- <![CDATA[ &lt;b&gt;",
    "<svg onload=alert(1)><use href='data:x'/></svg>",
)
BYTES_PER_ITEM = 40_000  # 500 items stay below 20 MB
VOID = {"meta", "img", "input", "link", "br"}


class Reader(HTMLParser):
    """Elements with their attributes, and the text outside of style and script."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.raw = "", Counter[str]()
        self._open: list[str] = []
        self.unbalanced: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("style", "script"):
            self.raw[self._open[-1]] += 1
            return
        self.text += f" {data} "

    def shape(self) -> list[tuple[str, tuple[str, ...]]]:
        return [(tag, tuple(sorted(attributes))) for tag, attributes in self.elements]


def options_for(folder: Path, **fields: object) -> ReportOptions:
    return replace(ReportOptions(images=folder / "images", experiment=uhd_qwen2_7b()), **fields)  # type: ignore[arg-type]


def page(folder: Path, items: Sequence[RoundItem], **fields: object) -> str:
    return build_report(write_round(folder, items), options_for(folder, **fields)).html


def poisoned(poison: str) -> list[RoundItem]:
    """One item with the same text everywhere a row of data can hold one."""
    first = make_item(poison, [f"one {poison} end", poison], 0.7, question=poison, image=poison)
    generation = replace(
        first.generation,
        engine=poison,
        checkpoint=poison,
        detail=poison,
        candidates=tuple(replace(candidate, prompt=poison) for candidate in first.generation.candidates),
        prompts=(replace(first.generation.prompts[0], id=poison),),
    )
    scores = replace(first.scores, scorer=poison, clauses=(f"{poison} end", None))
    decision = replace(first.decision, reason=poison, kept=False, detail=poison, rows=(poison,))
    return [RoundItem(generation, scores, decision)]


@pytest.mark.parametrize("poison", HOSTILE)
def test_no_element_and_no_attribute_comes_from_the_data(poison: str, tmp_path: Path) -> None:
    plain = Reader(page(tmp_path / "plain", poisoned("plain")))
    html = page(tmp_path / "hostile", poisoned(poison))
    found = Reader(html)
    assert found.shape() == plain.shape()
    assert found.unbalanced == plain.unbalanced == []
    assert found.raw == {"style": 1, "script": 1}
    assert " ".join(visible(poison).split()) in " ".join(found.text.split())
    own = {"id", "class", "name", "type", "for", "href", "src", "data-reason", "data-task", "data-score"}
    for tag, attributes in found.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        assert all("alert" not in (attributes.get(name) or "") for name in own), tag


def test_odd_characters_are_shown_by_number() -> None:
    assert visible("a\u202eb\u0000c\ud800 d\n\te\u200df é 漢 🙂") == "a⟨U+202E⟩b⟨U+0000⟩c⟨U+D800⟩ d\n\te\u200df é 漢 🙂"


def test_the_policy_admits_our_style_and_script_and_nothing_else(tmp_path: Path) -> None:
    html = page(tmp_path, [make_item("a", ["x", "y"])])
    (policy,) = (a["content"] for tag, a in Reader(html).elements if a.get("http-equiv") == "Content-Security-Policy")
    for tag in ("style", "script"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in str(policy)
    assert str(policy).startswith("default-src 'none'; img-src data:;") and "unsafe" not in str(policy)
    addresses = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert all(address.startswith(("data:image/webp;base64,", "#")) for address in addresses)
    assert "http://" not in html and "https://" not in html


def test_equal_files_give_equal_bytes(tmp_path: Path) -> None:
    image = write_image(tmp_path / "images", "a.png", 480, 640)
    items = [make_item("a", ["x", "y"], **image), make_item("b", [])]
    assert page(tmp_path, items) == page(tmp_path, items)


def test_slices_are_drawn_where_the_model_cuts(tmp_path: Path) -> None:
    image = write_image(tmp_path / "images", "a.png", 480, 640)
    html = page(tmp_path, [make_item("a", ["x", "y"], **image)])
    assert '<svg class="slices" viewBox="0 0 640 480" preserveAspectRatio="none"' in html
    lines = re.findall(r'<line x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)" y2="([\d.]+)"/>', html)
    assert [tuple(map(float, line)) for line in lines] == 2 * [(320, 0, 320, 480), (0, 240, 640, 240)]
    text = " ".join(Reader(html).text.split())
    assert (
        "640 × 480 px (width × height); 2 × 2 slices of 378 × 280 px, overview 378 × 280 px; 745 visual tokens" in text
    )


def test_a_missing_image_is_a_placeholder_with_its_reason(tmp_path: Path) -> None:
    html = page(tmp_path, [make_item("a", ["x", "y"], image="gone.png", image_hash="00")])
    assert 'class="placeholder"' in html and "image_missing" in Reader(html).text and "<img" not in html


def test_an_image_that_is_another_one_by_now_is_marked(tmp_path: Path) -> None:
    image = write_image(tmp_path / "images", "a.png", 20, 20)
    changed = "the file has changed since it was described"
    assert changed not in page(tmp_path, [make_item("a", ["x", "y"], **image)])
    assert changed in page(tmp_path, [make_item("a", ["x", "y"], **(image | {"image_hash": "00"}))])


def test_every_number_of_an_item_is_shown(tmp_path: Path) -> None:
    item = make_item("set/1", ["a red cup", "a blue cup", "a cup"], 0.8125)
    text = " ".join(Reader(page(tmp_path, [item])).text.split())
    for part in (
        "set/1",
        "What is there?",
        "a red cup",
        "a blue cup",
        "score 0.812",
        "3 tokens",
        "log p −1.50 (−0.50 per token)",
    ):
        assert part in text
    for part in ("native 1", "c0ffee", "temperature 0.7", "3 × cod (version 1)", "tfidf", "training rows: set/1#chain"):
        assert part in text
    assert "1 1.00 0.72 0.72 0.812" in text  # the first row of the matrix and its mean
    assert text.index("1 cod 0 chosen") < text.index("3 cod 2 rejected")


def test_what_was_compared_is_marked(tmp_path: Path) -> None:
    item = make_item("a", ["Step 1: cup. Step 2: a red cup", "nothing"])
    item = replace(item, scores=replace(item.scores, clauses=("a red cup", None)))
    html = page(tmp_path, [item])
    assert "Step 1: cup. Step 2: <mark>a red cup</mark></p>" in html
    assert "has no part that could be compared" in html


def test_a_normalised_clause_is_told_apart(tmp_path: Path) -> None:
    item = make_item("a", ["It is TWO.", "two"])
    item = replace(item, scores=replace(item.scores, clauses=("2", "2")))
    assert "compared: 2" in Reader(page(tmp_path, [item])).text


def test_a_long_text_is_cut_and_says_so(tmp_path: Path) -> None:
    html = page(tmp_path, [make_item("a", ["w" * (LONGEST_TEXT + 7), "x"])])
    assert "7 more characters in the records" in html and "w" * (LONGEST_TEXT + 1) not in html


def test_the_funnel_is_shown_filter_by_filter(tmp_path: Path) -> None:
    items = [make_item(f"k{i}", ["a", "b"]) for i in range(3)]
    items += [make_item("d", ["a", "b"], 0.5, reason="agreement", task="answer"), make_item("f", [])]
    text = " ".join(Reader(page(tmp_path, items)).text.split())
    assert "stage reason caption answer all left in 4 1 5 5" in text
    assert "own agreement −1 −1 4 own image_missing −1 −1 3 kept 3 0 3 60.0 %" in text
    assert "image_radius 4" in text and "Training rows: 3 chain." in text


def test_thresholds_of_the_curation_stand_beside_those_asked_for(tmp_path: Path) -> None:
    items = [make_item("a", ["a", "b", "c"], 0.9), make_item("b", ["a", "b", "c"], 0.7, reason="agreement")]
    html = page(tmp_path, items, thresholds=(0.8,))
    text = " ".join(Reader(html).text.split())
    assert "0.8 1 50.0 % 0.700 0.87 used 1 50.0 % 0.805 0.93 used 0 0.0 % 0.895" in text
    assert html.count('<line class="threshold used"') == 2 and html.count('<line class="threshold"') == 1


def test_of_many_items_a_stated_sample_is_shown(tmp_path: Path) -> None:
    items = [make_item(f"k{i}", ["a", "b"]) for i in range(30)] + [make_item("f", [])]
    report = build_report(write_round(tmp_path, items), options_for(tmp_path, max_items=10, seed=3))
    text = " ".join(Reader(report.html).text.split())
    assert (report.items, report.shown) == (31, 10) and report.html.count("<article") == 10
    assert "10 of 31 items are shown: drawn with seed 3" in text
    assert "kept 9 of 30" in text and "image_missing 1" in text


def test_a_collapse_is_announced_at_the_top(tmp_path: Path) -> None:
    rich = [make_item(f"i{i}", [f"thing {i} stands left of object {i * 7}", "x"], 0.8) for i in range(60)]
    poor = [make_item(f"i{i}", ["a picture of a thing on a table"] * 2, 1.0) for i in range(60)]
    before, now = write_round(tmp_path / "r1", rich), write_round(tmp_path / "r2", poor)
    report = build_report(now, options_for(tmp_path, max_items=1), [before])
    assert [drift.verdicts[-1].level for drift in report.drifts] == ["alarm"]
    text = " ".join(Reader(report.html).text.split())
    assert "Collapse alarm: caption" in text and "r1 r2 verdict first alarm items 60 60" in text
    calm = build_report(before, options_for(tmp_path, max_items=1), [before])
    assert "Collapse alarm" not in calm.html and "Drift between rounds" in calm.html


def test_rounds_of_the_same_name_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    folders = [write_round(tmp_path / name / "round", [make_item("a", ["x", "y"])]) for name in ("first", "second")]
    report = build_report(folders[1], options_for(tmp_path), folders[:1])
    assert report.drifts[0].names == ("first/round", "second/round")


def test_a_funnel_that_does_not_add_up_is_refused(tmp_path: Path) -> None:
    folder = write_round(tmp_path, [make_item("a", ["x", "y"])], kept=7)
    with pytest.raises(RecordError, match="1 items are left by the filters but 7 were kept"):
        read_funnel(folder / "funnel.json")


def test_a_round_without_items_is_refused(tmp_path: Path) -> None:
    folder = write_round(tmp_path, [])
    with pytest.raises(RecordError, match="has no items"):
        build_report(folder, options_for(tmp_path))


def test_a_broken_funnel_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_round(tmp_path, [make_item("a", ["x", "y"])])
    (folder / "funnel.json").write_text('{"in": 1}')
    with pytest.raises(RecordError, match=r"funnel\.json cannot be read \(KeyError: 'tasks'\); curate again"):
        build_report(folder, options_for(tmp_path))


def test_items_with_the_worst_images_and_long_texts_stay_small(tmp_path: Path) -> None:
    image = write_image(tmp_path / "images", "noise.png", 480, 640)
    text = "a word that is long " * 150  # 3000 characters
    items = [make_item(f"i{i}", [f"{text}{n}" for n in range(3)], **image) for i in range(3)]
    few, many = (len(page(tmp_path, items[:n]).encode()) for n in (1, 3))
    assert (many - few) / 2 < BYTES_PER_ITEM


def test_levels_of_the_heat_are_a_twentieth_wide() -> None:
    assert [heat(value) for value in (-1, 0.5, 0.549, 0.55, 0.6, 0.999999, 1.0)] == [0, 0, 0, 1, 2, 9, 10]


def test_scores_without_a_winner_are_shown(tmp_path: Path) -> None:
    item = make_item("a", ["Step 1", "Step 2"], reason="no_clause")
    scores = replace(item.scores, clauses=(None, None), winner=-1, agreement=0.0, failure="no_clause")
    folder = write_round(tmp_path, [item])
    write_records(folder / "scores.jsonl", [scores])
    html = build_report(folder, options_for(tmp_path)).html
    assert '<span class="badge is-failed">no_clause</span>' in html and "No item has a winner." in html
