"""Task2Vec: the head against scikit-learn, the embedding against its parts, and the file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_numbers import softmax
from sklearn.linear_model import LogisticRegression

from jmeta.methods import (
    cached_features,
    fit_head,
    load_embeddings,
    save_embeddings,
    task2vec,
)
from jmeta.methods.fisher import fisher, per_example, sampled, summed, tapped
from jmeta.methods.task_distances import normalised_cosine
from jmeta.methods.variational_fisher import variational_precision
from jmeta.models import gpt2, heads, taps

KEY = jax.random.key(0)


def blobs(seed=0, count=60, width=5, classes=3):
    rng = np.random.default_rng(seed)
    y = rng.choice(classes, count, p=softmax(np.arange(classes)))
    return rng.normal(size=(classes, width))[y] + rng.normal(size=(count, width)), y


def test_the_head_is_scikit_learns_and_stationary(x64):
    x, y = blobs()
    head, loss = fit_head(x, y, classes=3, penalty=0.5, tolerance=1e-12, steps=2000)
    theirs = LogisticRegression(
        C=2.0, class_weight="balanced", solver="newton-cg", tol=1e-12, max_iter=10_000
    )
    theirs.fit(x, y)
    head = jax.tree.map(np.asarray, head)
    p = softmax(x @ head.kernel + head.bias[None])
    np.testing.assert_allclose(p, theirs.predict_proba(x), atol=1e-7)
    # by hand: the gradient of the objective is zero
    hot = np.eye(3)[y]
    w = (len(y) / (3 * hot.sum(0)))[y][:, None]
    grad = x.T @ (w * (p - hot)) / len(y) + 0.5 / len(y) * head.kernel
    assert np.abs(grad).max() < 1e-10
    np.testing.assert_allclose(loss, -(w * hot * np.log(p)).sum() / len(y), rtol=1e-10)


def test_classes_and_rows_that_are_not_there_change_nothing(x64):
    x, y = blobs()
    # The penalty's default is weak: 500 steps, the default too, do not reach so low a tolerance.
    head, loss = fit_head(x, y, classes=3, tolerance=1e-12, steps=2000)
    more, same = fit_head(x, y, classes=5, tolerance=1e-12, steps=2000)
    more = jax.tree.map(np.asarray, more)
    np.testing.assert_allclose(more.kernel[:, :3], head.kernel, rtol=1e-10, atol=1e-9)
    np.testing.assert_allclose(loss, same, rtol=1e-10)
    assert softmax(x @ more.kernel + more.bias[None])[:, 3:].max() == 0
    counts = np.asarray([1.0] * 60 + [0.0] * 9)
    padded = np.concatenate([x, 100 * x[:9]]), np.concatenate([y, y[:9]])
    less, _ = fit_head(*padded, classes=3, tolerance=1e-12, weights=counts, steps=2000)
    np.testing.assert_allclose(less.kernel, head.kernel, rtol=1e-10, atol=1e-9)


def probe():
    config = gpt2.GPT2Config(vocab=20, width=8, layers=1, heads=2, max_len=6, ff=16)
    params = jax.jit(gpt2.init, static_argnums=0)(config, KEY)

    def features(params, made, batch):
        found = gpt2.hidden(config, taps.insert(params, made), batch)
        return heads.mean_pool(found, batch["mask"])

    return features, params, taps.taps(params)


def task(seed, count=40):
    """Whether a token of one half of the vocabulary comes first; the seed says which."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, count).astype(np.int32)
    low = np.asarray([3 + seed % 7, 12 - seed % 5])[y][:, None]
    tokens = low + rng.integers(0, 3, (count, 6))
    return {"tokens": tokens, "mask": np.ones((count, 6))}, y


def test_an_embedding_is_the_fisher_information_under_the_fitted_head(x64):
    features, params, made = probe()
    before = jax.tree.map(np.array, params)
    inputs, y = task(0)
    found = task2vec(features, params, made, inputs, y, KEY, classes=2)
    body = cached_features(features, params, made, inputs, batch_size=7)
    head, loss = fit_head(body, y, classes=2)
    jax.tree.map(np.testing.assert_array_equal, found.head, head)
    rows = fisher(
        lambda p, m, b: features(p, m, b) @ head.kernel + head.bias[None],
        params, made, inputs, KEY, labels=sampled(), squares=tapped,
    )  # fmt: skip
    vector = np.concatenate([np.ravel(x) for x in jax.tree.leaves(rows)])
    np.testing.assert_allclose(found.vector, vector, rtol=1e-9, atol=1e-18)
    assert float(found.loss) == float(loss) < np.log(2)
    jax.tree.map(np.testing.assert_array_equal, before, params)  # the probe is as it was


