import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from jmeta.tasks.feeding import text_batches
from jmeta.tasks.mlm import corpus, masked
from jmeta.tasks.text import HIDDEN, batch, encode
from jmeta.tasks.two_moons import (
    TEST,
    WHICH_MOON,
    as_text,
    moon_episodes,
    moon_examples,
    moon_vocabulary,
    moons,
    sequences,
    to_grid,
    two_moons,
    which_moon,
)


@pytest.fixture(scope="module")
def toy():
    return two_moons()


def test_facts_of_the_million_points(toy):
    points, labels = moons(1_000_000, seed=42)
    cells = to_grid(points)
    number = cells[:, 0] * 64 + cells[:, 1]
    assert labels.sum() == 500_000
    assert len(np.unique(number)) == 2245
    votes = np.stack([np.bincount(number[labels == c], minlength=4096) for c in (0, 1)])
    assert round(votes.max(0).sum() / 1e6, 5) == 0.99937
    test_cells, test_labels = toy.test
    assert max(test_labels.mean(), 1 - test_labels.mean()) == 0.511
    np.testing.assert_array_equal(test_cells, cells[TEST])


@pytest.mark.parametrize(
    ("n", "accuracy"), [(10, 0.999), (20, 0.997), (40, 0.998), (80, 1.0), (160, 0.997)]
)
def test_one_nearest_neighbour_beats_every_reported_model(toy, n, accuracy):
    cells, labels = which_moon(n)
    assert round(KNeighborsClassifier(1).fit(cells, labels).score(*toy.test), 3) == accuracy
    assert not np.array_equal(which_moon(n, validation=True)[0], cells)


def test_sequences_hold_their_sixteen_points_sorted(toy):
    assert toy.train.shape == (32_000, 32)
    assert toy.validation.shape == (1_000, 32)
    assert len(np.unique(toy.vis, axis=0)) == 4096
    points, _ = moons(1_000_000, seed=42)
    for found, first in ((toy.train[7], 7 * 16), (toy.validation[3], 600_000 + 3 * 16)):
        pairs = sorted(map(tuple, to_grid(points[first : first + 16]).tolist()))
        assert found.reshape(16, 2).tolist() == [list(pair) for pair in pairs]
    with pytest.raises(ValueError, match="groups of 16"):
        sequences(np.zeros((17, 2), int))


def test_outside_points_go_to_the_edge():
    grid = to_grid(np.array([[-9.0, 9.0], [0.5, 0.25], [2.5, -1.0]]))
    np.testing.assert_array_equal(grid, [[0, 63], [31, 31], [63, 0]])


def test_episodes_are_moons_turned_and_moved():
    sample = moon_episodes(tasks=40, shots=3, queries=50, noise=0.0)
    batch = sample(0, 0)
    directions = []
    for x, y in zip(batch.query["x"], batch.query["y"], strict=True):
        # Each label is a half circle of radius 1: all its points are 1 from some centre, and the
        # two centres are as far apart as in the original.
        centres = []
        for label in (0, 1):
            points = x[y == label].astype(np.float64)
            features = np.concatenate([2 * points, np.ones((len(points), 1))], 1)
            a, b, c = np.linalg.lstsq(features, (points**2).sum(1), rcond=None)[0]
            assert abs(np.sqrt(c + a * a + b * b) - 1) < 1e-4
            centres.append((a, b))
        assert abs(np.linalg.norm(np.subtract(*centres)) - np.hypot(1, 0.5)) < 1e-3
        directions.append(np.arctan2(*np.subtract(*centres)))
    assert np.ptp(directions) > 5  # turned every way


def test_episodes_do_not_depend_on_the_number_of_tasks():
    small, large = moon_episodes(tasks=2, shots=(1, 3)), moon_episodes(tasks=4, shots=(1, 3))
    a, b = small(5, 6), large(5, 6)
    np.testing.assert_array_equal(a.support["x"], b.support["x"][:2])
    np.testing.assert_array_equal(a.query["x"], b.query["x"][:2])
    many = moon_episodes(tasks=50, shots=(1, 3))(0, 0).support
    assert set(many["mask"].sum(1)) == {2, 4, 6}
    assert (many["x"][many["mask"] == 0] == 0).all()
    np.testing.assert_array_equal(
        np.bincount(many["y"][many["mask"] == 1]), [many["mask"].sum() / 2] * 2
    )


def test_every_number_is_one_token():
    words = moon_vocabulary()
    assert words.size <= 512
    tokens = [words.tokenizer.encode(str(i)).ids for i in range(64)]
    assert {len(ids) for ids in tokens} == {1}
    assert len({ids[0] for ids in tokens}) == 64


def test_the_labelled_task_in_the_unified_format(text_cache):
    words = moon_vocabulary()
    cells, labels = which_moon(40)
    examples = moon_examples(cells, labels)
    assert examples[0].a == f"{cells[0, 0]} {cells[0, 1]}"
    found = batch(encode(WHICH_MOON, examples, words, positions=34), np.arange(40))
    x, y = (words.tokenizer.encode(str(n)).ids[0] for n in cells[7])
    assert found["tokens"][7, :5].tolist() == [words.cls[2], x, y, words.sep, words.pad]
    says = np.where(labels == 1, words.cls[2], words.sep)
    np.testing.assert_array_equal(found["labels"][:, :4], np.repeat(says[:, None], 4, 1))
    assert (found["labels"][:, 4:] == words.pad).all()
    np.testing.assert_array_equal(found["y"], labels)
    assert {e.label for e in moon_examples(cells)} == {HIDDEN}  # the cells of the plane
    assert text_batches(encode(WHICH_MOON, examples, words, positions=34), 8)(0, 0)["y"].size == 8


def test_sequences_are_texts_of_thirty_four_positions(toy, text_cache):
    words = moon_vocabulary()
    texts = as_text(toy.validation[:50])
    source = masked(corpus(texts, words), words, 34, select=0.0)
    drawn = source.draw(np.random.default_rng(0), 20)
    assert (drawn["mask"] == 1).all()
    said = {words.tokenizer.decode(row[1:-1].tolist()).strip() for row in drawn["tokens"]}
    assert said <= set(texts)
    assert len(said) == 20
