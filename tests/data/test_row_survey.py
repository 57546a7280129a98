"""Notes on rows are counted once and said in a few lines, however many rows and names there are."""

from __future__ import annotations

from sicog_mcore.data.row_keys import PAIR_KEYS, ROW_KEYS
from sicog_mcore.data.row_survey import MAX_DISTINCT, MAX_NOTES, MAX_PLACE_CHARS, NameCounts, RowSurvey, escaped

TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


def test_occurrences_are_counted_with_their_first_place() -> None:
    counts = NameCounts("others")
    for line in (3, 4, 9):
        counts.add("a", "text of a", "x.jsonl", line)
    counts.add("b", "text of b", "y.tar", "s1", unit="sample")
    assert list(counts.notes()) == [
        "text of a: 3 rows, first at x.jsonl:3",
        "text of b: 1 sample, first at y.tar:s1",
    ]


def test_notes_and_memory_are_bounded() -> None:
    counts = NameCounts("other names")
    for number in range(3 * MAX_DISTINCT):
        counts.add(f"n{number}", f"n{number}", "x", number)
    notes = list(counts.notes())
    assert len(notes) == MAX_NOTES
    assert notes[0] == f"other names: {2 * MAX_DISTINCT:,} rows, first at x:{MAX_DISTINCT}"
    rest = MAX_DISTINCT + 1 - (MAX_NOTES - 1)
    assert notes[-1] == f"{rest:,} more of this kind, the most frequent of them: n4: 1 row, first at x:4"


def test_refusals_come_before_remarks_and_unused_keys() -> None:
    survey = RowSurvey(ROW_KEYS)
    survey.add_row({"id": "a", "conversations": TURNS, "colour": 1}, 0, "x.jsonl", 1)
    survey.add_row({"id": "b", "colour": 2}, 0, "x.jsonl", 2)
    survey.remark("its end is cut off", "x.jsonl", 2)
    refused, remark, unused = survey.notes()
    assert refused.startswith("refused: no key 'conversations'") and refused.endswith("1 row, first at x.jsonl:2")
    assert remark == "its end is cut off: 1 sample, first at x.jsonl:2"
    assert unused == "key 'colour' is not used: 2 rows, first at x.jsonl:1"


def test_rows_that_are_used_whole_say_nothing() -> None:
    survey = RowSurvey(ROW_KEYS)
    survey.add_row({"id": "a", "image": "a.png", "conversations": TURNS}, 1, "x.jsonl", 1)
    assert survey.notes() == []


def test_rows_that_weigh_more_or_less_are_said_with_number_and_range() -> None:
    survey, rest, pairs = RowSurvey(ROW_KEYS), RowSurvey(ROW_KEYS), RowSurvey(PAIR_KEYS)
    for line, weight in enumerate((1, 2, 0.5, None, 1.0), start=1):
        survey.add_row({"conversations": TURNS, "weight": weight}, 0, "x.jsonl", line)
    rest.add_row({"conversations": TURNS, "weight": 3}, 0, "y.jsonl", 1)
    survey.merge(rest.state(), "y.jsonl", 7)
    assert survey.notes() == [
        "losses are multiplied by the row's key 'weight', from 0.5 to 3: 3 rows, first at x.jsonl:2"
    ]
    survey.add_row({"conversations": TURNS, "weight": -1}, 0, "x.jsonl", 9)
    assert "from 0.5 to 3: 3 rows" in survey.notes()[0] and "-1, expected a number" in survey.notes()[1]
    pairs.add_row({"conversations": TURNS, "chosen": "a", "rejected": "b", "weight": 2}, 0, "x.jsonl", 1)
    assert not any("multiplied by the row's" in note for note in pairs.notes())


def test_a_place_is_one_printable_line_of_bounded_length() -> None:
    assert escaped("a\x1b[31m\n") == "a\\x1b[31m\\n"
    assert escaped("y" * 5 + "x" * MAX_PLACE_CHARS) == "..." + "x" * MAX_PLACE_CHARS
