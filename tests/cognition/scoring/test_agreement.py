"""Scores equal a reference written out in fp64; what cannot be compared never wins; each rule by hand-made cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sicog_mcore.cognition.records import Generation, Scores, read_records, write_records
from sicog_mcore.cognition.scoring.agreement import THRESHOLDS, Across, ScoredItem, Tally, others, read_items, score
from sicog_mcore.cognition.scoring.embed import TfIdf
from sicog_mcore.cognition.scoring.similarity import Cosine, Similarity, Vote
from sicog_mcore.errors import RecordError
from tests.cognition.agreeing import Written, failed, generation, in_steps

ROUNDING = 6e-7  # half of the last digit of the matrix, and fp32 vectors; scores are means of it


def verdicts(
    tmp_path: Path, rows: Sequence[Generation], similarity: Similarity | None = None, across: Across = "styles"
) -> list[ScoredItem]:
    write_records(tmp_path / "g.jsonl", rows)
    return list(score(read_items(tmp_path / "g.jsonl", {}), similarity or Cosine(Written()), across))


def one(tmp_path: Path, row: Generation, similarity: Similarity | None = None, across: Across = "styles") -> Scores:
    return verdicts(tmp_path, [row], similarity, across)[0].scores


def reference(texts: Sequence[str]) -> tuple[list[list[float]], list[float], int]:
    """Matrix, scores and winner with Python's own numbers, from the definition."""
    vectors = [[float(value) for value in text.split(",")] for text in texts]
    norms = [math.sqrt(math.fsum(x * x for x in v)) for v in vectors]
    matrix = [
        [math.fsum(x * y for x, y in zip(a, b, strict=True)) / (n * m) for b, m in zip(vectors, norms, strict=True)]
        for a, n in zip(vectors, norms, strict=True)
    ]
    scores = [math.fsum(row) / len(texts) for row in matrix]
    return matrix, scores, scores.index(max(scores))


@pytest.mark.parametrize(
    "texts",
    [
        ["3,4,0", "0,5,12", "8,15,0", "-1,2,2"],
        ["1,0", "0,1", "1,0", "3,4"],  # a duplicate
        ["-1,0.001", "1,0", "0.2,-1"],  # negative similarities
        [f"{i % 7 - 3},{i % 5 + 1},{i % 3}" for i in range(12)],
    ],
)
def test_scores_equal_the_reference_in_fp64(texts: list[str], tmp_path: Path) -> None:
    matrix, scores, winner = reference(texts)
    found = one(tmp_path, generation("a", texts))
    assert found.clauses == tuple(texts)
    assert np.abs(np.array(found.matrix) - matrix).max() <= ROUNDING
    assert all(value == round(value, 6) for row in found.matrix for value in row)
    assert np.abs(np.array(found.scores) - scores).max() <= ROUNDING
    assert (found.winner, found.agreement) == (winner, found.scores[winner])
    assert found.scores == tuple(
        sum(round(value * 10**6) for value in row) / (len(texts) * 10**6) for row in found.matrix
    )


@pytest.mark.parametrize("texts", [["1,0", "0,1"], ["1,0,0", "0,1,0", "0,0,1"], ["0,1", "1,0", "1,0", "0,1"]])
def test_the_first_of_equals_wins(texts: list[str], tmp_path: Path) -> None:
    assert one(tmp_path, generation("a", texts)).winner == 0


def test_ties_are_ties_whatever_the_order_of_the_sums(tmp_path: Path) -> None:
    class Tied:
        name = "tied"

        def matrix(self, texts: Sequence[str]) -> np.ndarray:
            # Sums of floats differ here: 1 + 0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1 + 1 in fp64.
            pairs = {(0, 1): 0.1, (0, 2): 0.2, (0, 3): 0.3, (1, 2): 0.3, (1, 3): 0.2, (2, 3): 0.1}
            values = np.eye(4)
            for (i, j), value in pairs.items():
                values[i, j] = values[j, i] = value
            return values

    found = one(tmp_path, generation("a", ["a", "b", "c", "d"]), Tied())
    assert (found.scores, found.winner) == ((0.4,) * 4, 0)


def test_one_candidate_agrees_with_itself(tmp_path: Path) -> None:
    [verdict] = verdicts(tmp_path, [generation("a", ["3,4"])])
    assert (verdict.scores.matrix, verdict.scores.scores) == (((1.0,),), (1.0,))
    assert (verdict.scores.winner, verdict.scores.agreement, verdict.voters) == (0, 1.0, 1)


