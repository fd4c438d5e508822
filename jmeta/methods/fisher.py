"""The diagonal of the Fisher information, of any network, one mean square for each output row.

Labels are those of the model, drawn or summed over; gradients are squared example by example.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jmeta.core.tree import path_name
from jmeta.core.types import Array, PyTree

Scores: TypeAlias = Callable[[PyTree, PyTree, PyTree], Array]
"""``(fixed, leaves, batch) -> [examples, ..., classes]``: logits, of one or several labels each."""

Pullback: TypeAlias = Callable[[Array], PyTree]
"""Cotangents of scores to the sum over examples of squared gradients."""

Squares: TypeAlias = Callable[[Scores, PyTree, PyTree, PyTree], tuple[Array, Pullback]]
"""``(scores, fixed, leaves, batch) -> (value, pullback)``."""


class Labels(NamedTuple):
    """Cotangents of scores, whose squared gradients add up to the Fisher information.

    Attributes:
        passes: ``shape -> int``: backward passes for scores of ``[..., classes]`` an example.
        cotangent: ``(scores, keys, index) -> cotangents`` of one pass; a key for each example.
    """

    passes: Callable[[tuple[int, ...]], int]
    cotangent: Callable[[Array, Array, Array], Array]


@functools.cache
def sampled(draws: int = 1) -> Labels:
    r"""Labels drawn from the model, each example's by a key of its own.

    .. math:: \nabla_z \log p(y \mid z) = e_y - p, \qquad y \sim p

    The labels of one example (positions, say) are drawn independently, so that in expectation the
    square of the sum of their gradients is the sum of their squares.

    Args:
        draws: how many of each, averaged over.

    Returns:
        ``Labels``.

    Raises:
        ValueError: no draw.

    Example:
        >>> keys = jax.random.split(jax.random.key(0), 1)
        >>> sampled().cotangent(jnp.array([[9.0, -90.0]]), keys, jnp.asarray(0)).tolist()
        [[0.0, 0.0]]
    """
    if draws < 1:
        raise ValueError(f"{draws} draws of a label are none")

    def cotangent(scores: Array, keys: Array, index: Array) -> Array:
        keys = jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)
        y = jax.vmap(lambda key, z: jax.random.categorical(key, z))(keys, scores)
        hot = jax.nn.one_hot(y, scores.shape[-1], dtype=scores.dtype)
        return (hot - jax.nn.softmax(scores)) / math.sqrt(draws)

    return Labels(lambda shape: draws, cotangent)


@functools.cache
def summed() -> Labels:
    r"""The expectation over the model's labels, class by class: no noise, a pass for each.

    .. math:: \mathbb{E}_{y \sim p}[g_y g_y^T] = \sum_c (\sqrt{p_c} g_c) (\sqrt{p_c} g_c)^T

    Returns:
        ``Labels``; as many backward passes as there are classes, times the labels of an example.

    Example:
        >>> summed().passes((10,)), summed().passes((128, 10))
        (10, 1280)
    """

    def cotangent(scores: Array, keys: Array, index: Array) -> Array:
        del keys
        classes = scores.shape[-1]
        place, label = index // classes, index % classes
        p = jax.nn.softmax(scores)
        one = jnp.take(jnp.sqrt(p), label, axis=-1)[..., None]
        cut = jax.nn.one_hot(label, classes, dtype=p.dtype).reshape((1,) * (p.ndim - 1) + (-1,))
        rows = (one * (cut - p)).reshape(p.shape[0], -1, classes)
        here = (jnp.arange(rows.shape[1]) == place)[None, :, None]
        return jnp.where(here, rows, 0).reshape(p.shape)

    return Labels(math.prod, cotangent)


def row_average(name: str, leaf: Array) -> Array:
    """The mean over the inputs of a kernel ``[..., in, out]``; biases and scales as they are.

    Args:
        name: dotted path of the leaf.
        leaf: squared gradients.

    Returns:
        ``[..., out]``.

    Example:
        >>> row_average("mlp.up.kernel", jnp.ones((3, 4, 5))).shape
        (3, 5)
    """
    vector = leaf.ndim < 2 or name.rpartition(".")[2] in ("bias", "scale")
    return leaf if vector else leaf.mean(-2)


@functools.cache
def per_example(average: Callable[[str, Array], Array] = row_average) -> Squares:
    """Squares of whole gradients, one for each example of a batch: for any network, and slow.

    Args:
        average: ``(name, squares) -> squares``, for each leaf.

    Returns:
        ``Squares``; ``leaves`` are the weights themselves. A batch of one is the loop of one
        gradient per example, a larger one ``vmap`` of it, with as many gradients in memory.
    """

    def squares(
        scores: Scores, fixed: PyTree, leaves: PyTree, batch: PyTree
    ) -> tuple[Array, Pullback]:
        def one(example: PyTree) -> tuple[Array, Any]:
            alone = jax.tree.map(lambda x: x[None], example)
            return jax.vjp(lambda weights: scores(fixed, weights, alone)[0], leaves)

        def rows(pull: Any, cotangent: Array) -> PyTree:
            return jax.tree_util.tree_map_with_path(
                lambda path, g: average(path_name(path), g * g), pull(cotangent)[0]
            )

        value, pulls = jax.vmap(one)(batch)
        return value, lambda ct: jax.tree.map(lambda x: x.sum(0), jax.vmap(rows)(pulls, ct))

    return squares


def tapped(scores: Scores, fixed: PyTree, leaves: PyTree, batch: PyTree) -> tuple[Array, Pullback]:
    """Squares that a network's taps compute in one backward pass of the whole batch.

    Args:
        scores: ``(fixed, leaves, batch) -> scores``, whose pull-back to ``leaves`` is, instead of a
            gradient, the sum of squared gradients, as ``jmeta.models.taps`` makes it.
        fixed: the weights.
        leaves: the taps.
        batch: inputs.

    Returns:
        The scores and their ``Pullback``.

    Example:
        >>> from jmeta.models import taps  # softmax regression again, its kernel tapped
        >>> linear = lambda kernel, squares, x: taps.tap(x, x @ kernel, squares)
        >>> x, key = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jax.random.key(0)
        >>> given = linear, jnp.zeros((2, 2)), jnp.zeros(2), x, key
        >>> fisher(*given, labels=summed(), squares=tapped).round(4).tolist()  # the mean of rows
        [1.875, 1.875]
    """
    value, pull = jax.vjp(lambda squares: scores(fixed, squares, batch), leaves)
    return value, lambda cotangent: pull(cotangent)[0]


@functools.partial(jax.jit, static_argnames=("scores", "labels", "squares", "batch_size"))
def fisher(
    scores: Scores,
    fixed: PyTree,
    leaves: PyTree,
    inputs: PyTree,
    key: Array,
    *,
    labels: Labels,
    squares: Squares,
    weights: Array | None = None,
    batch_size: int = 8,
) -> PyTree:
    r"""The diagonal of a network's Fisher information on some inputs.

    .. math:: F = \frac{1}{\sum_{bt} w_{bt}} \sum_{bt} w_{bt}\,
        \mathbb{E}_{y \sim p(y \mid x_b)} \left[(\nabla \log p_t(y \mid x_b))^2\right]

    Args:
        scores: ``(fixed, leaves, batch) -> [examples, ..., classes]``: logits, of one label for
            each example or of several.
        fixed: weights that are not differentiated, passed on.
        leaves: what is: weights, or taps.
        inputs: a pytree of ``[examples, ...]``.
        key: of drawn labels, each example's by its number, so that batches change nothing.
        labels: ``sampled()`` or ``summed()``.
        squares: ``per_example()`` where ``leaves`` are weights, ``tapped`` where they are taps.
        weights: 1 for labels that count, 0 for padding, of the shape of the scores without
            classes; None: all count.
        batch_size: examples at a time; memory depends on it, and not on how many there are.

    Returns:
        A pytree as ``squares`` gives it.

    Example:
        >>> linear = lambda fixed, kernel, x: x @ kernel  # softmax regression
        >>> x, key = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jax.random.key(0)
        >>> whole = per_example(lambda name, squares: squares)
        >>> found = fisher(linear, (), jnp.zeros((2, 2)), x, key, labels=summed(), squares=whole)
        >>> found.round(4).tolist()
        [[1.25, 1.25], [2.5, 2.5]]

    Source: Achille et al., "Task2Vec" (2019), section 3; their code squares the mean gradient of a
    batch, which is unbiased up to a factor for drawn labels and wrong for those of the data.
    """
    count = jax.tree.leaves(inputs)[0].shape[0]
    size = min(batch_size, count)
    numbers = jnp.arange(-(-count // size) * size).reshape(-1, size)
    valid = numbers < count

    def shape_of(function: Callable[..., Any], *args: Any) -> Any:
        return jax.eval_shape(function, *args)

    first = jax.tree.map(lambda x: x[:size], inputs)
    value = shape_of(scores, fixed, leaves, first)
    if value.ndim < 2 or value.shape[0] != size:
        raise ValueError(f"scores are [examples, ..., classes]; of {size} examples: {value.shape}")
    passes = labels.passes(value.shape[1:])
    counted = jnp.ones((count, *value.shape[1:-1]), value.dtype) if weights is None else weights
    if counted.shape != (count, *value.shape[1:-1]):
        raise ValueError(
            f"weights have shape {counted.shape}; the labels {(count, *value.shape[1:-1])}"
        )

    def pulled(batch: PyTree, cotangent: Array) -> PyTree:
        return squares(scores, fixed, leaves, batch)[1](cotangent)

    total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape_of(pulled, first, value))

    def step(total: PyTree, each: tuple[Array, Array]) -> tuple[PyTree, None]:
        number, real = each
        take = jnp.where(real, number, 0)
        value, pull = squares(scores, fixed, leaves, jax.tree.map(lambda x: x[take], inputs))
        keys = jax.vmap(lambda n: jax.random.fold_in(key, n))(take)
        w = counted[take].astype(value.dtype)
        w = jnp.sqrt(jnp.where(real.reshape((-1,) + (1,) * (w.ndim - 1)), w, 0))[..., None]

        def add(total: PyTree, index: Array) -> tuple[PyTree, None]:
            cotangent = labels.cotangent(value, keys, index) * w
            return jax.tree.map(jnp.add, total, pull(cotangent)), None

        return jax.lax.scan(add, total, jnp.arange(passes))[0], None

    total, _ = jax.lax.scan(step, total, (numbers, valid))
    whole = counted.sum()
    return jax.tree.map(lambda x: x / whole.astype(x.dtype), total)
