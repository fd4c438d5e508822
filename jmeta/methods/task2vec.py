"""Task2Vec: a task as the Fisher information of a fixed network, whose head was fitted to it."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jmeta.core.types import Array, PyTree
from jmeta.files import write_atomically
from jmeta.methods.fisher import Labels, Squares, fisher, sampled, tapped

Features: TypeAlias = Callable[[PyTree, PyTree, PyTree], Array]
"""``(fixed, leaves, batch) -> [examples, ..., width]``: the probe without its head."""

ABSENT = -1e30  # the score of a class that is not there


class Head(NamedTuple):
    """A linear classifier.

    Attributes:
        kernel: ``[width, classes]``.
        bias: ``[classes]``.
    """

    kernel: Array
    bias: Array


class TaskEmbedding(NamedTuple):
    """A task as a vector.

    Attributes:
        vector: ``[rows]``, the Fisher information of the probe, all leaves after each other.
        head: the classifier that was fitted.
        loss: its mean cross-entropy on the task, classes balanced.
    """

    vector: Array
    head: Head
    loss: Array


@functools.partial(jax.jit, static_argnames=("classes", "steps"))
def fit_head(
    features: Array, labels: Array, *, classes: int, penalty: float = 1.0, steps: int = 500,
    tolerance: float = 1e-6, weights: Array | None = None,
) -> tuple[Head, Array]:  # fmt: skip
    r"""Multinomial logistic regression, classes balanced, to convergence.

    .. math:: \min_{W, b} \frac{1}{\sum_i w_i} \sum_i w_i \, \mathrm{CE}(y_i, W^T h_i + b)
        + \frac{\lambda}{2 \sum_i w_i} \lVert W \rVert^2

    where :math:`w_i` is inverse to the size of the class, and one on average. The problem is
    convex, so that the head is a function of the data and of nothing else.

    Args:
        features: ``[examples, width]``.
        labels: int ``[examples]``.
        classes: how many there are; one without examples is never predicted.
        penalty: :math:`\lambda`.
        steps: of L-BFGS at most.
        tolerance: of the gradient's norm, where it stops.
        weights: ``[examples]``, 0 for those that do not count.

    Returns:
        The head and its mean balanced cross-entropy.

    Example:
        >>> x, y = jnp.array([[-1.0], [1.0], [3.0]]), jnp.array([0, 1, 1])
        >>> head, loss = fit_head(x, y, classes=2, penalty=0.1)
        >>> (x @ head.kernel + head.bias).argmax(1).tolist()
        [0, 1, 1]
    """
    given = jnp.ones(labels.shape, features.dtype) if weights is None else weights
    hot = jax.nn.one_hot(labels, classes, dtype=features.dtype) * given[:, None]
    sizes = hot.sum(0)
    present = sizes > 0
    each = sizes.sum() / present.sum().astype(hot.dtype)
    balanced = hot * jnp.where(present, each / jnp.where(present, sizes, 1), 0)[None]
    total = balanced.sum()
    absent = jnp.where(present, 0, ABSENT).astype(features.dtype)

    def scores(head: Head) -> Array:
        return features @ head.kernel + (head.bias + absent)[None]

    def cross_entropy(head: Head) -> Array:
        return -(balanced * jax.nn.log_softmax(scores(head))).sum() / total

    def objective(head: Head) -> Array:
        return cross_entropy(head) + 0.5 * penalty / total * (head.kernel**2).sum()

    rule = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry: tuple[Head, Any, Array]) -> tuple[Head, Any, Array]:
        head, state, _ = carry
        value, grads = value_and_grad(head, state=state)
        updates, state = rule.update(
            grads, state, head, value=value, grad=grads, value_fn=objective
        )
        head = optax.apply_updates(head, updates)
        norm = optax.tree.norm(optax.tree.get(state, "grad"))
        return cast(Head, head), state, norm

    def unfinished(carry: tuple[Head, Any, Array]) -> Array:
        _, state, norm = carry
        return (optax.tree.get(state, "count") < steps) & (norm > tolerance)

    zero = Head(
        jnp.zeros((features.shape[1], classes), features.dtype), jnp.zeros(classes, features.dtype)
    )
    start = (zero, rule.init(zero), jnp.asarray(jnp.inf, features.dtype))
    with jax.numpy_dtype_promotion("standard"):  # optax's own line search counts on it
        head, *_ = jax.lax.while_loop(unfinished, step, start)
    return Head(head.kernel, head.bias + absent), cross_entropy(head)


@functools.partial(jax.jit, static_argnames=("features", "batch_size"))
def cached_features(
    features: Features, fixed: PyTree, leaves: PyTree, inputs: PyTree, batch_size: int = 32
) -> Array:
    """The probe's features of all inputs, a batch at a time.

    Args:
        features: the probe.
        fixed: its first argument.
        leaves: its second.
        inputs: a pytree of ``[examples, ...]``.
        batch_size: examples at a time.

    Returns:
        ``[examples, ..., width]``.

    Example:
        >>> probe = lambda fixed, kernel, x: x @ kernel
        >>> cached_features(probe, (), jnp.ones((2, 3)), jnp.ones((5, 2)), batch_size=2).shape
        (5, 3)
    """
    count = jax.tree.leaves(inputs)[0].shape[0]
    size = min(batch_size, count)
    rows = jnp.minimum(jnp.arange(-(-count // size) * size), count - 1).reshape(-1, size)
    found = jax.lax.map(
        lambda take: features(fixed, leaves, jax.tree.map(lambda x: x[take], inputs)), rows
    )
    return found.reshape(-1, *found.shape[2:])[:count]


@functools.cache
def with_head(features: Features) -> Callable[[PyTree, PyTree, PyTree], Array]:
    """Scores of a probe: ``fixed`` is what the features take, and a ``Head``.

    Args:
        features: the probe without a head.

    Returns:
        ``((fixed, head), leaves, batch) -> [examples, ..., classes]``; one function for one probe.

    Example:
        >>> scores = with_head(lambda fixed, leaves, x: x)
        >>> scores(((), Head(jnp.ones((2, 3)), jnp.zeros(3))), (), jnp.ones((1, 2))).tolist()
        [[2.0, 2.0, 2.0]]
    """

    def scores(fixed: PyTree, leaves: PyTree, batch: PyTree) -> Array:
        body, head = fixed
        found = features(body, leaves, batch)
        bias = head.bias.reshape((1,) * (found.ndim - 1) + (-1,))
        return found @ head.kernel + bias.astype(found.dtype)

    return scores


def task2vec(
    features: Features, fixed: PyTree, leaves: PyTree, inputs: PyTree, y: Array, key: Array, *,
    classes: int, labels: Labels | None = None, squares: Squares = tapped, penalty: float = 1.0,
    batch_size: int = 8,
) -> TaskEmbedding:  # fmt: skip
    r"""The embedding of a classification task by a fixed probe.

    .. math:: v = \mathrm{diag} \, F(w), \qquad F(w) = \mathbb{E}_x \mathbb{E}_{y \sim p_w(y|x)}
        \left[\nabla_w \log p_w \nabla_w \log p_w^T\right]

    of the body's weights w, averaged over the inputs of each output unit, under the head that fits
    the task. The body is never changed.

    Args:
        features: the probe without a head, ``(fixed, leaves, batch) -> [examples, width]``.
        fixed: its weights.
        leaves: the taps, where ``squares`` is ``tapped``; the weights to embed with, else.
        inputs: a pytree of ``[examples, ...]``.
        y: int ``[examples]``, the task's labels.
        key: of the labels that are drawn from the model.
        classes: number of classes; more than there are cost nothing but size.
        labels: ``sampled()`` by default, or ``summed()``.
        squares: ``tapped`` or ``per_example()``.
        penalty: of the head's weights.
        batch_size: examples at a time.

    Returns:
        A ``TaskEmbedding``.

    Example:
        >>> probe = lambda fixed, kernel, x: jnp.tanh(x @ kernel)
        >>> from jmeta.methods.fisher import per_example
        >>> x, y, key = jnp.eye(4), jnp.array([0, 0, 1, 1]), jax.random.key(0)
        >>> weights = {"kernel": jax.random.normal(key, (4, 3))}
        >>> probe = lambda fixed, w, x: jnp.tanh(x @ w["kernel"])
        >>> task2vec(probe, (), weights, x, y, key, classes=2, squares=per_example()).vector.shape
        (3,)

    Source: Achille et al., "Task2Vec: Task Embedding for Meta-Learning" (2019).
    """
    found = cached_features(features, fixed, leaves, inputs)
    head, loss = fit_head(found, y, classes=classes, penalty=penalty)
    diagonal = fisher(
        with_head(features), (fixed, head), leaves, inputs, key,
        labels=sampled() if labels is None else labels, squares=squares, batch_size=batch_size,
    )  # fmt: skip
    vector = jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(diagonal)])
    return TaskEmbedding(vector, head, loss)


def save_embeddings(
    path: Path | str, embeddings: Mapping[str, Any], metadata: Mapping[str, Any]
) -> Path:
    """Write task embeddings and what they were made with, atomically and without pickle.

    Args:
        path: of a ``.npz`` file.
        embeddings: vectors of one length, by task.
        metadata: anything that JSON holds: the probe, examples per task, seeds.

    Returns:
        The path.

    Raises:
        ValueError: there is none, or their lengths differ.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "tasks.npz"
        >>> _ = save_embeddings(path, {"cola": [0.5, 1.0]}, {"probe": "small"})
        >>> vectors, metadata = load_embeddings(path)
        >>> vectors["cola"].tolist(), metadata["probe"]
        ([0.5, 1.0], 'small')
    """
    vectors = {name: np.asarray(vector) for name, vector in embeddings.items()}
    lengths = {vector.shape for vector in vectors.values()}
    if len(lengths) != 1 or len(next(iter(lengths))) != 1:
        raise ValueError(f"embeddings are vectors of one length; found shapes {sorted(lengths)}")
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        names=np.asarray(list(vectors)),
        vectors=np.stack(list(vectors.values())),
        metadata=np.asarray(json.dumps(dict(metadata))),
    )
    return write_atomically(path, buffer.getvalue())


def load_embeddings(path: Path | str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what ``save_embeddings`` wrote.

    Args:
        path: of the file.

    Returns:
        Vectors by task, in their order, and the metadata.

    Raises:
        ValueError: the file holds no embeddings.

    Example:
        >>> import tempfile
        >>> path = save_embeddings(Path(tempfile.mkdtemp()) / "a.npz", {"rte": [1.0]}, {"seed": 3})
        >>> load_embeddings(path)[1]
        {'seed': 3}
    """
    with np.load(path, allow_pickle=False) as file:
        missing = {"names", "vectors", "metadata"} - set(file.files)
        if missing:
            raise ValueError(f"{path} holds no task embeddings: {sorted(missing)} missing")
        names, vectors = file["names"].tolist(), file["vectors"]
        return dict(zip(names, vectors, strict=True)), json.loads(str(file["metadata"]))
