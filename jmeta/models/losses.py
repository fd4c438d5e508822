"""Losses and metrics under one masking rule: normalised by the sum of the mask, pads add nothing.

The shapes of ``mask`` and of the labels agree; entries may be any non-negative weights.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jmeta.core.tree import at_least_float32
from jmeta.core.types import Array


def cross_entropy(logits: Array, labels: Array, mask: Array | None = None) -> Array:
    r"""Mean negative log-likelihood of the labels.

    .. math:: L = \frac{\sum_i m_i (\log \sum_c e^{z_{ic}} - z_{i y_i})}{\sum_i m_i}

    Args:
        logits: ``[..., classes]``, accumulated in at least float32.
        labels: ``[...]`` int; a masked label may be anything.
        mask: ``[...]``, 1 counts and 0 is padding; None: everything counts. If it sums to zero,
            so does the loss.

    Returns:
        A scalar of at least float32, in nats.

    Raises:
        ValueError: shapes disagree.

    Example:
        >>> uniform = jnp.zeros((3, 4))
        >>> print(cross_entropy(uniform, jnp.array([0, 1, 3])).round(4))  # log 4
        1.3863
    """
    _same("labels", labels, "logits without their last axis", logits.shape[:-1])
    scores = logits.astype(at_least_float32(logits.dtype))
    shift = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    total = jnp.log(jnp.exp(scores - shift).sum(-1)) + shift[..., 0]
    # A product with a one-hot, not a gather: few classes, and its transpose is no scatter.
    chosen = labels[..., None] == jnp.arange(scores.shape[-1], dtype=labels.dtype).reshape(
        (1,) * labels.ndim + (-1,)
    )
    picked = jnp.where(chosen, scores, 0).sum(-1)
    return _masked_mean(total - picked, mask)


def soft_cross_entropy(logits: Array, target: Array, mask: Array | None = None) -> Array:
    r"""Cross-entropy to target distributions, normalised by their mass.

    .. math:: L = \frac{\sum_i m_i \sum_c y_{ic} (\log \sum_k e^{z_{ik}} - z_{ic})}
        {\sum_i m_i \sum_c y_{ic}}

    Args:
        logits: ``[..., classes]``, accumulated in at least float32.
        target: ``[..., classes]``, non-negative; one-hot targets give ``cross_entropy``.
        mask: ``[...]``, 1 counts and 0 is padding; None: everything counts. If no mass is left,
            the loss is zero.

    Returns:
        A scalar of at least float32, in nats.

    Raises:
        ValueError: shapes disagree.

    Example:
        >>> print(soft_cross_entropy(jnp.zeros((1, 4)), jnp.array([[0.5, 0.5, 0, 0]])).round(4))
        1.3863
    """
    _same("target", target, "logits", logits.shape)
    scores = logits.astype(at_least_float32(logits.dtype))
    target = target.astype(scores.dtype)
    if mask is not None:
        _same("mask", mask, "logits without their last axis", logits.shape[:-1])
        # where: a pad may hold inf or NaN, and 0 * inf is NaN.
        kept = (mask != 0)[..., None]
        target = jnp.where(kept, target * mask.astype(scores.dtype)[..., None], 0)
        scores = jnp.where(kept, scores, 0)
    shift = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    total = jnp.log(jnp.exp(scores - shift).sum(-1, keepdims=True)) + shift
    mass = target.sum()
    return (target * (total - scores)).sum() / jnp.where(mass == 0, 1, mass)


def accuracy(logits: Array, labels: Array, mask: Array | None = None) -> Array:
    """Fraction of labels that are the argmax of their logits; the first of equal logits wins.

    Args:
        logits: ``[..., classes]``.
        labels: ``[...]`` int.
        mask: ``[...]``, 1 counts and 0 is padding; None: everything counts.

    Returns:
        A float scalar in [0, 1]; 0 if the mask sums to zero.

    Raises:
        ValueError: shapes disagree.

    Example:
        >>> logits = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> print(accuracy(logits, jnp.array([0, 0])))
        0.5
    """
    _same("labels", labels, "logits without their last axis", logits.shape[:-1])
    hits = logits.argmax(-1).astype(labels.dtype) == labels
    return _masked_mean(hits.astype(at_least_float32(logits.dtype)), mask)


def squared_error(prediction: Array, target: Array, mask: Array | None = None) -> Array:
    r"""Mean squared error over the entries that count.

    .. math:: L = \frac{\sum_i m_i (\hat y_i - y_i)^2}{\sum_i m_i}

    Args:
        prediction: ``[...]`` float.
        target: the same shape.
        mask: the same shape, or without the last axes of ``prediction``, over which the mean is
            then taken first; 1 counts and 0 is padding. None: everything counts.

    Returns:
        A scalar of at least float32; 0 if the mask sums to zero.

    Raises:
        ValueError: shapes disagree.

    Example:
        >>> print(squared_error(jnp.array([1.0, 5.0]), jnp.array([3.0, 0.0]), jnp.array([1, 0])))
        4.0
    """
    _same("target", target, "prediction", prediction.shape)
    dtype = at_least_float32(prediction.dtype)
    errors = (prediction.astype(dtype) - target.astype(dtype)) ** 2
    if mask is not None:
        _same("mask", mask, "the leading axes of prediction", errors.shape[: mask.ndim])
        errors = errors.mean(range(mask.ndim, errors.ndim))
    return _masked_mean(errors, mask)


def _masked_mean(values: Array, mask: Array | None) -> Array:
    if mask is None:
        return values.mean()
    _same("mask", mask, "labels", values.shape)
    weights = mask.astype(values.dtype)
    # where: a pad may hold inf or NaN, and 0 * inf is NaN.
    total = jnp.where(weights == 0, 0, values * weights).sum()
    count = weights.sum()
    return total / jnp.where(count == 0, 1, count)


def _same(name: str, array: Array, other: str, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; {other} has {shape}")