def test_halves_of_a_task_are_closer_than_different_tasks():
    features, params, made = probe()
    halves = []
    for seed in range(4):
        inputs, y = task(seed, 160)
        for part in (slice(0, 80), slice(80, 160)):
            batch = jax.tree.map(lambda x, part=part: x[part], inputs)
            embedded = task2vec(
                features, params, made, batch, y[part], KEY, classes=2, labels=summed()
            )
            halves.append(np.asarray(embedded.vector))
    own = max(normalised_cosine(halves[2 * i], halves[2 * i + 1]) for i in range(4))
    other = min(
        normalised_cosine(halves[i], halves[j])
        for i in range(8)
        for j in range(i)
        if i // 2 != j // 2
    )
    assert own < other


def test_variational_precisions_of_a_quadratic_loss(x64):
    """One over beta times the mean Hessian of a row, plus the prior's."""
    curvature = {
        "up": {"kernel": jnp.asarray([[1.0, 4.0], [3.0, 0.0]]), "bias": jnp.asarray([2.0, 5.0])}
    }
    weights = jax.tree.map(lambda h: 0 * h + 7.0, curvature)

    def loss(centre, w, batch):
        each = jax.tree.map(lambda h, a, b: 0.5 * (h * (a - b) ** 2).sum(), curvature, w, centre)
        return sum(jax.tree.leaves(each))

    beta = 1e-3
    found = variational_precision(
        loss, weights, weights, jnp.zeros((4, 1)), KEY, beta=beta, prior=0.5, initial=1e-3,
        rate=0.05, steps=3000, pairs=16,
    )  # fmt: skip
    expected = {"kernel": np.asarray([2.0, 2.0]), "bias": np.asarray([2.0, 5.0])}
    for name, h in expected.items():
        np.testing.assert_allclose(found["up"][name], h / beta + 2.0, rtol=0.05)


def test_variational_precisions_follow_the_fisher_information(x64):
    """Labels drawn from the model: the Hessian is the Fisher information in expectation."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 6)) * np.asarray([0.3, 0.5, 1.0, 1.5, 2.0, 3.0])[None]
    weights = {"kernel": 0.5 * rng.normal(size=(6, 4))}
    scores = lambda fixed, w, x: x @ w["kernel"] * jnp.asarray([0.2, 0.5, 1.0, 2.0])[None]  # noqa: E731
    said = x @ weights["kernel"] * np.asarray([0.2, 0.5, 1.0, 2.0])[None]
    y = (said + rng.gumbel(size=said.shape)).argmax(-1)

    def loss(fixed, w, batch):
        logs = jax.nn.log_softmax(scores((), w, batch[0]))
        return -jnp.take_along_axis(logs, batch[1][:, None], 1).mean()

    beta = 1e-5
    found = variational_precision(
        loss, (), weights, (x, y), KEY, beta=beta, prior=1e3, initial=1e-4, rate=0.05, steps=600,
        batch_size=100,
    )["kernel"]  # fmt: skip
    rows = fisher(scores, (), weights, x, KEY, labels=summed(), squares=per_example())["kernel"]
    np.testing.assert_allclose(beta * found, rows, rtol=0.25)
    assert float(rows.max() / rows.min()) > 5


def test_embeddings_come_back_with_what_they_were_made_with(tmp_path):
    path = tmp_path / "deep" / "tasks.npz"
    vectors = {"cola": np.arange(3.0), "rte, first half": np.ones(3)}
    save_embeddings(path, vectors, {"probe": "small", "examples": 64})
    found, metadata = load_embeddings(path)
    assert list(found) == list(vectors)
    assert metadata == {"probe": "small", "examples": 64}
    for name, vector in vectors.items():
        np.testing.assert_array_equal(found[name], vector)
    with pytest.raises(ValueError, match="one length"):
        save_embeddings(path, {"a": np.ones(2), "b": np.ones(3)}, {})
    assert list(load_embeddings(path)[0]) == list(vectors)  # what was there is still there
    np.savez(tmp_path / "other.npz", a=np.ones(2))
    with pytest.raises(ValueError, match="no task embeddings"):
        load_embeddings(tmp_path / "other.npz")
