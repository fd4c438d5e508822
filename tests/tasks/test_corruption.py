"""Corruption against its definition: exact counts, chi-square on what is drawn."""

import numpy as np
import pytest
from scipy import stats

from jmeta.tasks import corruption, mlm

pytestmark = pytest.mark.usefixtures("text_cache")


@pytest.fixture(scope="module")
def rows(bpe):
    """4,000 rows of 40 ordinary tokens between [CLS1] and [SEP], and six of padding."""
    rng = np.random.default_rng(0)
    tokens = np.full((4000, 48), bpe.pad)
    tokens[:, 0], tokens[:, 41] = bpe.cls[1], bpe.sep
    tokens[:, 1:41] = rng.choice(bpe.ordinary, (4000, 40))
    return tokens


def corrupt(tokens, rng, vocabulary, **options):
    batch = corruption.masked_lm(tokens, rng, vocabulary, **options)
    np.testing.assert_array_equal(batch["weights"], batch["labels"] != vocabulary.pad)
    np.testing.assert_array_equal(batch["mask"], np.asarray(tokens) != vocabulary.pad)
    return batch["tokens"], batch["labels"]


def test_corruption_is_that_of_the_definition(bpe, rows):
    inputs, labels = corrupt(rows, np.random.default_rng(1), bpe)
    chosen = labels != bpe.pad
    np.testing.assert_array_equal(labels[chosen], rows[chosen])
    np.testing.assert_array_equal(inputs[~chosen], rows[~chosen])
    special = ~np.isin(rows, bpe.ordinary)
    assert not chosen[special].any()  # [CLS1], [SEP] and padding are never touched
    # floor(6 + U) of 40 is always 6
    assert (chosen.sum(1) == 6).all()
    kept = inputs[chosen] == rows[chosen]
    hidden = inputs[chosen] == bpe.mask
    # random tokens: ordinary ones or [SEP], and now and then the token that was there
    drawn = inputs[chosen][~kept & ~hidden]
    assert np.isin(drawn, [*bpe.ordinary, bpe.sep]).all()
    chance = 0.1 / (len(bpe.ordinary) + 1)
    expected = np.array([0.1 + chance, 0.8, 0.1 - chance]) * chosen.sum()
    assert stats.chisquare([kept.sum(), hidden.sum(), len(drawn)], expected).pvalue > 1e-3
    # every position alike, and replacements uniform
    assert stats.chisquare(chosen[:, 1:41].sum(0)).pvalue > 1e-3
    seen = np.bincount(drawn, minlength=bpe.size)[[bpe.sep, *bpe.ordinary]]
    assert stats.chisquare(seen).pvalue > 1e-3


def test_rounding_is_stochastic_so_that_the_mean_is_exact(bpe, rows):
    short = np.array(rows[:, :12])
    short[:, 11] = bpe.sep  # 10 ordinary tokens: 1.5 of them
    _, labels = corrupt(short, np.random.default_rng(2), bpe)
    count = (labels != bpe.pad).sum(1)
    assert set(count.tolist()) == {1, 2}
    assert abs(count.mean() - 1.5) < 3 * 0.5 / np.sqrt(len(count))


def test_golden_corruption_and_its_limits(bpe, rows):
    same = [corrupt(rows[:3], np.random.default_rng(3), bpe)[0] for _ in range(2)]
    np.testing.assert_array_equal(*same)
    one = rows[:3]
    inputs, labels = corrupt(one, np.random.default_rng(0), bpe, select=1.0, keep=0.0, random=0.0)
    assert (inputs[:, 1:41] == bpe.mask).all()
    np.testing.assert_array_equal(labels[:, 1:41], one[:, 1:41])
    inputs, labels = corrupt(one, np.random.default_rng(0), bpe, select=0.0)
    np.testing.assert_array_equal(inputs, one)
    assert (labels == bpe.pad).all()
    with pytest.raises(ValueError, match="no shares"):
        corrupt(one, np.random.default_rng(0), bpe, keep=0.7, random=0.7)


def test_draws_of_a_fixed_key_are_the_same_from_version_to_version(bpe):
    """One row as it came out: other draws would silently be other training data."""
    words = np.arange(33, 60)  # whatever a tokeniser learns: ids that are known here
    vocabulary = bpe._replace(size=60, pad=0, mask=1, sep=2, ordinary=words)
    row = np.array([4, *words[:20], 2, 0, 0])
    options = {"select": 0.5, "keep": 0.2, "random": 0.3}
    batch = corruption.masked_lm(row, np.random.default_rng(3), vocabulary, **options)
    read = [4, 33, 34, 35, 1, 37, 38, 39, 1, 41, 42, 57, 44, 45, 46, 1, 48, 49, 1, 50, 52, 2, 0, 0]
    asked = [0, 0, 0, 35, 36, 37, 38, 0, 40, 41, 0, 43, 0, 0, 0, 47, 0, 0, 50, 51, 0, 0, 0, 0]
    assert batch["tokens"].tolist() == read
    assert batch["labels"].tolist() == asked


def test_denoising_asks_for_every_token_under_the_same_corruption(bpe, rows):
    hidden = corruption.masked_lm(rows[:50], np.random.default_rng(4), bpe)
    noisy = corruption.denoising(rows[:50], np.random.default_rng(4), bpe)
    np.testing.assert_array_equal(noisy["tokens"], hidden["tokens"])
    np.testing.assert_array_equal(noisy["labels"], rows[:50])
    np.testing.assert_array_equal(noisy["weights"], rows[:50] != bpe.pad)
    source = mlm.masked(mlm.corpus(["a cat"], bpe), bpe, 9, objective=corruption.denoising)
    drawn = source.draw(np.random.default_rng(0), 1)
    np.testing.assert_array_equal(drawn["weights"], drawn["mask"])


@pytest.mark.parametrize("objective", [corruption.masked_lm, corruption.denoising])
def test_what_a_teacher_reads_is_the_text_again(bpe, rows, objective):
    batch = objective(rows[:50], np.random.default_rng(5), bpe)
    found = corruption.unlabelled(batch, bpe)
    np.testing.assert_array_equal(found["tokens"][:, 1:], rows[:50, 1:])
    assert (found["tokens"][:, 0] == bpe.cls[0]).all()
    np.testing.assert_array_equal(found["ordinary"], np.isin(rows[:50], bpe.ordinary))
    assert (found["masked"]["tokens"][:, 0] == bpe.cls[1]).all()
    assert set(found["masked"]) == {"tokens", "labels", "weights"}


def test_a_token_outside_of_the_vocabulary_is_refused(bpe):
    with pytest.raises(ValueError, match=f"the vocabulary has {bpe.size} entries"):
        corruption.masked_lm(np.array([[bpe.size]]), np.random.default_rng(0), bpe)
