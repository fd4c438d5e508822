"""Turns a Flax Linen, Flax NNX or Equinox module into plain parameters and an ``apply`` function.

What comes back works in every estimator: state other than parameters is never shared between
traces, and dropout is driven by the key alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax

from jmeta.core.types import Array, Key, PyTree

Apply: TypeAlias = Callable[..., Any]  # (params, x, key=None) -> output


def from_linen(
    module: Any, variables: PyTree, *, switch: str | None = "deterministic"
) -> tuple[PyTree, Apply]:
    """Adapts a ``flax.linen`` module.

    Collections other than ``params`` (running averages, say) are frozen at their values here.

    Args:
        module: a ``flax.linen.Module`` called as ``module(x)``, or as
            ``module(x, deterministic=bool)`` where it has dropout.
        variables: what ``module.init`` returned.
        switch: the name of the module's boolean argument that turns dropout off. It is passed only
            if ``__call__`` has an argument of that name.

    Returns:
        ``(params, apply)``: a nested dict of arrays, and ``apply(params, x, key=None)``, which
        runs dropout where a key is given and is deterministic where it is None.

    Example:
        >>> from flax import linen
        >>> module = linen.Dense(3)
        >>> x = jax.numpy.ones((2, 4))
        >>> params, apply = from_linen(module, module.init(jax.random.key(0), x))
        >>> apply(params, x).shape
        (2, 3)
    """
    import inspect

    rest = {name: value for name, value in variables.items() if name != "params"}
    flag = (
        switch
        if switch is not None and switch in inspect.signature(module.__call__).parameters
        else None
    )

    def apply(params: PyTree, x: Any, key: Key = None) -> Any:
        flags = {} if flag is None else {flag: key is None}
        rngs = None if key is None else {"dropout": key}
        return module.apply({"params": params, **rest}, x, rngs=rngs, **flags)

    return variables["params"], apply


def from_nnx(model: Any) -> tuple[PyTree, Apply]:
    """Adapts a ``flax.nnx`` module, called as ``model(x)``.

    Its other state (running averages, random counters) is copied at every call and updates to it
    are dropped; random streams are reseeded from the key. Each ``apply`` is a pure function.

    Args:
        model: a ``flax.nnx.Module``; it is left as it is.

    Returns:
        ``(params, apply)``: a nested dict of arrays, and ``apply(params, x, key=None)``, which
        runs in training mode where a key is given and in evaluation mode where it is None.

    Example:
        >>> from flax import nnx
        >>> params, apply = from_nnx(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
        >>> apply(params, jax.numpy.ones((2, 4))).shape
        (2, 3)
    """
    from flax import nnx

    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def apply(params: PyTree, x: Any, key: Key = None) -> Any:
        # copy: a module closed over or nested would mutate its counters across traces.
        clone = nnx.merge(graph, nnx.State(params), rest, copy=True)
        if key is None:
            clone.eval()
        else:
            clone.train()
            nnx.reseed(clone, default=key, dropout=key)
        return clone(x)

    return nnx.to_pure_dict(params), apply


def from_equinox(module: Any) -> tuple[PyTree, Apply]:
    """Adapts an ``equinox`` module called on one example as ``module(x, key=...)``.

    Parameters are its inexact arrays; everything else is held constant.

    Args:
        module: an ``equinox.Module`` whose ``__call__`` accepts ``key`` (as all of Equinox's own
            layers do) and one unbatched example.

    Returns:
        ``(params, apply)``: the module with None in place of what is no parameter (a pytree of
        arrays), and ``apply(params, x, key=None)`` with ``x`` ``[batch, ...]``: one key per
        example where a key is given, inference mode where it is None.

    Example:
        >>> import equinox
        >>> params, apply = from_equinox(equinox.nn.Linear(4, 3, key=jax.random.key(0)))
        >>> apply(params, jax.numpy.ones((2, 4))).shape
        (2, 3)
    """
    import equinox

    params, static = equinox.partition(module, equinox.is_inexact_array)

    def apply(params: PyTree, x: Array, key: Key = None) -> Array:
        merged = equinox.nn.inference_mode(equinox.combine(params, static), key is None)
        if key is None:
            return jax.vmap(merged)(x)
        keys = jax.random.split(key, jax.tree.leaves(x)[0].shape[0])
        return jax.vmap(lambda one, k: merged(one, key=k))(x, keys)

    return params, apply
