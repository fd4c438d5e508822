import numpy as np
import pytest
from scipy import stats

from jmeta.tasks import mlm
from jmeta.tasks.mlm import corpus, masked
from jmeta.tasks.tokenizer import token_ids

pytestmark = pytest.mark.usefixtures("text_cache")


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
