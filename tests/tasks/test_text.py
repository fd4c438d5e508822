"""Texts in the unified format: windows, labels, decoding, caches and mistakes."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jmeta.files import cache_dir
from jmeta.tasks import text
from jmeta.tasks.text import HIDDEN, Example, TextTask, batch, encode
from jmeta.tasks.tokenizer import (
    token_ids,
    train_unified,
    unified,
)

pytestmark = pytest.mark.usefixtures("text_cache")

YES_NO = TextTask("yes-no", 7, ("no", "yes"), ("sep", "cls"))
THREE = TextTask("three", 3, ("c", "e", "n"), ("sep", "cls", "mask"))
SPANS = TextTask("spans", 6, kind="spans")

# No halves of surrogate pairs: they are no characters, and are refused (below).
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def decoded(vocabulary, ids):
    return vocabulary.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


# --- the format ---


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_golden_pair_and_single(kind, request):
    words = request.getfixturevalue(kind)
    encoded = encode(
        THREE, [Example("cat", "the cat", 1), Example("cat", label=2)], words, positions=9, stride=3
    )
    (cat,) = token_ids(words.tokenizer, ["cat"])
    (the_cat,) = token_ids(words.tokenizer, ["the cat"])
    pair = [words.cls[3], *cat, words.sep, *the_cat, words.sep]
    single = [words.cls[3], *cat, words.sep]
    found = batch(encoded, [0, 1])
    for row, expected, label in ((0, pair, words.cls[3]), (1, single, words.mask)):
        pads = 9 - len(expected)
        assert found["tokens"][row].tolist() == expected + [words.pad] * pads
        assert found["labels"][row].tolist() == [label] * len(expected) + [words.pad] * pads
        assert found["mask"][row].tolist() == [1] * len(expected) + [0] * pads
        assert found["weights"][row].tolist() == found["mask"][row].tolist()
    b = len(cat) + 2
    assert found["segments"][0].tolist() == [0] * b + [1] * (len(pair) - b) + [0] * (9 - len(pair))
    assert not found["segments"][1].any()
    assert found["y"].tolist() == [1, 2]
    assert {leaf.dtype for leaf in found.values()} == {np.dtype("int32"), np.dtype("float32")}


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(a=texts, b=st.none() | texts, positions=st.integers(5, 20), stride=st.integers(1, 25))
def test_windows_hold_every_token_of_both_texts(bpe, monkeypatch, a, b, positions, stride):
    monkeypatch.setattr(text, "cached_arrays", lambda path, make: make())
    encoded = encode(YES_NO, [Example(a, b, 0)], bpe, positions=positions, stride=stride)
    found = batch(encoded, np.arange(len(encoded.tokens)))
    first, second = [], []
    for tokens, length, start in zip(found["tokens"], encoded.length, encoded.second, strict=True):
        assert tokens[0] == bpe.cls[7]
        assert (tokens[length:] == bpe.pad).all()
        assert (tokens[:length] != bpe.pad).all()
        assert (
            np.flatnonzero(tokens == bpe.sep) == [x - 1 for x in (start, length)][b is None :]
        ).all()
        first.append(tokens[1 : start - 1].tolist())
        second.append(tokens[start : length - 1].tolist())
    for given_text, pieces in ((a, first), (b, second)):
        if given_text is not None:
            ids = token_ids(bpe.tokenizer, [given_text])[0].tolist()
            assert joined(pieces, ids, stride)
    np.testing.assert_array_equal(found["labels"] != bpe.pad, found["mask"] == 1)
    assert set(found["labels"][found["mask"] == 1].tolist()) == {bpe.sep}


def joined(pieces, ids, stride):
    """Do the distinct pieces, laid down a step apart, give the whole?"""
    whole, room = [None] * len(ids), max(len(piece) for piece in pieces)
    starts = range(0, max(len(ids), 1), max(min(stride, room), 1))
    laid = list(dict.fromkeys(map(tuple, pieces)))
    for start in starts:
        piece = ids[start : start + room]
        if tuple(piece) in laid:
            whole[start : start + len(piece)] = piece
    return whole == ids


def test_spans_are_labelled_with_their_own_tokens(wordpiece):
    b = "*cat* sat; *the cat*"
    example = Example("cat", b, 0, spans=((1, 4), (12, 19)), answers=("cat", "the cat"))
    found = batch(encode(SPANS, [example], wordpiece, positions=20, stride=4), [0])
    labelled = found["labels"][0] != wordpiece.sep
    labelled &= found["mask"][0] == 1
    kept = found["tokens"][0][labelled]
    assert [wordpiece.tokenizer.id_to_token(i) for i in kept] == ["cat", "the", "cat"]
    assert (found["labels"][0][labelled] == kept).all()
    assert set(found["labels"][0][~labelled & (found["mask"][0] == 1)]) == {wordpiece.sep}
    assert not labelled[: 2 + 1].any()  # "cat" in A is no answer


def test_hidden_labels_have_no_weight(bpe):
    examples = [Example("a", label=HIDDEN), Example("a", label=0)]
    found = batch(encode(YES_NO, examples, bpe, positions=6), [0, 1])
    assert not found["weights"][0].any()
    assert (found["labels"][0] == bpe.pad).all()
    assert found["weights"][1].sum() == 3
    hidden = batch(encode(SPANS, [Example("a", "b", HIDDEN)], bpe, positions=9), [0])
    assert not hidden["weights"].any()


def test_scores_have_no_label_tokens(bpe):
    task = TextTask("likeness", 18, kind="score")
    found = batch(encode(task, [Example("a", "b", 2.5)], bpe, positions=9), [0])
    assert found["y"].tolist() == [2.5]
    assert not found["weights"].any()


def test_empty_and_foreign_texts(bpe, wordpiece):
    strange = ["", " ", "e\u0301\u0327", "東京都", "👩\u200d👩\u200d👧", "مرحبا", "a\r\nb", "\x00"]
    for words in (bpe, wordpiece):
        examples = [Example(a, b, 1) for a in strange for b in (None, *strange)]
        encoded = encode(YES_NO, examples, words, positions=16, stride=8)
        assert set(encoded.example.tolist()) == set(range(len(examples)))
        assert encoded.length.min() == 2  # [CLS7] [SEP]
    windows = encode(YES_NO, [Example(s, label=0) for s in strange], bpe, positions=40)
    for tokens, length, said in zip(windows.tokens, windows.length, strange, strict=True):
        assert decoded(bpe, tokens[1 : length - 1]) == said


# --- decoding ---


def perfect(encoded, size):
    """Logits that say the labels of every window, with noise that is the same for all tokens."""
    found = batch(encoded, np.arange(len(encoded.tokens)))
    logits = 3.0 * (found["labels"][..., None] == np.arange(size))
    noise = np.random.default_rng(0).normal(size=found["labels"].shape)[..., None]
    return (logits + noise).astype(np.float32), found


def test_class_decoding_ignores_shifts_and_padding(bpe):
    rng = np.random.default_rng(1)
    said = ["cat " * n for n in (1, 4, 9, 14)]
    examples = [Example(a, label=i % 3) for i, a in enumerate(said)]
    short = encode(THREE, examples, bpe, positions=12, stride=5)
    logits = rng.normal(size=(*short.tokens.shape, bpe.size))

    def classes(logits, encoded):
        mask = batch(encoded, np.arange(len(encoded.tokens)))["mask"]
        scores = text.class_scores(jnp.asarray(logits), jnp.asarray(mask), encoded.class_tokens)
        return np.asarray(scores), text.decode_classes(scores, encoded)

    scores, found = classes(logits, short)
    # by hand: mean over the real positions of a window, then over windows
    for i in range(len(examples)):
        rows = np.flatnonzero(short.example == i)
        means = [logits[r, : short.length[r], list(short.class_tokens)].mean(-1) for r in rows]
        assert found[i] == np.mean(means, 0).argmax()
    shifted = logits + 7 * rng.normal(size=(*short.tokens.shape, 1))
    assert classes(shifted, short)[1].tolist() == found.tolist()
    padded = short._replace(tokens=np.pad(short.tokens, ((0, 0), (0, 5))))
    more = np.pad(logits, ((0, 0), (0, 5), (0, 0)), constant_values=np.nan)
    np.testing.assert_allclose(classes(more, padded)[0], scores, rtol=1e-6)
    perfect_logits, _ = perfect(short, bpe.size)
    assert classes(perfect_logits, short)[1].tolist() == [e.label for e in examples]


def test_windows_count_alike_whatever_their_length(bpe):
    said = "cat " * 9
    room = len(token_ids(bpe.tokenizer, [said])[0]) - 3
    encoded = encode(YES_NO, [Example(said, label=0)], bpe, positions=room + 2, stride=room)
    assert encoded.length.tolist() == [room + 2, 5]
    assert text.decode_classes(jnp.array([[1.0, 0.0], [0.0, 1.5]]), encoded).tolist() == [1]


def test_span_decoding_takes_the_surest_run_in_b(wordpiece):
    examples = [Example("cat", "a cat sat", 0, ((2, 5),), ("cat",)), Example("b", "the cats", 0)]
    encoded = encode(SPANS, examples, wordpiece, positions=12)
    size = (len(encoded.tokens), 12)
    ids, sure = np.full(size, wordpiece.sep), np.full(size, -3.0)
    at = {t: i for i, t in enumerate(wordpiece.tokenizer.id_to_token(j) for j in encoded.tokens[0])}
    cat = wordpiece.tokenizer.token_to_id("cat")
    plural = wordpiece.tokenizer.token_to_id("##s")
    ids[0, 1], sure[0, 1] = cat, -0.01  # in A: no answer, however sure
    b = encoded.second[0]
    ids[0, b : b + 2], sure[0, b : b + 2] = [cat, plural], [-2.0, -0.5]
    ids[0, b + 3], sure[0, b + 3] = cat, -1.0  # a run of its own, less sure
    ids[0, encoded.length[0] - 1], sure[0, encoded.length[0] - 1] = cat, -0.02  # the last [SEP]
    ids[0, encoded.length[0] :], sure[0, encoded.length[0] :] = cat, -0.03  # padding
    assert at["a"] == b
    assert text.decode_spans(ids, sure, encoded, wordpiece) == ["cats", ""]


def test_span_decoding_over_windows_and_perfect_labels(bpe):
    b = "the dog saw the *cat* and it sat on the mat, the mat " * 3
    start = b.index("*cat*") + 1
    example = Example("what?", b, 0, ((start, start + 3),), ("cat",))
    encoded = encode(SPANS, [example, example], bpe, positions=24, stride=7)
    assert len(encoded.tokens) > 6
    logits, _ = perfect(encoded, bpe.size)
    ids, sure = text.best_tokens(jnp.asarray(logits))
    assert text.decode_spans(ids, sure, encoded, bpe) == ["cat", "cat"]
    np.testing.assert_allclose(
        sure, (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).max(-1), rtol=1e-5
    )


# --- the cache ---


def test_texts_are_tokenised_once(bpe, monkeypatch):
    examples = [Example("the cat", "sat on it", 1)] * 3
    first = encode(YES_NO, examples, bpe, positions=30)

    def never(*_):
        raise AssertionError("tokenised again")

    with monkeypatch.context() as patch:
        patch.setattr(text, "token_ids", never)
        again = encode(YES_NO, examples, bpe, positions=30)
        for old, new in zip(first, again, strict=True):
            np.testing.assert_array_equal(old, new)
        changes = (
            lambda: encode(YES_NO, examples, bpe, positions=31),
            lambda: encode(YES_NO, examples, bpe, positions=30, stride=9),
            lambda: encode(YES_NO, examples[:2], bpe, positions=30),
            lambda: encode(THREE, examples, bpe, positions=30),
            lambda: encode(YES_NO, examples, unified(train_unified(["x"], 300)), positions=30),
        )
        for change in changes:
            with pytest.raises(AssertionError, match="tokenised again"):
                change()


def test_a_cache_stays_in_its_folder_whatever_the_task_is_called(bpe):
    task = TextTask("../up/There", 4, ("0", "1"), ("sep", "cls"))
    encode(task, [Example("the cat", label=1)], bpe, positions=10)
    assert len(list(cache_dir().glob("text--up-there-*.npz"))) == 1


def test_a_damaged_cache_is_made_again_and_said(bpe):
    task = TextTask("Damaged", 4, ("0", "1"), ("sep", "cls"))
    first = encode(task, [Example("the cat", label=1)], bpe, positions=10)
    (path,) = cache_dir().glob("text-damaged-*.npz")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.warns(UserWarning, match=r"text-damaged-.* is damaged .* made again"):
        again = encode(task, [Example("the cat", label=1)], bpe, positions=10)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert list(cache_dir().glob("text-damaged-*")) == [path]


# --- mistakes ---


@pytest.mark.parametrize(
    ("examples", "positions", "message"),
    [
        ([], 9, "yes-no has no example"),
        ([Example("a"), Example("a", label=2)], 9, r"row 1 .* 'label': 2 is no index of \('no'"),
        ([Example("a", label=-2)], 9, "field 'label': -2"),
        ([Example("a", label="1")], 9, r"row 0 of yes-no .* 'label': '1' is no number"),
        ([Example("a", label=float("nan"))], 9, r"row 0 of yes-no .* 'label': nan is no number"),
        (
            [Example("a"), Example("a", "b\ud83d")],
            9,
            r"row 1 .* 'b': character 1 is half of a",
        ),
        ([Example(None)], 9, "row 0 of yes-no .* field 'a': None is no text"),
        ([Example("a", 7)], 9, "field 'b': 7 is no text"),
        ([Example("a", "b", 0, spans=((0, 2),))], 9, "'spans': characters 0 to 2 are outside"),
        ([Example("a", "b", idx="q3")], 4, r"\(idx 'q3'\) needs at least 5 positions, not 4"),
    ],
)
def test_mistakes_name_the_row_and_the_field(bpe, examples, positions, message):
    with pytest.raises(ValueError, match=message):
        encode(YES_NO, examples, bpe, positions=positions)


@pytest.mark.parametrize("label", [None, "2.5", float("nan"), float("inf")])
def test_a_score_is_a_number(bpe, label):
    task = TextTask("likeness", 18, kind="score")
    with pytest.raises(ValueError, match=r"row 0 of likeness .* field 'label': .* is no number"):
        encode(task, [Example("a", "b", label)], bpe, positions=9)
    with pytest.raises(ValueError, match=r"row 0 of spans .* 'label': 3 is not 0"):
        encode(SPANS, [Example("a", "b", 3)], bpe, positions=9)


def test_outputs_that_are_nan_or_do_not_fit_are_no_answers(bpe):
    encoded = encode(YES_NO, [Example("a", "b", 1)] * 2, bpe, positions=9)
    with pytest.raises(ValueError, match="scores of window 1 hold NaN"):
        text.decode_classes(np.array([[0, 1], [np.nan, 0]]), encoded)
    with pytest.raises(ValueError, match=r"scores have the shape \(3, 2\), not \(2, 2\)"):
        text.decode_classes(np.zeros((3, 2)), encoded)
    encoded = encode(SPANS, [Example("a", "b", 0)], bpe, positions=9)
    ids = np.full((1, 9), bpe.sep)
    with pytest.raises(ValueError, match="log_probs of window 0 hold NaN"):
        text.decode_spans(ids, np.full((1, 9), np.nan), encoded, bpe)
    with pytest.raises(ValueError, match="ids have the shape"):
        text.decode_spans(ids[:, :8], np.zeros((1, 8)), encoded, bpe)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            TextTask("far", 30, ("0", "1"), ("sep", "cls")),
            r"number 30: there are \[CLS0\] to \[CLS29",
        ),
        (TextTask("few", 3, ("0", "1"), ("sep",)), "each class needs one of its own"),
        (TextTask("same", 3, ("0", "1"), ("sep", "sep")), "each class needs one of its own"),
    ],
)
def test_a_task_needs_tokens_that_are_there(bpe, task, message):
    with pytest.raises(ValueError, match=message):
        encode(task, [Example("a", label=0)], bpe, positions=9)


def test_examples_survive_json():
    example = Example("é", None, 1, ((0, 1),), ("x",), {"idx": 1})
    assert json.loads(json.dumps(example))[0] == "é"  # the key of a cache is made of it
