"""Oracles: a problem with closed forms for every estimator, and central differences.

For jmeta's own tests and for users who write an estimator or a loss of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

from jmeta.core.types import Array, Episode, Key, Problem, PyTree


class Quadratic(NamedTuple):
    r"""A quadratic inner and outer loss under SGD, for which every meta-gradient is a formula.

    .. math:: L_{in} = \tfrac12 (\theta - c)^\top A (\theta - c), \qquad
        L_{out} = \tfrac12 (\theta - q)^\top D (\theta - q)

    Attributes:
        problem: the ``Problem``; meta is the start.
        meta: ``[dim]``.
        episode: ``Episode(c, q)``.
        inner_matrix: ``[dim, dim]``, symmetric positive definite ``A``.
        outer_matrix: ``[dim, dim]``, symmetric positive definite ``D``.
        rate: the learning rate of the inner SGD.
    """

    problem: Problem
    meta: Array
    episode: Episode
    inner_matrix: Array
    outer_matrix: Array
    rate: float

    def contraction(self, steps: int) -> Array:
        r""":math:`B_T = (I - \alpha A)^T`, ``[dim, dim]``."""
        eye = jnp.eye(self.meta.size, dtype=self.meta.dtype)
        return jnp.linalg.matrix_power(eye - self.rate * self.inner_matrix, steps)

    def adapted(self, steps: int) -> Array:
        r""":math:`\theta_T = c + B_T (\theta_0 - c)`, ``[dim]``."""
        target = self.episode.support
        return target + self.contraction(steps) @ (self.meta - target)

    def first_order(self, steps: int) -> Array:
        r""":math:`D (\theta_T - q)`, ``[dim]``."""
        return self.outer_matrix @ (self.adapted(steps) - self.episode.query)

    def exact(self, steps: int) -> Array:
        r""":math:`B_T D (\theta_T - q)`, ``[dim]``."""
        return self.contraction(steps) @ self.first_order(steps)

    def reptile(self, steps: int) -> Array:
        r""":math:`(I - B_T) (\theta_0 - c)`, ``[dim]``."""
        return self.meta - self.adapted(steps)


def quadratic(dim: int = 5, rate: float = 0.1, seed: int = 0) -> Quadratic:
    """A random quadratic problem with eigenvalues between 0.5 and 4.

    Args:
        dim: number of parameters.
        rate: the learning rate of the inner SGD.
        seed: of the matrices and vectors.

    Returns:
        A ``Quadratic`` in the default float dtype.

    Example:
        >>> from jmeta.core.estimators.unrolled import unrolled
        >>> q = quadratic()
        >>> mg = unrolled(q.problem, steps=3)
        >>> grads, _, _ = jax.jit(mg.estimate)(q.meta, (), q.episode, None)
        >>> bool(jnp.allclose(grads, q.exact(3), atol=1e-5))
        True
    """
    keys = jax.random.split(jax.random.key(seed), 7)

    def matrix(rotation: Array, scale: Array) -> Array:
        basis, _ = jnp.linalg.qr(jax.random.normal(rotation, (dim, dim)))
        spectrum = jax.random.uniform(scale, (dim,), minval=0.5, maxval=4.0)
        return (basis * spectrum[None, :]) @ basis.T

    inner_matrix, outer_matrix = matrix(keys[0], keys[1]), matrix(keys[2], keys[3])

    def loss(hessian: Array) -> Callable[[PyTree, PyTree, PyTree, Key], tuple[Array, PyTree]]:
        def value(fast: PyTree, meta: PyTree, batch: PyTree, key: Key) -> tuple[Array, PyTree]:
            gap = fast - batch
            return 0.5 * gap @ hessian @ gap, {"distance": jnp.linalg.norm(gap)}

        return value

    problem = Problem(loss(inner_matrix), loss(outer_matrix), lambda meta: optax.sgd(rate))
    meta, target, query = (jax.random.normal(k, (dim,)) for k in keys[4:7])
    return Quadratic(problem, meta, Episode(target, query), inner_matrix, outer_matrix, rate)


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a jaxpr and of the jaxprs inside it: calls, loops, branches.

    For tests of what a program does rather than of how long it takes. A loop's body counts once.

    Args:
        jaxpr: open or closed.

    Yields:
        Equations, outer ones first.

    Example:
        >>> f = lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=3)[0]
        >>> [eqn.primitive.name for eqn in equations(jax.make_jaxpr(f)(jnp.eye(2)))]
        ['scan', 'dot_general']
    """
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for value in eqn.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                if hasattr(getattr(item, "jaxpr", item), "eqns"):
                    yield from equations(item)


def central_differences(
    function: Callable[[PyTree], Array], at: PyTree, step: float = 1e-5
) -> PyTree:
    r"""The gradient of a scalar function by central differences; use it in float64.

    .. math:: \frac{f(x + h e_i) - f(x - h e_i)}{2h}

    Args:
        function: ``tree -> scalar``.
        at: where, a pytree of floats.
        step: :math:`h`.

    Returns:
        A pytree like ``at``.

    Example:
        >>> with jax.enable_x64(True):
        ...     slope = central_differences(lambda x: x["a"] ** 3, {"a": jnp.asarray(2.0)})
        >>> round(float(slope["a"]), 6)
        12.0
    """
    flat, unravel = jax.flatten_util.ravel_pytree(at)

    def slope(direction: Array) -> Array:
        plus, minus = unravel(flat + step * direction), unravel(flat - step * direction)
        return (function(plus) - function(minus)) / (2 * step)

    return unravel(jax.jit(lambda basis: jax.lax.map(slope, basis))(jnp.eye(flat.size)))


def relative_error(got: PyTree, expected: PyTree) -> float:
    """The largest difference of two trees over the largest entry of the second.

    Args:
        got: a pytree of arrays.
        expected: a pytree of the same structure.

    Returns:
        A float; 0 for equal trees, NaN where an entry is.

    Example:
        >>> relative_error({"a": jnp.asarray([1.0, 2.5])}, {"a": jnp.asarray([1.0, 2.0])})
        0.25
    """
    gaps = jax.tree.leaves(jax.tree.map(lambda g, e: jnp.max(jnp.abs(g - e)), got, expected))
    sizes = [jnp.max(jnp.abs(e)) for e in jax.tree.leaves(expected)]
    # numpy's maximum, since Python's passes over a NaN.
    return float(np.max(list(map(float, gaps)))) / max(max(map(float, sizes)), 1e-300)
