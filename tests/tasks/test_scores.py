import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics

from jmeta.tasks import scores
from jmeta.tasks.scores import Score

labels = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


@given(labels)
@settings(deadline=None, max_examples=60)
@pytest.mark.filterwarnings("ignore:A single label")
def test_class_metrics_equal_scikit_learn(pairs):
    predicted, gold = map(list, zip(*pairs, strict=True))
    close = {"rel": 1e-12, "abs": 1e-12}
    assert scores.accuracy(predicted, gold) == pytest.approx(
        100 * metrics.accuracy_score(gold, predicted), **close
    )
    macro = metrics.f1_score(gold, predicted, average="macro", zero_division=0)
    assert scores.macro_f1(predicted, gold) == pytest.approx(100 * macro, **close)
    ours, theirs = np.array(predicted) % 2, np.array(gold) % 2
    assert scores.binary_f1(ours, theirs) == pytest.approx(
        100 * metrics.f1_score(theirs, ours, zero_division=0), **close
    )
    assert scores.matthews(ours, theirs) == pytest.approx(
        100 * metrics.matthews_corrcoef(theirs, ours), rel=1e-10, abs=1e-10
    )


def test_correlations_equal_scipy():
    rng = np.random.default_rng(0)
    x = rng.normal(size=40)
    y = np.round(x + rng.normal(size=40), 1)  # with ties
    assert scores.pearson(x, y) == pytest.approx(100 * stats.pearsonr(x, y)[0], rel=1e-12)
    assert scores.spearman(x, y) == pytest.approx(100 * stats.spearmanr(x, y)[0], rel=1e-12)
    assert scores.pearson(np.ones(4), np.arange(4)) == 0.0


def test_multirc_over_a_table_of_answers():
    # question: gold, predicted
    table = {"p0q0": ([1, 0, 1], [1, 0, 1]), "p0q1": ([0, 0], [0, 1]), "p1q0": ([1], [1])}
    gold = [g for golds, _ in table.values() for g in golds]
    predicted = [p for _, ps in table.values() for p in ps]
    of = [name for name, (golds, _) in table.items() for _ in golds]
    found = scores.multirc(predicted, gold, of)
    assert found["EM"] == pytest.approx(100 * 2 / 3)
    assert found["F1a"] == pytest.approx(100 * metrics.f1_score(gold, predicted))  # over answers
    shuffled = np.random.default_rng(1).permutation(len(gold))
    again = scores.multirc(*(np.array(each)[shuffled] for each in (predicted, gold, of)))
    assert again == found


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Cat", "cat"),
        ("a", ""),
        ("An apple a day", "apple day"),
        ("theatre and anthem", "theatre and anthem"),  # articles are whole words
        ("U.S.A.", "usa"),  # points go before words are looked at
        ("10,000 - 20,000", "10000 20000"),
        ("  two\t\nlines ", "two lines"),
        ("O'Neill's", "oneills"),
        ("“quoted” – dash", "“quoted” – dash"),  # only ASCII punctuation goes
        ("ÉCOLE", "école"),
        ("", ""),
    ],
)
def test_squad_normalisation(answer, normal):
    assert scores.normalised(answer) == normal


@pytest.mark.parametrize(
    ("predicted", "golds", "exact", "f1"),
    [
        ("the Normans", ["Normans"], 1, 1),
        ("in 1066", ["1066"], 0, 2 / 3),  # precision 1/2, recall 1
        ("Duke William of Normandy", ["William", "Duke William"], 0, 2 / 3),  # the better gold
        ("cat cat", ["cat"], 0, 2 / 3),  # bags, not sets
        ("dog", ["cat"], 0, 0),
        ("", ["cat"], 0, 0),
        ("the", ["a"], 1, 0),  # SQuAD 1.1: nothing left in common, though equal
    ],
)
def test_squad_by_hand(predicted, golds, exact, f1):
    found = scores.squad([predicted], [golds])
    assert found == pytest.approx({"EM": 100 * exact, "F1": 100 * f1})


@pytest.mark.parametrize(
    ("predicted", "golds", "exact", "f1"),
    [
        ("", [], 1, 1),
        ("cat", [], 0, 0),
        ("", ["cat"], 0, 0),
        ("the", [], 1, 1),  # nothing is left of it
        ("", ["the", "..."], 1, 1),  # nor of these golds, so the question has no answer
        ("the", ["a", "cat"], 0, 0),
        ("a cat", ["cat", "dog"], 1, 1),
    ],
)
def test_squad2_by_hand(predicted, golds, exact, f1):
    found = scores.squad2([predicted], [golds])
    assert (found["EM"], found["F1"]) == pytest.approx((100 * exact, 100 * f1))


