"""Corruption on the device against its definition: exact counts, chi-square, rows rebuilt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jmeta.tasks import detection, guides, objectives, sentences, spans
from jmeta.tasks.objectives import from_ids, words_of
from jmeta.tasks.tokenizer import token_pieces, vocabulary

PAD, MASK, CLS, SEP = range(4)
SIZE = 64
WORDS = from_ids(PAD, MASK, np.arange(4, SIZE), SIZE)
CORRUPTIONS = {
    "mlm": lambda t, k: objectives.mlm(t, k, WORDS),
    "added": lambda t, k: detection.added_tokens(t, k, WORDS),
    "deleted": lambda t, k: detection.deleted_tokens(t, k, WORDS),
    "spans": lambda t, k: spans.span_corruption(t, k, WORDS, [1]),
}
# Of one function each, so that tests share the programs.
JITTED = {name: jax.jit(corrupt) for name, corrupt in CORRUPTIONS.items()}
choose = jax.jit(lambda ordinary, key: objectives.choose(ordinary, 0.15, key))
insert = jax.jit(lambda tokens, edits, noise: detection.insert(tokens, edits, noise, PAD))
delete = jax.jit(lambda tokens, edits: detection.delete(tokens, edits, PAD))
exchange = jax.jit(lambda tokens, at, whether: sentences.exchange(tokens, at, whether, PAD))


def rows_of(rng, count, time, longest=None):
    """Rows ``[CLS] ordinary... [SEP]``, some with a [SEP] in the middle, padded at the end."""
    tokens = np.zeros((count, time), np.int32)
    for row in tokens:
        n = int(rng.integers(3, (longest or time) + 1))
        row[:n] = rng.integers(4, SIZE, n)
        row[0], row[n - 1] = CLS, SEP
        if n > 6:
            row[n // 2] = SEP
    return tokens


@pytest.fixture(scope="module")
def rows():
    return rows_of(np.random.default_rng(0), 3000, 40)


@pytest.fixture(scope="module")
def full():
    """4,000 rows of 40 ordinary tokens."""
    tokens = np.full((4000, 48), PAD, np.int32)
    tokens[:, 0], tokens[:, 41] = CLS, SEP
    tokens[:, 1:41] = np.random.default_rng(1).integers(4, SIZE, (4000, 40))
    return tokens


def test_masking_is_that_of_the_definition(full):
    batch = JITTED["mlm"](full, jax.random.key(0))
    batch = {name: np.asarray(each) for name, each in batch.items()}
    chosen = batch["weights"] != 0
    np.testing.assert_array_equal(batch["tokens"][~chosen], full[~chosen])
    np.testing.assert_array_equal(batch["labels"], full)
    np.testing.assert_array_equal(batch["mask"], full != PAD)
    assert not chosen[:, [0, *range(41, 48)]].any()
    assert (chosen.sum(1) == 6).all()  # floor(6 + U)
    after, before = batch["tokens"][chosen], full[chosen]
    kept, hidden = after == before, after == MASK
    drawn = after[~kept & ~hidden]
    assert (drawn >= 4).all()  # never a special token
    chance = 0.1 / (SIZE - 4)
    expected = np.array([0.1 + chance, 0.8, 0.1 - chance]) * chosen.sum()
    assert stats.chisquare([kept.sum(), hidden.sum(), len(drawn)], expected).pvalue > 1e-3
    assert stats.chisquare(chosen[:, 1:41].sum(0)).pvalue > 1e-3
    assert stats.chisquare(np.bincount(drawn, minlength=SIZE)[4:]).pvalue > 1e-3


def test_the_share_selected_is_exact_in_the_mean_for_rows_of_any_length(rows):
    ordinary = WORDS.is_ordinary[rows]
    chosen = np.asarray(choose(ordinary, jax.random.key(2)))
    assert not (chosen & ~ordinary).any()
    wanted = 0.15 * ordinary.sum(1)
    gap = chosen.sum(1) - wanted
    assert (np.abs(gap) < 1).all()
    assert abs(gap.mean()) < 4 * gap.std() / np.sqrt(len(gap))


def test_guided_masking_hides_half_of_what_the_guide_points_at_and_nothing_else(rows):
    guide = np.random.default_rng(3).random(rows.shape) < 0.3  # special tokens and pads too
    masked = jax.jit(lambda t, g, k: objectives.guided_mlm(t, g, k, WORDS))
    batch = masked(rows, guide, jax.random.key(3))
    chosen = np.asarray(batch["weights"]) != 0
    eligible = guide & WORDS.is_ordinary[rows]
    assert not (chosen & ~eligible).any()
    assert (np.abs(chosen.sum(1) - 0.5 * eligible.sum(1)) < 1).all()
    np.testing.assert_array_equal(np.asarray(batch["tokens"])[~chosen], rows[~chosen])


def inserted_by_hand(row, inserted, noise):
    """The definition of ``detection.insert``, token by token."""
    text = [t for t in row if t != PAD]
    out, labels = [], []
    while text and len(out) < len(row):
        at = len(out)
        if at and inserted[at]:
            out.append(noise[at])
            labels.append(True)
        else:
            out.append(text.pop(0))
            labels.append(False)
    if text:
        out[-1], labels[-1] = text[-1], False
    empty = len(row) - len(out)
    return out + [PAD] * empty, labels + [False] * empty


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 0.9))
def test_insertion_and_deletion_are_those_of_a_loop_over_tokens(seed, share):
    rng = np.random.default_rng(seed)
    tokens = rows_of(rng, 8, 16)
    tokens[0] = PAD  # an empty row
    edits, noise = rng.random(tokens.shape) < share, rng.integers(4, SIZE, tokens.shape)
    noise = noise.astype(np.int32)
    found = insert(tokens, edits, noise)
    by_hand = [inserted_by_hand(*each) for each in zip(tokens, edits, noise, strict=True)]
    np.testing.assert_array_equal(found[0], [row for row, _ in by_hand])
    np.testing.assert_array_equal(found[1], [labels for _, labels in by_hand])

    closed, missing = map(np.asarray, delete(tokens, edits))
    for before, gone, after, count in zip(tokens, edits, closed, missing, strict=True):
        here = before != PAD
        kept = before[here & ~gone]
        np.testing.assert_array_equal(after, np.r_[kept, np.zeros(16 - len(kept), int)])
        places = np.flatnonzero(here & ~gone)
        np.testing.assert_array_equal(count[: len(kept)], np.diff(np.r_[-1, places]) - 1)


def test_without_what_was_added_a_row_is_the_original(rows):
    key = jax.random.key(4)
    batch = JITTED["added"](rows, key)
    batch = {name: np.asarray(each) for name, each in batch.items()}
    added = batch["labels"] == 1
    np.testing.assert_array_equal(batch["mask"], batch["tokens"] != PAD)
    np.testing.assert_array_equal(batch["weights"], WORDS.is_ordinary[batch["tokens"]])
    assert WORDS.is_ordinary[batch["tokens"][added]].all()
    assert not added[:, 0].any()
    whole = 0
    for before, after, new in zip(rows, batch["tokens"], added, strict=True):
        text, rest = before[before != PAD], after[(after != PAD) & ~new]
        assert rest[-1] == text[-1] == SEP
        if len(rest) == len(text):
            whole += 1
            np.testing.assert_array_equal(rest, text)
            assert (after != PAD).sum() == len(text) + new.sum()
        else:  # cut: the beginning, and the last [SEP]
            assert (after != PAD).all()
            np.testing.assert_array_equal(rest[:-1], text[: len(rest) - 1])
    assert whole > 1000
    # where nothing is cut, p / (1 - p) insertions stand before every token but the first
    short = (rows != PAD).sum(1) <= 20
    expected = ((rows[short] != PAD).sum(1) - 1) * 0.15 / 0.85
    gap = added[short].sum(1) - expected
    assert abs(gap.mean()) < 4 * gap.std() / np.sqrt(short.sum())


def test_labels_of_deletion_are_the_places_where_something_is_missing(rows):
    key = jax.random.key(5)
    batch = JITTED["deleted"](rows, key)
    batch = {name: np.asarray(each) for name, each in batch.items()}
    np.testing.assert_array_equal(batch["mask"], batch["tokens"] != PAD)
    np.testing.assert_array_equal(batch["weights"][:, 0], 0)
    np.testing.assert_array_equal(batch["weights"][:, 1:], batch["mask"][:, 1:])
    # the same draw, so that the deleted tokens are known
    gone = np.asarray(jax.random.bernoulli(key, 0.15, rows.shape))
    place, last = np.arange(40), (rows != PAD).sum(1, keepdims=True) - 1
    gone = gone & WORDS.is_ordinary[rows] & (place > 0) & (place < last)
    for before, after, labels, out in zip(
        rows, batch["tokens"], batch["labels"], gone, strict=True
    ):
        runs = np.flatnonzero(out & ~np.r_[False, out[:-1]])
        assert labels.sum() == len(runs)
        rebuilt = []
        lost = iter(np.split(before[out], np.flatnonzero(np.diff(np.flatnonzero(out)) > 1) + 1))
        for token, label in zip(after[after != PAD], labels, strict=False):
            rebuilt += [*next(lost)] if label else []
            rebuilt.append(token)
        np.testing.assert_array_equal(rebuilt, before[before != PAD])
    inner = WORDS.is_ordinary[rows] & (place > 0) & (place < last)
    share, n = gone.sum() / inner.sum(), inner.sum()
    assert abs(share - 0.15) < 4 * np.sqrt(0.15 * 0.85 / n)
    assert stats.chisquare([gone.sum(), n - gone.sum()], [0.15 * n, 0.85 * n]).pvalue > 1e-4


def test_twins_are_each_others_twin_and_have_a_dropout_key_of_their_own():
    tokens = np.arange(4, 11, dtype=np.int32)[:, None]
    batch = jax.jit(lambda t, k: sentences.twins(t, k, WORDS))(tokens, jax.random.key(7))
    twin = sentences.twin_of(6)
    np.testing.assert_array_equal(twin[twin], np.arange(6))
    assert (twin != np.arange(6)).all()
    np.testing.assert_array_equal(batch["tokens"], np.asarray(batch["tokens"])[twin])
    assert batch["dropout"] == jax.random.key(7)
    with pytest.raises(ValueError, match="at least four rows"):
        sentences.twins(tokens[:3], jax.random.key(0), WORDS)


def test_exchanged_sentences_are_those_of_a_loop_and_twice_is_not_at_all():
    rng = np.random.default_rng(8)
    tokens, second = np.zeros((200, 20), np.int32), np.zeros(200, np.int32)
    texts = []
    for row, at in zip(tokens, range(200), strict=True):
        a, b = (rng.integers(4, SIZE, rng.integers(1, 8)).tolist() for _ in "ab")
        texts.append((a, b))
        second[at] = len(a) + 2
        row[: len(a) + len(b) + 3] = [CLS, *a, SEP, *b, SEP]
    order = jax.jit(lambda t, at, k: sentences.sentence_order(t, at, k, WORDS))
    batch = order(tokens, second, jax.random.key(9))
    batch = {name: np.asarray(each) for name, each in batch.items()}
    for row, segments, y, (a, b) in zip(
        batch["tokens"], batch["segments"], batch["y"], texts, strict=True
    ):
        a, b = (b, a) if y else (a, b)
        empty = [PAD] * (17 - len(a) - len(b))
        assert row.tolist() == [CLS, *a, SEP, *b, SEP, *empty]
        assert segments.tolist() == [0] * (len(a) + 2) + [1] * (len(b) + 1) + [0] * len(empty)
    assert 60 < batch["y"].sum() < 140
    always = np.ones(200, bool)
    there, start = exchange(tokens, second, always)
    back, again = exchange(there, start, always)
    np.testing.assert_array_equal(back, tokens)
    np.testing.assert_array_equal(again, second)


def test_spans_put_back_in_place_of_their_sentinels_are_the_text():
    tokens = rows_of(np.random.default_rng(10), 300, 40)
    marks = [64, 65, 66, 67, 68]
    words = from_ids(PAD, MASK, np.arange(4, SIZE), 69)
    corrupt = jax.jit(lambda t, k: spans.span_corruption(t, k, words, marks, share=0.3))
    batch = {name: np.asarray(x) for name, x in corrupt(tokens, jax.random.key(11)).items()}
    np.testing.assert_array_equal(batch["mask"], batch["tokens"] != PAD)
    for before, row, weights in zip(tokens, batch["tokens"], batch["weights"], strict=True):
        text, answer = row[(row != PAD) & (weights == 0)], row[weights != 0]
        starts = np.flatnonzero(answer >= SIZE)
        assert answer[starts].tolist() == marks[: len(starts)]  # in order, each once
        said = dict(zip(answer[starts], np.split(answer, starts)[1:], strict=True))
        rebuilt = [t for token in text for t in (said[token][1:] if token >= SIZE else [token])]
        np.testing.assert_array_equal(rebuilt, before[before != PAD])


def test_noise_has_its_exact_number_in_its_exact_number_of_spans():
    count = jnp.arange(60, dtype=jnp.int32)
    # A hundred million comparisons: worth the compiler's optimiser.
    many = jax.jit(
        jax.vmap(lambda k: spans.noise_spans(count, 0.15, 3.0, 64, k)),
        compiler_options={"xla_backend_optimization_level": 2},
    )
    noise = np.asarray(many(jax.random.split(jax.random.key(12), 200)))
    for n in range(60):
        mine = noise[:, n]
        assert not mine[:, n:].any()
        wanted = 0 if n < 2 else max(1, round(n * 0.15))
        assert (mine.sum(1) == wanted).all(), n
        begins = (mine & ~np.c_[np.zeros(200, bool), mine[:, :-1]]).sum(1)
        assert (begins == (0 if n < 2 else max(1, round(wanted / 3)))).all(), n
    # 2 spans of 6 tokens in a text of 43: the first is 1 to 5 long, each as likely
    mine = noise[:, 43]
    first = [int(np.argmin(row[row.argmax() :])) for row in mine]
    assert stats.chisquare(np.bincount(first, minlength=6)[1:6]).pvalue > 1e-3


def test_objectives_are_the_same_for_the_same_key_and_have_no_loop(rows):
    key = jax.random.key(13)
    for name, corrupt in CORRUPTIONS.items():
        # All rows where other tests have compiled them.
        tokens = jnp.asarray(rows if name in ("added", "deleted") else rows[:64])
        eager, jitted = corrupt(tokens, key), JITTED[name](tokens, key)
        for field, leaf in eager.items():
            np.testing.assert_array_equal(leaf, jitted[field])
        # one program for any number of tokens: nothing is unrolled over them
        size = [str(jax.make_jaxpr(corrupt)(rows[:64, :n], key)).count(" = ") for n in (8, 40)]
        assert size[0] == size[1]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda t, k: objectives.mlm(t, k, WORDS, keep=0.6, random=0.6), "are no shares"),
        (lambda t, k: objectives.mlm(t, k, WORDS._replace(mask=None)), "has no .MASK."),
        (lambda t, k: detection.added_tokens(t, k, WORDS, share=1.0), "no probability below 1"),
        (lambda t, k: spans.span_corruption(t, k, WORDS, [5]), "must be special tokens"),
    ],
)
def test_what_has_no_meaning_is_refused(rows, call, words):
    with pytest.raises(ValueError, match=words):
        call(jnp.asarray(rows[:4]), jax.random.key(0))


def test_the_ordinary_tokens_of_both_kinds_of_vocabulary(bpe):
    found = words_of(bpe)
    np.testing.assert_array_equal(np.flatnonzero(found.is_ordinary), bpe.ordinary)
    own = words_of(vocabulary(bpe.tokenizer))
    assert own.mask == bpe.mask
    assert not own.is_ordinary[[bpe.pad, bpe.sep, bpe.mask]].any()


def test_rare_tokens_are_the_rarest_and_at_most_their_share():
    tokens = np.random.default_rng(14).zipf(1.5, 5000) % 40
    rare = guides.rare_tokens(tokens, 50, 0.2)
    counts = np.bincount(tokens, minlength=50)
    assert counts[rare].sum() <= 0.2 * len(tokens)
    assert counts[rare].max() < counts[~rare].min()
    level = counts[~rare].min()
    assert counts[rare].sum() + counts[counts == level].sum() > 0.2 * len(tokens)  # no more fits


def test_names_are_words_with_a_capital_inside_a_sentence(bpe):
    text = " The cat met Anna in New York . Nobody saw IBM 's robot ! It left"
    pieces = token_pieces(bpe.tokenizer, [text])[0]
    guide = guides.capitalised(text, pieces)
    said = "".join(
        text[a:b] if g else "|" for a, b, g in zip(pieces.start, pieces.stop, guide, strict=True)
    )
    assert said.replace("|", " ").split() == ["Anna", "New", "York", "IBM"]
    assert not guides.capitalised("", token_pieces(bpe.tokenizer, [""])[0]).size
