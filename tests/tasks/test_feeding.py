import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmeta.data.loader import episode_loader
from jmeta.tasks import feeding
from jmeta.tasks.feeding import array_batches, labelled, meta_batches, over_windows, text_batches
from jmeta.tasks.mlm import corpus, masked
from jmeta.tasks.text import Example, TextTask, encode

pytestmark = pytest.mark.usefixtures("text_cache")

TASK = TextTask("feed", 2, ("0", "1"), ("sep", "cls"))


@pytest.fixture(scope="module")
def source(bpe):
    """Nine examples; example i says i, and every third is too long for one window."""
    said = [f"{i} " * (20 if i % 3 == 0 else 1) for i in range(9)]
    examples = [Example(a, label=i % 2) for i, a in enumerate(said)]
    return encode(TASK, examples, bpe, positions=12, stride=6)


@given(count=st.integers(1, 12), size=st.integers(1, 15), seed=st.integers(0, 3))
@settings(deadline=None, max_examples=50)
def test_epochs_hold_every_row_once(count, size, seed):
    rows = feeding.shuffled(count, size)
    taken = np.concatenate([rows(seed, step) for step in range(2 * count)])
    epochs = taken[: len(taken) // count * count].reshape(-1, count)
    assert (np.sort(epochs, axis=1) == np.arange(count)).all()
    again = feeding.shuffled(count, size)  # a function of (seed, step), whatever came before
    np.testing.assert_array_equal(again(seed, count), rows(seed, count))


def test_orders_differ_by_seed_and_epoch():
    rows = feeding.shuffled(50, 50)
    orders = [rows(seed, step).tolist() for seed in (0, 1) for step in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_training_takes_one_random_window_of_each_example(source):
    sample = text_batches(source, 9)
    seen = set()
    for step in range(60):
        found = sample(0, step)
        rows = {tuple(row) for row in found["tokens"].tolist()}
        windows = [i for i, row in enumerate(source.tokens.tolist()) if tuple(row) in rows]
        assert sorted(set(source.example[windows])) == list(range(9))
        seen |= rows
    assert seen == {tuple(row) for row in source.tokens.tolist()}
    np.testing.assert_array_equal(sample(3, 5)["tokens"], text_batches(source, 9)(3, 5)["tokens"])


def test_evaluation_takes_all_windows_in_order(source):
    shapes = []

    def apply(window):
        shapes.append(window["tokens"].shape)
        return {"sum": window["tokens"].sum(-1), "y": window["y"]}

    found = over_windows(source, apply, 4)
    np.testing.assert_array_equal(found["sum"], source.tokens.astype(int).sum(-1))
    np.testing.assert_array_equal(found["y"], source.label[source.example])
    assert set(shapes) == {(4, 12)}  # one shape: compiled once


def test_arrays_by_batches():
    arrays = {"a": np.arange(5), "b": np.arange(10).reshape(5, 2)}
    found = array_batches(arrays, 3)(0, 1)
    np.testing.assert_array_equal(found["b"], arrays["b"][found["a"]])
    with pytest.raises(ValueError, match="equally long"):
        array_batches({"a": np.arange(5), "b": np.arange(4)}, 2)
    with pytest.raises(ValueError, match="a batch of 0"):
        array_batches(np.arange(3), 0)


def number(bpe, row):
    """Which example a window is of: its text says so."""
    return int(bpe.tokenizer.decode(row[1:3].tolist()).split()[0])


@pytest.fixture(scope="module")
def mixture(bpe, source):
    other = TextTask("other", 5, ("0", "1"), ("sep", "cls"))
    examples = [Example(f"{i}", label=0) for i in range(4)]
    small = encode(other, examples, bpe, positions=12)
    unlabelled = masked(corpus(["the cat sat", "a dog", "it saw"], bpe), bpe, 12)
    return [labelled("feed", source), labelled("other", small)], unlabelled


def test_blocks_share_a_task_and_support_and_query_are_disjoint(bpe, mixture):
    tasks, unlabelled = mixture
    sample = meta_batches(
        tasks, size=6, samples_per_task=4, shots=2, queries=1, unlabelled=unlabelled
    )
    first = []  # of every episode, the token that names its task
    for step in range(200):
        episode = sample(0, step)
        both = np.concatenate([episode.support["tokens"], episode.query["tokens"]], axis=1)
        assert episode.support["tokens"].shape == (6, 2, 12)
        assert episode.query["labels"].shape == (6, 1, 12)
        for rows in both:
            heads = set(rows[:, 0].tolist())
            assert len(heads) == 1  # one task for the support and the query
            first.append(heads.pop())
            if first[-1] != bpe.cls[1]:
                assert len({number(bpe, row) for row in rows}) == 3  # distinct examples
    blocks = np.reshape(first, (-1, 4))
    assert (blocks == blocks[:, :1]).all()  # four in a row, across batches of six
    drawn = blocks[:, 0]
    half = (drawn == bpe.cls[1]).mean()
    error = 3 * 0.5 / np.sqrt(len(drawn))
    assert abs(half - 0.5) < error  # unlabelled text: half of the time
    assert abs((drawn == bpe.cls[2]).mean() - 0.25) < error
    assert abs((drawn == bpe.cls[5]).mean() - 0.25) < error


def test_without_text_the_tasks_come_alike(bpe, mixture):
    sample = meta_batches(mixture[0], size=8, samples_per_task=1)
    heads = np.concatenate([sample(1, step).support["tokens"][:, 0, 0] for step in range(60)])
    assert set(heads.tolist()) == {bpe.cls[2], bpe.cls[5]}
    assert abs((heads == bpe.cls[2]).mean() - 0.5) < 3 * 0.5 / np.sqrt(len(heads))


def test_the_loader_feeds_and_resumes(mixture):
    sample = meta_batches(mixture[0], size=4, samples_per_task=2, unlabelled=mixture[1])
    loader = episode_loader(sample, seed=7)
    taken = [next(loader) for _ in range(5)]
    loader.restore(3)
    again = [next(loader) for _ in range(2)]
    loader.close()
    for old, new in zip(taken[3:], again, strict=True):
        jax.tree.map(np.testing.assert_array_equal, old, new)
    jax.tree.map(np.testing.assert_array_equal, taken[4], sample(7, 4))


def test_small_tasks_and_unequal_lengths_are_errors(bpe, mixture, source):
    one = encode(TASK, [Example("a", label=0)], bpe, positions=12)
    with pytest.raises(ValueError, match=r"tiny has 1, needs 2 distinct examples \(1 support \+ 1"):
        meta_batches([labelled("tiny", one)], size=2, samples_per_task=1)
    longer = encode(TASK, [Example(f"{i}", label=0) for i in range(3)], bpe, positions=13)
    with pytest.raises(ValueError, match=r"as many positions, not feed with 12, feed with 13"):
        meta_batches([mixture[0][0], labelled("feed", longer)], size=2, samples_per_task=1)
    with pytest.raises(ValueError, match="no episodes from 0 tasks"):
        meta_batches([], size=2, samples_per_task=1)


def test_equal_examples_are_drawn_once(bpe):
    said = [("the cat", 0), ("a dog " * 9, 1), ("the cat", 0), ("a dog " * 9, 1), ("the cat", 1)]
    examples = [Example(a, label=label) for a, label in said]
    source = labelled("twice", encode(TASK, examples, bpe, positions=12, stride=6))
    assert source.examples == 3
    for seed in range(20):
        drawn = source.draw(np.random.default_rng(seed), 3)
        pairs = np.concatenate([drawn["tokens"], drawn["labels"]], axis=1)
        assert len(np.unique(pairs, axis=0)) == 3


def test_examples_without_a_label_are_nothing_to_learn_from(bpe):
    hidden = encode(TASK, [Example("a", label=0), Example("b")], bpe, positions=12)
    with pytest.raises(ValueError, match="the label of row 1 of feed is hidden"):
        labelled("feed", hidden)
    likeness = encode(TextTask("likeness", 18, kind="score"), [Example("a", "b", 1.0)], bpe)
    with pytest.raises(ValueError, match="likeness has scores in place of labels"):
        labelled("likeness", likeness)
