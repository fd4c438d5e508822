"""Tokenisers: special tokens of one format, files that are read, and what is refused."""

import pytest

from jmeta.data.sources import DataUnavailable
from jmeta.tasks.tokenizer import (
    UNIFIED_TOKENS,
    byte_level,
    load_tokenizer,
    token_ids,
    token_pieces,
    train_unified,
    unified,
    vocabulary,
)

pytestmark = pytest.mark.usefixtures("text_cache")


def test_the_special_tokens_of_a_trained_vocabulary_are_those_of_the_format(bpe):
    assert (bpe.pad, bpe.mask, bpe.sep) == (0, 1, 2)
    assert bpe.cls == tuple(range(3, 33))
    assert bpe.added == ()
    assert bpe.ordinary.tolist() == list(range(33, bpe.size))
    assert [bpe.tokenizer.token_to_id(token) for token in UNIFIED_TOKENS] == list(range(33))


_OTHERS = ("[UNK]", "[CLS]", "[unused30]", "[unused31]")


def test_bert_keeps_its_own_tokens_and_uses_the_unused(wordpiece):
    names = {name: wordpiece.tokenizer.token_to_id(name) for name in ("[PAD]", "[MASK]", "[SEP]")}
    assert (wordpiece.pad, wordpiece.mask, wordpiece.sep) == tuple(names.values())
    assert wordpiece.cls[4] == wordpiece.tokenizer.token_to_id("[unused4]")
    assert wordpiece.added == ()
    special = {wordpiece.pad, wordpiece.mask, wordpiece.sep, *wordpiece.cls}
    special |= {wordpiece.tokenizer.token_to_id(name) for name in _OTHERS}
    assert not special & set(wordpiece.ordinary.tolist())
    assert len(special) + len(wordpiece.ordinary) == wordpiece.size


def test_what_a_tokenizer_lacks_is_added_after_its_own_ids():
    from tokenizers import Tokenizer, models

    plain = Tokenizer(models.WordLevel({"a": 0, "<pad>": 1, "</s>": 2}, unk_token="a"))
    made = unified(plain)
    assert (made.pad, made.sep, made.mask) == (1, 2, 3)
    assert made.cls == tuple(range(4, 34))
    assert made.added == ("[MASK]", *(f"[CLS{k}]" for k in range(30)))
    assert made.size == 34
    assert plain.get_vocab_size() == 3  # what was passed is not changed
    assert vocabulary(plain).pad == 1


def test_special_tokens_in_a_text_are_only_characters(bpe, wordpiece):
    for words in (bpe, wordpiece):
        (ids,) = token_ids(words.tokenizer, ["a [SEP] b [CLS7] [PAD] [unused7]"])
        assert set(ids.tolist()) <= set(words.ordinary.tolist())


def test_cutting_and_padding_of_a_saved_tokenizer_are_switched_off(wordpiece_tokenizer, tmp_path):
    from tokenizers import Tokenizer

    saved = Tokenizer.from_str(wordpiece_tokenizer.to_str())
    saved.enable_truncation(4)
    saved.enable_padding(length=9)
    saved.save(str(tmp_path / "tokenizer.json"))
    words = vocabulary(load_tokenizer(tmp_path))
    assert [len(ids) for ids in token_ids(words.tokenizer, ["c a t " * 10, "c"])] == [30, 1]


def test_fast_tokenizers_of_transformers_are_taken_and_others_refused(wordpiece_tokenizer):
    class Fast:
        backend_tokenizer = wordpiece_tokenizer

    assert unified(Fast()).fingerprint == unified(wordpiece_tokenizer).fingerprint
    with pytest.raises(TypeError, match=r"str is no tokeniser .* load_tokenizer\(path\)"):
        unified("bert-base-uncased")


def test_tokenizers_are_read_from_files_and_folders(tmp_path, wordpiece_tokenizer):
    vocab = wordpiece_tokenizer.get_vocab()
    lines = "\n".join(sorted(vocab, key=vocab.__getitem__))
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text(lines + "\n", encoding="utf-8")
    lower = load_tokenizer(tmp_path / "bert")
    assert lower.encode("Cats", add_special_tokens=False).tokens == ["cat", "##s"]
    cased = tmp_path / "cased.txt"
    cased.write_text(lines + "\nC\n", encoding="utf-8", newline="\r\n")
    assert load_tokenizer(cased).encode("C", add_special_tokens=False).tokens == ["C"]

    gpt = train_unified(["the cat"], 300)
    gpt.model.save(str(tmp_path))
    again = load_tokenizer(tmp_path)
    assert again.encode("the cat").ids == gpt.encode("the cat").ids
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"not both vocab\.json and merges\.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataUnavailable, match=r"tokeniser .* cannot be read"):
        load_tokenizer(tmp_path)


def test_a_hub_name_without_network_says_what_to_do(monkeypatch):
    monkeypatch.delenv("JMETA_DATA", raising=False)
    with pytest.raises(
        DataUnavailable, match=r"'bert-base-cased' .* pass the folder .* JMETA_DATA"
    ):
        load_tokenizer("bert-base-cased")


def test_half_a_surrogate_pair_is_named(bpe):
    with pytest.raises(ValueError, match=r"text 1 .* character 2 is half of a surrogate"):
        token_ids(bpe.tokenizer, ["fine 😀", "no\ud83d"])


def test_offsets_are_characters_of_the_text_as_given(bpe, wordpiece):
    said = "Éa 東京 😀 e\u0301\r\nالع"
    (pieces,) = token_pieces(bpe.tokenizer, [said])
    covered = set().union(*(range(a, b) for a, b in zip(pieces.start, pieces.stop, strict=True)))
    assert covered == set(range(len(said)))
    (pieces,) = token_pieces(wordpiece.tokenizer, ["Cats, Cat"])
    assert [("Cats, Cat")[a:b] for a, b in zip(pieces.start, pieces.stop, strict=True)] == [
        "Cat", "s", ",", "Cat",
    ]  # fmt: skip


def test_published_vocabularies(jmeta_data):
    bert = unified(load_tokenizer("vocab/bert-base-uncased"))
    assert (bert.pad, bert.mask, bert.sep, bert.cls[:2], bert.size) == (0, 103, 102, (1, 2), 30522)
    assert token_ids(bert.tokenizer, ["Hello, world!"])[0].tolist() == [7592, 1010, 2088, 999]
    merges = jmeta_data / "vocab" / "gpt2" / "merges.txt"
    gpt2 = byte_level(jmeta_data / "vocab" / "gpt2" / "vocab.json", merges)
    plain = vocabulary(gpt2)
    assert (plain.cls, plain.sep, plain.eos, plain.pad, plain.size) == (
        None, None, 50256, 50256, 50257,
    )  # fmt: skip
    assert token_ids(plain.tokenizer, ["Hello, world!"])[0].tolist() == [15496, 11, 995, 0]
    assert unified(gpt2).size == 50257 + 33
    roberta = unified(byte_level(jmeta_data / "vocab" / "roberta-base" / "vocab.json", merges))
    assert (roberta.pad, roberta.sep, roberta.mask) == (1, 2, 50264)
    assert 3 not in roberta.ordinary  # <unk>