def test_the_self_term_follows_the_identity(tmp_path: Path) -> None:
    found = one(tmp_path, generation("a", ["3,4,0", "0,5,12", "8,15,0"]))
    n, best = 3, found.winner
    to_others = (sum(found.matrix[best]) - 1) / (n - 1)
    assert others(found.agreement, n) == pytest.approx(to_others, abs=1e-12)
    assert [round(others(tau, 3), 3) for tau in (0.9, 0.85, 0.8)] == [0.85, 0.775, 0.7]
    assert [round(others(tau, 6), 3) for tau in (0.9, 0.85, 0.8)] == [0.88, 0.82, 0.76]
    assert [round(others(tau, 9), 4) for tau in (0.9, 0.85, 0.8)] == [0.8875, 0.8312, 0.775]


def test_only_the_last_step_of_a_chain_is_compared(tmp_path: Path) -> None:
    found = one(tmp_path, generation("a", ["3,4"], [in_steps("3,4"), in_steps("4,3")]))
    assert found.clauses == ("3,4", "4,3", "3,4")
    assert found.matrix[0] == (1.0, 0.96, 1.0)
    assert found.winner == 0  # an index into the candidates, so the whole chain of the winner is known


def test_what_cannot_be_compared_lowers_the_others_and_never_wins(tmp_path: Path) -> None:
    row = generation("a", ["3,4", "3,4", " "], ["no steps at all", in_steps("1,0")], cut=[1, 2])
    found = one(tmp_path, row)
    assert found.clauses == (None, None, None, "3,4", None)
    assert found.matrix[3] == (0.0, 0.0, 0.0, 1.0, 0.0)
    assert found.scores == (0.0, 0.0, 0.0, 0.2, 0.0)
    assert (found.winner, found.agreement, found.failure) == (3, 0.2, "")


def test_a_candidate_unlike_all_others_still_beats_a_silent_one(tmp_path: Path) -> None:
    found = one(tmp_path, generation("a", ["-1,0", "1,0", "-0.1,1", "0.1,1"], ["no steps"], cut=[1, 2]))
    assert found.winner >= 3 and found.failure == ""
    against = one(tmp_path, generation("a", ["x"], ["no steps"]), Against())
    assert (against.scores, against.winner) == ((0.0, 0.5), 1)


class Against:
    name = "against"

    def matrix(self, texts: Sequence[str]) -> np.ndarray:
        return np.eye(len(texts))


@pytest.mark.parametrize(
    "row",
    [generation("a", ["", "  "]), generation("a", ["1,0"], cut=[0]), generation("a", steps=["?"]), generation("a")],
)
def test_nothing_to_compare_is_a_failure_of_its_own(row: Generation, tmp_path: Path) -> None:
    found = one(tmp_path, row)
    assert (found.winner, found.agreement, found.failure) == (-1, 0.0, "no_clause")
    assert len(found.clauses) == len(found.scores) == len(row.candidates)


def test_failed_items_stay_in_their_rows(tmp_path: Path) -> None:
    rows = [generation("a", ["1,0"]), failed(generation("b", ["1,0"])), generation("c", ["0,1"])]
    found = verdicts(tmp_path, rows)
    assert [(v.scores.id, v.scores.failure, v.voters) for v in found] == [
        ("a", "", 1),
        ("b", "decode_error", 0),
        ("c", "", 1),
    ]
    write_records(tmp_path / "s.jsonl", (v.scores for v in found))
    assert list(read_records(tmp_path / "s.jsonl", Scores)) == [v.scores for v in found]


def test_equal_clauses_of_an_item_are_compared_once(tmp_path: Path) -> None:
    written = Written()
    one(tmp_path, generation("a", ["1,0", "0,1", "1,0", "1,0"]), Cosine(written))
    assert written.asked == ["1,0", "0,1"]


def test_a_similarity_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="written gave a similarity that is not a number for 'nan,1'"):
        one(tmp_path, generation("a", ["nan,1", "1,0"]))


def test_within_styles_candidates_meet_only_their_own_kind(tmp_path: Path) -> None:
    steps = [in_steps("1,0"), in_steps("3,4"), in_steps("4,3")]
    row = generation("a", ["0,1", "0,1"], steps)
    [verdict] = verdicts(tmp_path, [row], across="within")
    found = verdict.scores
    assert found.matrix[0][3] == 0.0 and found.matrix[1][3] == 0.8  # still shown
    assert found.scores == pytest.approx((2.4 / 3, 2.56 / 3, 2.76 / 3, 1.0, 1.0), abs=ROUNDING)
    assert (found.winner, verdict.voters) == (3, 2)
    assert one(tmp_path, row).winner == 1  # the other rule, another winner
    assert found.scorer == "written; across within"


