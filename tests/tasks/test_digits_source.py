import numpy as np
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from jmeta.tasks.digits import digits
from jmeta.tasks.episodes import episodes


def test_all_digits_are_those_of_scikit_learn():
    bunch = load_digits()
    source = digits()
    np.testing.assert_array_equal(source.y, bunch.target)
    np.testing.assert_array_equal(source.x[..., 0] * 16, bunch.images)
    assert source.x.dtype == np.float32


def test_class_split_and_one_shot_episodes_that_can_be_solved():
    train, test = digits(range(6)), digits(range(6, 10))
    assert not set(train.names) & set(test.names)
    assert len(train.y) + len(test.y) == 1797
    batch = episodes(test, ways=4, shots=5, queries=10, tasks=20)(0, 0)
    hits = [
        KNeighborsClassifier(1)
        .fit(batch.support["x"][t].reshape(20, -1), batch.support["y"][t])
        .score(batch.query["x"][t].reshape(40, -1), batch.query["y"][t])
        for t in range(20)
    ]
    assert np.mean(hits) > 0.9  # labels follow the images; chance is 0.25
