import numpy as np
import pytest
from scipy import stats

from jmeta.tasks import mlm
from jmeta.tasks.mlm import corpus, corrupt, masked
from jmeta.tasks.tokenizer import token_ids

pytestmark = pytest.mark.usefixtures("text_cache")


@pytest.fixture(scope="module")
def rows(bpe):
    """4,000 rows of 40 ordinary tokens between [CLS1] and [SEP], and six of padding."""
    rng = np.random.default_rng(0)
    tokens = np.full((4000, 48), bpe.pad)
    tokens[:, 0], tokens[:, 41] = bpe.cls[1], bpe.sep
    tokens[:, 1:41] = rng.choice(bpe.ordinary, (4000, 40))
    return tokens


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


def test_an_example_with_nothing_selected_scores_full():
    found = mlm.score([[1, 2, 3], [1, 2, 3]], [[0, 2, 9], [0, 0, 0]], pad=0)
    assert found.tolist() == [50.0, 100.0]


def test_windows_of_a_corpus(bpe, wordpiece):
    long = " ".join(f"cat{i}" for i in range(60))
    for words in (bpe, wordpiece):
        text = corpus(["the dog", "", long, "a mat"], words)
        assert len(text.start) == 4  # the empty one is left out
        source = masked(text, words, 16, select=0.0)
        rng = np.random.default_rng(0)
        found = [source.draw(rng, 1) for _ in range(400)]
        lengths = np.array([int(each["mask"].sum()) for each in found])
        ids = token_ids(words.tokenizer, ["the dog", long])
        for each, length in zip(found, lengths, strict=True):
            row = each["tokens"][0]
            assert (row[0], row[length - 1]) == (words.cls[1], words.sep)
            inner = row[1 : length - 1].tolist()
            assert any(
                inner == part[i : i + len(inner)].tolist()
                for part in (*ids, token_ids(words.tokenizer, ["a mat"])[0])
                for i in range(len(part) - len(inner) + 1)
            )
        # a text is drawn in proportion to its tokens, and every place of the long one is seen
        share = (lengths == 16).mean()
        expected = len(ids[1]) / len(text.tokens)
        assert abs(share - expected) < 3 * np.sqrt(expected * (1 - expected) / 400) + 1e-9
        both = source.draw(rng, 3)
        assert len({tuple(row) for row in both["tokens"].tolist()}) == 3
        assert not both["weights"].any()


class Counted:
    """A generator that counts how many whole numbers it was asked for."""

    def __init__(self, seed):
        self.rng, self.integers_drawn = np.random.default_rng(seed), 0

    def integers(self, *args, **settings):
        self.integers_drawn += 1
        return self.rng.integers(*args, **settings)

    def random(self, *args):
        return self.rng.random(*args)


def test_small_texts_beside_a_huge_one_are_found_at_once(bpe):
    texts = ["a", "b" * 20_000, "c", "d"]
    source = masked(corpus(texts, bpe), bpe, 8, select=0.0)
    seconds = []
    for seed in range(200):
        rng = Counted(seed)
        drawn = source.draw(rng, 4)["tokens"]
        assert rng.integers_drawn <= 2 * 4 + 1  # a place and a start for each, one for the fates
        assert {bpe.tokenizer.decode(row[1:2].tolist()) for row in drawn} >= {"a", "c", "d"}
        seconds.append(bpe.tokenizer.decode(drawn[1, 1:2].tolist()))
    # once the huge text is taken, the others come alike
    assert stats.chisquare([seconds.count(c) for c in "acd"]).pvalue > 1e-3


def test_every_token_of_a_long_text_can_be_drawn(bpe):
    text = corpus([" ".join(map(str, range(40)))], bpe)
    source = masked(text, bpe, 12, select=0.0)
    rng, seen = np.random.default_rng(0), set()
    for _ in range(300):
        seen |= set(source.draw(rng, 1)["tokens"][0, 1:11].tolist())
    assert seen == set(text.tokens.tolist())


def test_mistakes(bpe):
    with pytest.raises(ValueError, match="none of the 2 texts of the corpus has a token"):
        corpus(["", ""], bpe)
    with pytest.raises(ValueError, match="leave no room for a token in 2 positions"):
        masked(corpus(["a"], bpe), bpe, 2)
    with pytest.raises(ValueError, match="2 distinct texts cannot be drawn from a corpus of 1"):
        masked(corpus(["a"], bpe), bpe, 9).draw(np.random.default_rng(0), 2)
