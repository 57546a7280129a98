"""A tokenizer file that cuts, pads or draws is put right and the user told; one that changes text is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Engine

from sicog_mcore.data.chat import Chat
from sicog_mcore.data.sample import Turn
from sicog_mcore.data.tokenizer import load_tokenizer
from sicog_mcore.data.tokenizer_check import TokenizerError
from sicog_mcore.errors import EXIT_CONFIG
from tests.builders import ANSWERS, QUESTIONS, TOKENIZER
from tests.data.test_tokenizer import train_sentencepiece

LONG = " ".join((*QUESTIONS, *ANSWERS)) * 5
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
Change = Callable[[dict[str, Any]], object]
CUT = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    **{"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0},
    **{"pad_type_id": 0, "pad_token": "<|endoftext|>"},
}
OFF: dict[str, tuple[Change, str]] = {
    "truncation": (lambda file: file.update(truncation=CUT), "truncation {'direction': 'Right', 'max_length': 8"),
    "long truncation": (lambda file: file.update(truncation={**CUT, "max_length": 128}), "would cut every text"),
    "padding": (lambda file: file.update(padding=PADDING), "would fill up every text: switched off"),
    "dropout": (lambda file: file["model"].update(dropout=0.3), "model {'dropout': 0.3} would write the same text"),
    "dropout of all": (lambda file: file["model"].update(dropout=1.0), "model {'dropout': 1.0}"),
    "all three": (
        lambda file: (file.update(truncation=CUT, padding=PADDING), file["model"].update(dropout=0.1)),
        "padding",
    ),
}


def written(folder: Path, change: Change) -> str:
    """The tokenizer of the tests with a change in its file."""
    content = json.loads(Path(TOKENIZER).read_text(encoding="utf-8"))
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return str(folder / "tokenizer.json")


def part(value: Any) -> dict[str, Any]:
    """A part of a tokenizer as a file holds it."""
    return json.loads(value.__getstate__())


def refused(folder: Path, change: Change) -> str:
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(written(folder, change))
    assert caught.value.exit_code == EXIT_CONFIG and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", OFF)
def test_what_cuts_pads_or_draws_is_off_and_said(name: str, tmp_path: Path) -> None:
    change, expected = OFF[name]
    path = written(tmp_path, change)
    tokenizer, plain = load_tokenizer(path), load_tokenizer(TOKENIZER)
    assert any(expected in note and path in note for note in tokenizer.notes)
    again = pickle.loads(pickle.dumps(tokenizer))
    tokenizer.save(tmp_path / "saved.json")
    saved = load_tokenizer(str(tmp_path / "saved.json"))
    assert saved.notes == () and plain.notes == ()
    for text in (LONG, "x", ""):
        assert tokenizer.encode(text) == again.encode(text) == saved.encode(text) == plain.encode(text)
    answer = Chat(path, "chatml", "").tokenize((Turn("user", "Describe it."), Turn("assistant", LONG)))
    assert answer == Chat(TOKENIZER, "chatml", "").tokenize((Turn("user", "Describe it."), Turn("assistant", LONG)))


def test_a_file_without_such_settings_is_saved_byte_for_byte(tmp_path: Path) -> None:
    load_tokenizer(TOKENIZER).save(tmp_path / "saved.json")
    assert (tmp_path / "saved.json").read_bytes() == Path(TOKENIZER).read_bytes()


def test_unigram_sampling_is_off() -> None:
    from sicog_mcore.data.tokenizer_check import settle

    content: dict[str, Any] = {"model": {"type": "Unigram", "vocab": [], "alpha": 0.1, "nbest_size": 64}}
    (note,) = settle(content, "x")
    assert "'alpha': 0.1" in note and content["model"]["alpha"] is content["model"]["nbest_size"] is None


NORMALIZERS = {
    "Lowercase": normalizers.Lowercase(),
    "StripAccents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    "NFKC": normalizers.NFKC(),
    "NFKD": normalizers.NFKD(),
    "Strip": normalizers.Strip(),
    "BertNormalizer": normalizers.BertNormalizer(),
    "BertNormalizer that keeps case": normalizers.BertNormalizer(lowercase=False, strip_accents=False),
    "Nmt": normalizers.Nmt(),
    "Prepend": normalizers.Prepend("▁"),
    "Replace of words": normalizers.Replace("colour", "color"),
    "Replace of spaces": normalizers.Replace(Regex(" {2,}"), " "),
}
PRE_TOKENIZERS = {
    "Whitespace": pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), BYTES]),
    "WhitespaceSplit": pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), BYTES]),
    "BertPreTokenizer": pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), BYTES]),
    "prefix space": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "removed words": pre_tokenizers.Sequence([pre_tokenizers.Split("zebra", "removed"), BYTES]),
    "removed digits": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\d"), "removed"), BYTES]),
    "delimiter": pre_tokenizers.Sequence([pre_tokenizers.CharDelimiterSplit("q"), BYTES]),
}


@pytest.mark.parametrize("name", NORMALIZERS)
def test_a_normalizer_that_changes_text_is_refused_with_a_sample(name: str, tmp_path: Path) -> None:
    message = refused(tmp_path, lambda file: file.update(normalizer=part(NORMALIZERS[name])))
    assert "writes '" in message and "take" in message


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_a_pre_tokenizer_that_loses_or_adds_text_is_refused(name: str, tmp_path: Path) -> None:
    message = refused(tmp_path, lambda file: file.update(pre_tokenizer=part(PRE_TOKENIZERS[name])))
    assert "writes '" in message


def test_the_message_shows_what_becomes_of_the_text(tmp_path: Path) -> None:
    message = refused(tmp_path, lambda file: file.update(normalizer=part(normalizers.Lowercase())))
    assert "changes capitals: it writes 'The Red CIRCLE of NASA' as 'the red circle of nasa'" in message


def test_a_decoder_that_strips_is_refused(tmp_path: Path) -> None:
    chain = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    assert "changes a space in front" in refused(tmp_path, lambda file: file.update(decoder=part(chain)))


def test_a_space_between_texts_that_nobody_wrote_is_refused(tmp_path: Path) -> None:
    """Metaspace hides it: each text alone comes back as it was."""
    letters = sorted({chr(i) for i in range(33, 127)} | {"▁", "\n", "\t"})
    vocabulary = {letter: i for i, letter in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters])}
    engine = Engine(models.BPE(vocabulary, []))
    engine.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    engine.decoder = decoders.Metaspace(prepend_scheme="always")
    engine.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="side by side as 'two words'"):
        load_tokenizer(str(tmp_path))
    engine.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    engine.decoder = decoders.Metaspace(prepend_scheme="never")
    engine.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).decode([vocabulary["a"], vocabulary["▁"]]) == "a "


@pytest.mark.parametrize("form", [normalizers.NFC(), normalizers.NFD()])
def test_composed_and_decomposed_letters_are_the_same_text_and_said(form: Any, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(written(tmp_path, lambda file: file.update(normalizer=part(form))))
    (note,) = tokenizer.notes
    assert "another form of the same letters (NFC)" in note and "\\u" in note


def test_a_rule_that_no_sample_meets_is_named(tmp_path: Path) -> None:
    rule = part(normalizers.Replace(Regex(r"\d{9}"), "N"))
    (note,) = load_tokenizer(written(tmp_path, lambda file: file.update(normalizer=rule))).notes
    assert "normalizer replaces {'Regex': " in note and "by 'N' in every text" in note


def test_letters_without_a_token_are_said(tmp_path: Path) -> None:
    def only_ascii(file: dict[str, Any]) -> None:
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        gone = {token for token in file["model"]["vocab"] if token in alphabet and ord(token) > 126} - set("ĠĊĉ")
        file["model"]["vocab"] = {k: i for k, i in file["model"]["vocab"].items() if k not in gone}

    (note,) = load_tokenizer(written(tmp_path, only_ascii)).notes
    assert "letters without a token, e.g. it writes 'naïve café" in note


def test_words_without_a_token_are_said_but_lost_white_space_is_refused(tmp_path: Path) -> None:
    words = {"<unk>": 0, "<|endoftext|>": 1, "two": 2, "words": 3, " ": 4, "\n": 5}
    engine = Engine(models.WordLevel(words, unk_token="<unk>"))
    engine.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s"), "isolated")
    engine.decoder = decoders.Fuse()
    engine.save(str(tmp_path / "tokenizer.json"))
    (note,) = load_tokenizer(str(tmp_path)).notes
    assert "letters without a token" in note and "<unk>" in note
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    engine.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="it writes 'two"):
        load_tokenizer(str(tmp_path))


def added(**fields: Any) -> Change:
    return lambda file: file["added_tokens"].append({**file["added_tokens"][0], "id": 600, **fields})


def test_a_turn_cannot_be_opened_by_data_even_if_the_file_allows_it(tmp_path: Path) -> None:
    path = written(tmp_path, lambda file: file["added_tokens"][2].update(special=False))
    tokenizer = pickle.loads(pickle.dumps(load_tokenizer(path)))
    assert "'<|im_end|>' not marked as special" in tokenizer.notes[0]
    assert tokenizer.encode("a<|im_end|>b") == load_tokenizer(TOKENIZER).encode("a<|im_end|>b")
    tokenizer.save(tmp_path / "saved.json")
    assert json.loads((tmp_path / "saved.json").read_text())["added_tokens"][2]["special"] is True


@pytest.mark.parametrize(
    "change, expected",
    [
        (added(content="<mask>", special=False, lstrip=True), "changes text around '<mask>'"),
        (added(content="<mask>", special=False, rstrip=True), "changes text around '<mask>'"),
        (added(content="<x>", id=300), "id 300 is "),
        (added(content="<x>", id=900), "numbers '<x>' 900, and it is read as 600"),
        (lambda file: file["model"]["vocab"].update({"zz": 50}), "id 50 is "),
        (lambda file: file["added_tokens"].append(7), "must have a content and an id"),
        (lambda file: file.update(extra={"a": 1}), "cannot be read as a tokenizer"),
        (lambda file: file.update(model=[]), "holds no model"),
        (lambda file: file["model"].update(type="Markov"), "cannot be read as a tokenizer"),
        (lambda file: file.update(model={"type": "Unigram", "vocab": [5]}), "holds other things than tokens"),
        (lambda file: file.update(model={"type": "Unigram", "vocab": []}, added_tokens=[]), "cannot write plain text"),
        (lambda file: file["model"]["vocab"].update(a=[1]), "has ids that are no numbers"),
    ],
)
def test_tokens_of_two_meanings_and_broken_files_are_refused(change: Change, expected: str, tmp_path: Path) -> None:
    assert expected in refused(tmp_path, change)


@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 100_000, '{"model": {"vocab": {"a": 1, "a": 2}}}', "\udcff"])
def test_a_file_that_is_no_tokenizer_is_one_message(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_harmless_added_tokens_unknown_keys_and_post_processors(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(written(tmp_path, added(content="<tool>", special=False, normalized=True)))
    assert tokenizer.notes == () and tokenizer.encode("<tool>") == [600] and tokenizer.size == 601
    begin = part(processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]))
    tokenizer = load_tokenizer(written(tmp_path, lambda file: file.update(post_processor=begin)))
    assert tokenizer.notes == () and tokenizer.encode("two") == load_tokenizer(TOKENIZER).encode("two")
    (note,) = load_tokenizer(written(tmp_path, lambda file: file["model"].update(flavour="x\x1b[31m"))).notes
    assert "'model.flavour' = 'x\\x1b[31m' is unknown here" in note
    (note,) = load_tokenizer(written(tmp_path, lambda file: file["added_tokens"][2].update(rstrip=True))).notes
    assert "lstrip or rstrip of '<|im_end|>' eats white space" in note


@pytest.mark.parametrize("rule", ["nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf"])
def test_a_sentencepiece_model_that_normalises_is_refused(rule: str, tmp_path: Path) -> None:
    path = train_sentencepiece(tmp_path / "x.model", "unigram", normalization_rule_name=rule)
    with pytest.raises(TokenizerError, match="writes '"):
        load_tokenizer(path)


def test_a_sentencepiece_model_without_bytes_says_what_it_cannot_write(tmp_path: Path) -> None:
    path = train_sentencepiece(
        tmp_path / "x.model", "bpe", byte_fallback=False, user_defined_symbols="\n,<|endoftext|>,\t"
    )
    (note,) = load_tokenizer(path).notes
    assert "letters without a token" in note
    (tmp_path / "broken.model").write_bytes(b"\x0a\xff\xff\xff\xff\xff")
    with pytest.raises(TokenizerError, match="cannot be read as a SentencePiece model"):
        load_tokenizer(str(tmp_path / "broken.model"))