def test_squad2_counts_a_question_with_an_article_for_an_answer_as_answered():
    # By the official script: it is scored like one without an answer, but listed with the others.
    found = scores.squad2(["", "", "x"], [["the"], [], ["x"]])
    assert (found["EM"], found["HasAns_EM"], found["NoAns_EM"]) == (100.0, 100.0, 100.0)
    found = scores.squad2(["x", ""], [["the"], []])
    assert (found["HasAns_EM"], found["NoAns_EM"]) == (0.0, 100.0)


def squad2_by_definition(predicted, golds):
    """SQuAD 2.0's EM and F1 of one question, word for word as they are defined."""
    real = [gold for gold in golds if scores.normalised(gold)] or [""]
    exact, f1 = [], []
    for gold in real:
        said, right = (scores.normalised(each).split() for each in (predicted, gold))
        exact.append(said == right)
        same = sum(min(said.count(word), right.count(word)) for word in set(said))
        if not said or not right:
            f1.append(said == right)
        elif same:
            precision, recall = same / len(said), same / len(right)
            f1.append(2 * precision * recall / (precision + recall))
        else:
            f1.append(0)
    return max(exact), max(f1)


answers = st.text("axy the.,é“ ", max_size=8)


@given(st.lists(st.tuples(answers, st.lists(answers, max_size=3)), min_size=1, max_size=5))
@settings(deadline=None, max_examples=100)
def test_squad2_equals_its_definition(rows):
    found = scores.squad2([said for said, _ in rows], [golds for _, golds in rows])
    values = np.array([squad2_by_definition(*row) for row in rows], float)
    has = np.array([bool(golds) for _, golds in rows])
    for prefix, part in (("", np.ones_like(has)), ("HasAns_", has), ("NoAns_", ~has)):
        if part.any():
            expected = 100 * values[part].mean(0)
            assert [found[f"{prefix}{m}"] for m in ("EM", "F1")] == pytest.approx(expected)


def test_squad2_thresholds_are_the_best_of_all():
    golds = [["cat"], [], ["a dog"], [], ["cow"], ["big cow"]]
    answers = ["cat", "cat", "horse", "dog", "cow", "cow"]
    for odds in itertools.product([-1.0, 0.5], [0.5, 2.0], *[[-1.0, 2.0]] * 4):
        found = scores.squad2(answers, golds, odds)
        for name in ("EM", "F1"):
            # Every way to cut, tried out with the plain metric.
            tried = {
                t: scores.squad2(
                    [a if o <= t else "" for a, o in zip(answers, odds, strict=True)], golds
                )[name]
                for t in (-np.inf, *odds)
            }
            assert found[f"best_{name}"] == pytest.approx(max(tried.values()))
            assert tried[found[f"best_{name}_threshold"]] == pytest.approx(max(tried.values()))
    assert {"HasAns_EM", "NoAns_F1"} <= set(found)
    assert found["HasAns_F1"] == pytest.approx(100 * (1 + 0 + 1 + 2 / 3) / 4)
    with pytest.raises(ValueError, match="NaN"):
        scores.squad2(["x"], [["x"]], [np.nan])


SUPERGLUE = {
    "BoolQ": {"accuracy": 91.0},
    "CB": {"F1": 98.6, "accuracy": 99.2},
    "COPA": {"accuracy": 97.4},
    "MultiRC": {"F1a": 88.6, "EM": 63.2},
    "ReCoRD": {"F1": 94.7, "EM": 94.2},
    "RTE": {"accuracy": 92.6},
    "WiC": {"accuracy": 77.4},
    "WSC": {"accuracy": 97.3},
}


def test_the_aggregate_is_the_mean_over_tasks_of_their_means():
    assert scores.aggregate({n: list(m.values()) for n, m in SUPERGLUE.items()}) == pytest.approx(
        90.61875, abs=1e-12
    )
    table = scores.table({name: Score(m, 10 * i) for i, (name, m) in enumerate(SUPERGLUE.items())})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert rows[0] == ["task", "n", "metrics", "score"]
    assert rows[3] == ["CB", "10", "F1 98.6, accuracy 99.2", "98.9"]
    assert rows[-1] == ["mean of 8 tasks", "280", "", "90.6"]
    assert all(row[1].isdigit() for row in rows[2:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scores.accuracy([1], [1, 0]), r"\(1,\) predictions .* \(2,\) labels"),
        (lambda: scores.macro_f1([], []), "nothing to score"),
        (lambda: scores.squad(["a"], [[]]), "question 0 has no gold answer"),
        (lambda: scores.squad(["a"], []), "1 answers cannot be scored on 0 questions"),
        (lambda: scores.aggregate({"CB": []}), "at least one metric of every task"),
    ],
)
def test_what_cannot_be_scored_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
