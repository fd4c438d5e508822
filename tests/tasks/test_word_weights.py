"""Weights by rule against their formulas, and the made-up stream."""

import collections
import math
import re

import numpy as np
import pytest

from jmeta.tasks import word_weights
from jmeta.tasks.bpe import train_bpe
from jmeta.tasks.facts import facts
from jmeta.tasks.tokenizer import token_pieces

TEXTS = [
    "The market of Falun was old, and the market was small.",
    "A street in Falun has the name of the writer Eva Holm.",
    "Nobody knows who built the bridge; it is older than the town.",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS, 300)


def by_hand(text):
    """Word -> weight, from the definition."""
    words = [re.findall(r"\w\w+", t.lower()) for t in TEXTS]
    counts = collections.Counter(re.findall(r"\w\w+", text.lower()))
    df = {w: sum(w in set(each) for each in words) for each in words for w in each}
    raw = {w: n * (math.log((1 + 3) / (1 + df[w])) + 1) for w, n in counts.items() if w in df}
    norm = math.sqrt(sum(v * v for v in raw.values()))
    return {w: v / norm for w, v in raw.items()}


def test_a_word_that_is_longer_in_lower_case_is_weighed(tokenizer):
    """The dotted capital I is two characters in lower case, which part the word."""
    text = "DİYARBAKIR and İl"
    fitted, [pieces] = (
        word_weights.fit_tf_idf([text.lower(), "and"]),
        token_pieces(tokenizer, [text]),
    )
    found = word_weights.tf_idf(text, pieces, fitted)
    touched = (pieces.start < 10) & (pieces.stop > 0)
    assert (found[touched] > 0).all()


@pytest.mark.parametrize("text", [*TEXTS, "The market of nobody, unseen."])
def test_tf_idf_is_its_formula_and_tokens_take_the_largest(tokenizer, text):
    fitted, [pieces] = word_weights.fit_tf_idf(TEXTS), token_pieces(tokenizer, [text])
    words, expected = by_hand(text), []
    spans = [(m.span(), words.get(m[0].lower(), 0)) for m in re.finditer(r"\w\w+", text)]
    for start, stop in zip(pieces.start, pieces.stop, strict=True):
        expected.append(max((v for (a, b), v in spans if a < stop and b > start), default=0))
    found = word_weights.tf_idf(text, pieces, fitted)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    held = int((found > 0).sum())
    for drop in (0.0, 0.25, 0.5, 1.0):
        cut = word_weights.tf_idf(text, pieces, fitted, drop=drop)
        assert int((cut > 0).sum()) == held - round(drop * held)
        kept = cut > 0
        if kept.any() and (~kept & (found > 0)).any():
            assert found[kept].min() >= found[~kept & (found > 0)].max()
        np.testing.assert_array_equal(cut[kept], found[kept])
    with pytest.raises(ValueError, match="drop=2"):
        word_weights.tf_idf(text, pieces, fitted, drop=2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It was in 1873 that Eva Holm came to Falun.", ["1873", "Eva Holm", "Falun"]),
        ("Eva went home. Later Bo did too.", ["Later Bo"]),
        ("IBM grew. The Bank of Oslo fell, in the USA.", ["IBM", "The Bank of Oslo", "USA"]),
        ("nothing here is a name", []),
        ("", []),
        ("He paid 3.50 to Ann, Bob and Cy (of Rome)", ["3", "50", "Ann", "Bob and Cy", "Rome"]),
    ],
)  # fmt: skip
def test_salient_spans_are_names_and_numbers(tokenizer, text, expected):
    spans = word_weights.salient_spans(text)
    assert [text[a:b] for a, b in spans] == expected
    if text:
        [pieces] = token_pieces(tokenizer, [text])
        weights = word_weights.salient(text, pieces)
        inside = np.zeros(len(text), bool)
        for a, b in spans:
            inside[a:b] = True
        each = [inside[a:b].any() for a, b in zip(pieces.start, pieces.stop, strict=True)]
        np.testing.assert_array_equal(weights, np.asarray(each, np.float32))


def test_facts_answer_their_questions_and_repeat_by_seed():
    made = facts(60, seed=3)
    assert made == facts(60, seed=3) != facts(60, seed=4)
    for one in made:
        [answer], [start] = one.answers, one.starts
        assert one.context[start : start + len(answer)] == answer
        name = re.search(r"(?:was|did) (\w+ \w+) ", one.question)[1]
        assert one.context.count(name) == 2
    assert len({one.answers for one in made}) > 20