def test_within_styles_the_mean_over_the_others_decides_between_styles_of_different_size(tmp_path: Path) -> None:
    # 2 plain: (1 + 0.6) / 2 = 0.80, others 0.60. 3 in steps: (1 + 0.7 + 0.7) / 3 = 0.80, others 0.70.
    steps = [in_steps("1,0,0"), in_steps("0.7,0.714142842854285,0"), in_steps("0.7,-0.714142842854285,0")]
    row = generation("a", ["0,0.6,0.8", "0,0,1"], steps)
    found = one(tmp_path, row, across="within")
    assert found.scores[0] == pytest.approx(0.8, abs=ROUNDING) and found.scores[3] == pytest.approx(0.9, abs=ROUNDING)
    assert found.winner == 3
    row = generation("a", ["0,0.6,0.8", "0,1,0"], steps)  # the plain ones are 0.6 alike
    assert one(tmp_path, row, across="within").winner == 0


def test_within_styles_a_style_of_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RecordError, match="'a': the only candidate of style 'plain' cannot be compared within its style"
    ):
        one(tmp_path, generation("a", ["1,0"], [in_steps("1,0"), in_steps("0,1")]), across="within")


def test_votes_of_other_views_count_and_the_winner_is_of_the_item_itself(tmp_path: Path) -> None:
    own = generation("a", ["two", "3", "three"], task="answer")
    write_records(tmp_path / "g.jsonl", [own])
    write_records(tmp_path / "rolled.jsonl", [generation("a", ["2", "Two.", "2"], task="answer")])
    write_records(tmp_path / "noisy.jsonl", [failed(own)])
    [alone] = score(read_items(tmp_path / "g.jsonl", {}), Vote(), "styles")
    assert (alone.scores.winner, alone.scores.scores) == (1, (1 / 3, 2 / 3, 2 / 3))
    views = {"rolled": tmp_path / "rolled.jsonl", "noisy": tmp_path / "noisy.jsonl"}
    [seen] = score(read_items(tmp_path / "g.jsonl", views), Vote(), "styles", tuple(views))
    assert seen.scores.scores == (4 / 9, 2 / 9, 2 / 9)  # the failed view's three are silent, so 9 stay 9
    assert (seen.scores.winner, seen.voters) == (0, 9)
    assert seen.scores.matrix == alone.scores.matrix and len(seen.scores.clauses) == 3
    assert seen.scores.scorer == "vote; across styles; views rolled, noisy"


@pytest.mark.parametrize(
    ("view", "told"),
    [
        ([generation("b", ["1,0"])], "found ('b', 'caption', 'What?'), expected ('a', 'caption', 'What?')"),
        ([replace(generation("a", ["1,0"]), question="Who?")], "found ('a', 'caption', 'Who?')"),
        ([], "found no more rows"),
        ([generation("a", ["1,0"]), generation("b", ["1,0"])], "expected no more rows"),
    ],
)
def test_a_view_of_other_items_is_refused(view: list[Generation], told: str, tmp_path: Path) -> None:
    write_records(tmp_path / "g.jsonl", [generation("a", ["1,0"])])
    write_records(tmp_path / "v.jsonl", view)
    with pytest.raises(RecordError) as error:
        list(read_items(tmp_path / "g.jsonl", {"rolled": tmp_path / "v.jsonl"}))
    assert told in str(error.value) and "(view rolled)" in str(error.value)


def test_without_a_model_the_majority_wins(tmp_path: Path) -> None:
    texts = ["a red three on gray", "a red five on gray", "a red three on gray", "a blue three on white"]
    [verdict] = verdicts(tmp_path, [generation("a", texts)], Cosine(TfIdf(dict.fromkeys(texts))))
    assert verdict.scores.winner == 0 and verdict.scores.scores[0] == verdict.scores.scores[2]
    assert verdict.scores.scorer.endswith(" of 3 clauses; across styles")


def test_the_tally_counts_what_passes(tmp_path: Path) -> None:
    rows = [generation(str(i), ["1,0"] * i + ["0,1"] * (4 - i)) for i in (2, 3, 4)]
    tally = Tally()
    scores = list(tally.watch(verdicts(tmp_path, [*rows, failed(rows[0])])))
    assert [s.agreement for s in scores] == [0.5, 0.75, 1.0, 0.0]
    assert (tally.items, tally.failures) == ({4: 3}, {"decode_error": 1})
    assert tally.passed == {(4, tau): 1 for tau in THRESHOLDS}
    assert tally.bars == {5: 1, 7: 1, 9: 1}
    lines = "\n".join(tally.lines())
    assert "others >= 0.7333" in lines and "0.7 - 0.8        1" in lines


def test_an_agreement_on_a_threshold_passes_it(tmp_path: Path) -> None:
    tally = Tally()
    list(tally.watch(verdicts(tmp_path, [generation("a", ["1,0"] * 4 + ["0,1"])])))
    assert tally.passed == {(5, 0.8): 1}
