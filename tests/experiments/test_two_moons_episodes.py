"""Two Moons as text: sequences, labelled points and episodes, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _teacher_shared as shared
from experiments import _two_moons_data as data_of
from experiments import _two_moons_methods as methods_of
from experiments import two_moons
from jmeta.core.types import Steps
from jmeta.tasks.text import batch, encode
from jmeta.tasks.two_moons import WHICH_MOON, moon_examples


@pytest.fixture(scope="module")
def data():
    return data_of.load(20, 1000)


@pytest.mark.parametrize(
    ("n", "accuracy"), [(10, 0.999), (20, 0.997), (40, 0.998), (80, 1.0), (160, 0.997)]
)
def test_predictors_without_a_network_are_better_than_what_was_published(data, n, accuracy):
    said = data_of.nearest_neighbour(data_of.labelled(n, 3, fresh=False), data.test.cells)
    assert round((said == data.test.labels).mean(), 3) == accuracy
    assert data_of.majority(data.test) == 0.511
    first, second = (data_of.labelled(n, seed, fresh=True).cells for seed in (0, 1))
    assert not np.array_equal(first, second)


def test_points_and_sequences_in_the_unified_format(data):
    cells, labels = data_of.labelled(40, 0, fresh=False)
    encoded = encode(WHICH_MOON, moon_examples(cells, labels), data.words, positions=34)
    expected = batch(encoded, np.arange(40))
    found = data_of.moon_batch(data, cells, labels, 34)
    for name in ("tokens", "mask", "labels", "weights"):
        np.testing.assert_array_equal(found[name], expected[name])
    assert data.train.shape == (32_000, 34)
    assert (data.train[:, 0] == data.words.cls[1]).all()
    numbers = data.words.tokenizer.decode(data.train[5, 1:-1].tolist()).split()
    assert len(numbers) == 32
    assert {int(number) for number in numbers} <= set(range(64))


def _chunk(data, **changed):
    options = {"inner_steps": 1, "keep": ("masked",), "labelled": 4, "mlm_task": False,
               "mask_bug": False, "among_classes": False}  # fmt: skip
    points = data_of.labelled(10, 0, fresh=False)
    return data_of.teacher_chunk(data, points, 0, 7, (20, 3, 4), **(options | changed)), points


def test_support_and_query_share_no_point_and_come_from_the_labelled_ones(data):
    episode, points = _chunk(data)
    known = {
        (*row["tokens"], *row["labels"])
        for i in range(10)
        for row in [data_of.moon_batch(data, points.cells[i], points.labels[i])]
    }
    parts = [
        [{(*t, *y) for t, y in zip(tokens, labels, strict=True)}
         for tokens, labels in zip(part["tokens"].reshape(60, 4, 4),
                                   part["labels"].reshape(60, 4, 4), strict=True)]
        for part in episode.query
    ]  # fmt: skip
    assert all(support <= known and query <= known for support, query in zip(*parts, strict=True))
    assert not any(support & query for support, query in zip(*parts, strict=True))
    assert set.union(*parts[1]) == known
    again, _ = _chunk(data)
    np.testing.assert_array_equal(again.query.query["tokens"], episode.query.query["tokens"])


def test_what_a_teacher_is_given_is_what_the_settings_say(data):
    config = two_moons.Config(
        methods=("mask-budget",), mlm_task=(), among_classes=True, support_steps=3, chunk=2,
        samples=64, evaluations=1, teacher_labels=40, labelled_batch=20,
    )  # fmt: skip
    built = methods_of.build(config, data, "mask-budget")
    episode = built.chunk(0, 0)
    assert "classes" in episode.query.support
    assert episode.support["tokens"].shape == (2, 4, 4, 34)
    # Halves of the forty points: together they are all of them, each once.
    points = data_of.labelled(40, 0, fresh=False)
    every = sorted(map(tuple, data_of.moon_batch(data, points.cells, points.labels)["tokens"]))
    halves = [part["tokens"].reshape(8, 20, -1) for part in episode.query]
    for both in np.concatenate(halves, axis=1):
        assert sorted(map(tuple, both)) == every
    shape = methods_of.network(config, data)
    assert shared.student(config, shape, None).support_steps == 3
    # Whatever the teacher's body says, so much is masked of what may be.
    rewriting, start = shared.rewriting("mask-budget", data.words, shape)
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[0, 0]), episode.support)
    meta = jax.tree.map(lambda leaf: 5 * leaf, start(jax.random.key(0)))
    masked = jax.nn.softmax(jax.jit(rewriting.scores)(meta, batch, None)["masked"])[..., 1]
    share = (masked * batch["ordinary"]).sum(-1) / batch["ordinary"].sum(-1)
    np.testing.assert_allclose(share, 0.15, rtol=1e-4)


def test_points_are_scored_among_the_labels_of_their_task_if_asked(data):
    plain, _ = _chunk(data)
    among, _ = _chunk(data, among_classes=True)
    for part, other in zip(among.query, plain.query, strict=True):
        assert set(part) - set(other) == {"classes"}
        assert part["classes"].shape == (20, 3, 1, 2)
        assert (part["classes"] == data_of.label_tokens(data)).all()
        assert set(np.unique(part["labels"])) == set(data_of.label_tokens(data))


def test_mlm_is_a_task_half_of_the_time_and_the_mask_bug_counts_what_has_no_label(data):
    right, _ = _chunk(data, mlm_task=True)
    wrong, _ = _chunk(data, mlm_task=True, mask_bug=True)
    for part, bad in zip(right.query, wrong.query, strict=True):
        is_mlm = part["tokens"][..., 0] == data.words.cls[1]
        assert 0.3 < is_mlm.mean() < 0.7
        assert (is_mlm.all((2, 3)) | ~is_mlm.any((2, 3))).all()  # one task a micro-batch
        np.testing.assert_array_equal(part["weights"] != 0, part["labels"] != data.words.pad)
        np.testing.assert_array_equal(bad["weights"], part["mask"])
        np.testing.assert_array_equal(bad["labels"], part["labels"])
        unlabelled = bad["labels"][is_mlm][bad["weights"][is_mlm] != 0] == data.words.pad
        assert 0.75 < unlabelled.mean() < 0.95
    assert right.query.support["tokens"].shape == (20, 3, 1, 4, 34)


def test_an_epoch_holds_every_sequence_once_and_inner_steps_have_batches_of_their_own(data):
    small = data._replace(train=data.train[:60])
    first = data_of.corrupted(small, 0, 0, (5, 3, 4))
    text = np.where(first["weights"] != 0, first["labels"], first["tokens"]).reshape(60, 34)
    np.testing.assert_array_equal(np.unique(text, axis=0), np.unique(small.train, axis=0))
    several, _ = _chunk(data, inner_steps=2)
    assert isinstance(several.support, Steps)
    assert several.support.batches["tokens"].shape == (20, 3, 2, 4, 34)
