"""The core types: data of a task, a problem to differentiate, an estimator of its meta-gradient.

Everything else in jmeta takes or returns one of these; all of them are pytrees or plain functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import optax

PyTree: TypeAlias = Any
Array: TypeAlias = jax.Array
Key: TypeAlias = jax.Array | None
LossFn: TypeAlias = Callable[[PyTree, PyTree, PyTree, Key], tuple[Array, PyTree]]


class Steps(NamedTuple):
    """Marks data with a leading step axis: one batch for each inner step.

    Attributes:
        batches: a pytree of arrays of shape ``[steps, ...]``.
    """

    batches: PyTree


class Episode(NamedTuple):
    """The data of one task; batching episodes adds a leading task axis to every leaf.

    Attributes:
        support: what the inner loop learns from: one batch, used at every inner step, or
            ``Steps(batches)`` with one batch for each.
        query: what the adapted weights are scored on; unused by the ``online`` objective.
    """

    support: PyTree
    query: PyTree = None


def start_from_meta(meta: PyTree, key: Key) -> PyTree:
    """The default ``Problem.init``: the fast weights start at the meta-parameters (MAML)."""
    del key
    return meta


def no_encoding(meta: PyTree, batch: PyTree, key: Key) -> PyTree:
    """The default ``Problem.encode``: the batch as it is."""
    del meta, key
    return batch


class Problem(NamedTuple):
    r"""A bilevel problem: two losses, where the fast weights start, and what moves them.

    .. math::
        \min_\phi L_{out}(\theta_T(\phi), \phi), \qquad
        \theta_{t+1} = \theta_t + \mathrm{optimizer}_\phi(\nabla_\theta L_{in}(\theta_t, \phi)),
        \qquad \theta_0 = \mathrm{init}(\phi)

    Attributes:
        inner_loss: ``(fast, meta, batch, key) -> (loss, aux)``; ``loss`` is a scalar and ``aux``
            is a pytree of metrics, through which no gradient ever flows.
        outer_loss: the same signature, evaluated after adaptation on the query.
        optimizer: ``meta -> optax.GradientTransformation``: a function of meta, so that learning
            rates can be meta-learned. One that asks for the loss (``value``) is told the inner one.
        init: ``(meta, key) -> fast``. Default: meta itself. ANIL: the head. A teacher: its student.
        encode: ``(meta, batch, key) -> batch``, applied once per batch and episode, outside the
            inner loop: put what does not adapt here. Default: identity.
    """

    inner_loss: LossFn
    outer_loss: LossFn
    optimizer: Callable[[PyTree], optax.GradientTransformation]
    init: Callable[[PyTree, Key], PyTree] = start_from_meta
    encode: Callable[[PyTree, PyTree, Key], PyTree] = no_encoding


class Info(NamedTuple):
    """What one estimate reports beside the gradient.

    Attributes:
        loss: the outer loss, a scalar.
        inner_losses: ``[steps]``, the inner loss before each update.
        aux: the outer loss's ``aux`` after the last step.
        grad_norm: global norm of the meta-gradient, a scalar.
        diagnostics: the estimator's own numbers (``implicit``: the solver's residual), a dict.
    """

    loss: Array
    inner_losses: Array
    aux: PyTree
    grad_norm: Array
    diagnostics: dict[str, Array] = {}  # noqa: RUF012  (a pytree default, never mutated)


class MetaGradient(NamedTuple):
    """An estimator of the meta-gradient, as a pair of pure functions.

    Attributes:
        init: ``(meta, key) -> state``; ``()`` unless the estimator persists between calls.
        estimate: ``(meta, state, episode, key) -> (grads, state, Info)``; ``grads`` has the
            structure, shapes and dtypes of ``meta``.
    """

    init: Callable[[PyTree, Key], PyTree]
    estimate: Callable[[PyTree, PyTree, Episode, Key], tuple[PyTree, PyTree, Info]]
