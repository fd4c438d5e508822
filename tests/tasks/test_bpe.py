import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmeta.tasks.bpe import (
    SPECIAL_TOKENS,
    cache_dir,
    cache_key,
    cached_arrays,
    cached_bpe,
    encode,
    train_bpe,
    write_atomically,
)

TEXTS = ["the cat sat on the mat", "the dog sat on the log"] * 5
TOKENIZER = train_bpe(TEXTS, 300)


@given(st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back_exactly(text):
    rows = encode(TOKENIZER, [text], 400)
    ids = rows[0][rows[0] != 0].tolist()
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert all(i >= len(SPECIAL_TOKENS) for i in ids)


def test_rows_are_cut_and_padded():
    rows = encode(TOKENIZER, ["", "the cat", "x" * 50], 8)
    assert rows.dtype == np.int32
    assert (rows[0] == 0).all()
    assert 0 < (rows[1] != 0).sum() < 7  # merges were learned: fewer tokens than letters
    assert (rows[2] != 0).all()


def test_special_tokens_have_fixed_ids_and_training_is_reproducible():
    assert [TOKENIZER.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert TOKENIZER.encode("<|name|>").ids == [2]
    assert train_bpe(TEXTS, 300).to_str() == TOKENIZER.to_str()
    with pytest.raises(ValueError, match="at least 261 entries"):
        train_bpe(TEXTS, 260)


@pytest.mark.parametrize("damage", [b"", b"{", b"PK\x03\x04", None])
def test_a_damaged_tokeniser_is_trained_again(tmp_path, damage):
    path = tmp_path / "sub" / "bpe.json"
    calls = []

    def texts():
        calls.append(1)
        return TEXTS

    first = cached_bpe(path, texts, 300).to_str()
    assert cached_bpe(path, texts, 300).to_str() == first
    assert len(calls) == 1
    path.write_bytes(path.read_bytes()[:500] if damage is None else damage)
    assert cached_bpe(path, texts, 300).to_str() == first
    assert len(calls) == 2
    assert cached_bpe(path, texts, 300).to_str() == first
    assert len(calls) == 2


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped"])
def test_damaged_arrays_are_made_again(tmp_path, damage):
    path = tmp_path / "a.npz"
    calls = []

    def make():
        calls.append(1)
        return {"x": np.arange(5000) ** 2 % 97, "names": np.array(["a", "é"])}

    first = cached_arrays(path, make)
    raw = path.read_bytes()
    flipped = raw[:200] + bytes([raw[200] ^ 255]) + raw[201:]
    path.write_bytes({"empty": b"", "cut": raw[: len(raw) // 2], "flipped": flipped}[damage])
    for _ in range(2):
        again = cached_arrays(path, make)
        np.testing.assert_array_equal(again["x"], first["x"])
        assert again["names"].tolist() == ["a", "é"]
    assert len(calls) == 2


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")

    def fail(file):
        file.write(b"half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_cache_that_cannot_be_written_only_warns(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="set JMETA_CACHE"):
        arrays = cached_arrays(tmp_path / "file" / "a.npz", lambda: {"x": np.ones(2)})
    assert arrays["x"].sum() == 2


def test_cache_folder_and_keys(monkeypatch, tmp_path):
    monkeypatch.setenv("JMETA_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("JMETA_CACHE")
    assert cache_dir().parts[-2:] == (".cache", "jmeta")
    assert cache_key(a=1, b=2) == cache_key(b=2, a=1) != cache_key(a=1, b=3)
