import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jmeta.tasks.bpe import SPECIAL_TOKENS, cached_bpe, encode, train_bpe

TEXTS = ["the cat sat on the mat", "the dog sat on the log"] * 5
TOKENIZER = train_bpe(TEXTS, 300)


@given(st.text(max_size=40))
@example("a <|pad|> b<|cls|>")  # what looks like a special token is text all the same
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
    with pytest.warns(UserWarning, match=r"bpe\.json is damaged .*; it is made again"):
        assert cached_bpe(path, texts, 300).to_str() == first
    assert len(calls) == 2
    assert cached_bpe(path, texts, 300).to_str() == first
    assert len(calls) == 2
