"""A probe that names the leaves whose meta-gradient an inner optimizer would turn into NaN.

It differentiates the optimizer itself through a few steps whose inner gradients are exactly zero.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jmeta.core.tree import path_name
from jmeta.core.updates import updated

CASES = {
    "entries": "its first entries have zero gradient (a dead unit, an unseen embedding row)",
    "whole leaf": "its gradient is zero throughout (a dead layer, a weight the loss never reads)",
}


class LeafProbe(NamedTuple):
    """What the probe saw at one leaf in one case.

    Attributes:
        path: dotted name, such as ``dense.kernel``.
        case: "entries" or "whole leaf".
        size: largest absolute value of d(sum of the adapted leaf)/d(inner gradient, parameter);
            NaN or inf if any of them is.
        bad: not finite, or above the bound.
    """

    path: str
    case: str
    size: float
    bad: bool


class ProbeReport(NamedTuple):
    """What the probe saw; printing it says what to do.

    Attributes:
        leaves: every leaf in every case.
        bound: the largest size that passes.
        advice: what to use instead; empty when nothing is bad.
    """

    leaves: tuple[LeafProbe, ...]
    bound: float
    advice: str

    @property
    def bad(self) -> tuple[LeafProbe, ...]:
        """The leaves and cases that fail."""
        return tuple(leaf for leaf in self.leaves if leaf.bad)

    @property
    def ok(self) -> bool:
        """Whether every leaf passes."""
        return not self.bad

    def __str__(self) -> str:
        """The failing leaves, one line each, then the advice."""
        if self.ok:
            largest = max((leaf.size for leaf in self.leaves), default=0.0)
            return f"the meta-gradient stays finite; largest sensitivity {largest:.2g}"
        lines = [f"{leaf.path}: {leaf.size:.2g} when {CASES[leaf.case]}" for leaf in self.bad]
        return "\n".join([*lines, self.advice])


def probe(
    optimizer: optax.GradientTransformation, params: Any, *, steps: int = 2, bound: float = 1e12
) -> ProbeReport:
    r"""Differentiates through ``optimizer`` where inner gradients are exactly zero.

    With inner gradients :math:`g_0 \ldots g_{T-1}` given, it computes the derivative of the sum of
    the adapted weights with respect to every :math:`g_t` and to the initial weights, once with the
    first entries (the leading index 0) of every leaf zero at all steps and the others random, and
    once with all of them zero. A meta-gradient multiplies this by Hessians: NaN here is NaN there,
    unless the network happens to drop it.

    Args:
        optimizer: any optax transformation; one that asks for the loss is told 1.
        params: the fast weights; values matter to optimizers that use norms of them.
        steps: number of updates T; a second one sees moments of zero too.
        bound: largest size that passes. ``adam`` of this package has about 5e7 times its learning
            rate; a value near the inverse of ``eps`` amplifies the rounding of every Hessian.

    Returns:
        the report; ``report.ok``, ``report.bad`` and ``str(report)``.

    Raises:
        ValueError: if ``params`` has no floating-point leaf, or ``steps < 1``.
        TypeError: the optimizer is a line search, which evaluates the loss elsewhere.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> params = {"embed": jnp.ones((3, 2)), "dense": {"bias": jnp.ones(2)}}
        >>> report = probe(optax.adam(1e-3), params)
        >>> sorted({leaf.path for leaf in report.bad})
        ['dense.bias', 'embed']
        >>> print(probe(optax.sgd(0.5), params))
        the meta-gradient stays finite; largest sensitivity 1
    """
    if steps < 1:
        raise ValueError(f"probe: steps must be at least 1, not {steps}")
    paths = [
        (path_name(path), jnp.result_type(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    whole = [f"{name} ({dtype})" for name, dtype in paths if not jnp.issubdtype(dtype, jnp.inexact)]
    if whole or not paths:
        raise ValueError(f"probe: every leaf must be floating point; these are not: {whole}")
    params = jax.tree.map(jnp.asarray, params)

    def adapted(start: Any, gradients: list[Any]) -> jax.Array:
        fast, state = start, optimizer.init(start)
        for gradient in gradients:
            update, state = updated(optimizer, gradient, state, fast, jnp.ones(()))
            fast = optax.apply_updates(fast, update)
        sums = [jnp.sum(x).astype(jnp.float32) for x in jax.tree.leaves(fast)]
        return jnp.sum(jnp.stack(sums))

    # optax itself needs standard promotion: see optax_promotion.
    @jax.numpy_dtype_promotion("standard")
    @jax.jit
    def sizes(start: Any, gradients: list[Any]) -> Any:
        by_start, by_gradient = jax.grad(adapted, argnums=(0, 1))(start, gradients)
        return jax.tree.map(
            lambda *xs: jnp.stack([jnp.max(jnp.abs(x)) for x in xs]), by_start, *by_gradient
        )

    leaves = []
    for case in CASES:
        gradients = [_gradients(params, case, step) for step in range(steps)]
        for (name, _), size in zip(paths, jax.tree.leaves(sizes(params, gradients)), strict=True):
            largest = float(jnp.max(size))  # jnp.max keeps a NaN
            leaves.append(LeafProbe(name, case, largest, not largest <= bound))
    bad = [leaf for leaf in leaves if leaf.bad]
    advice = _advice(jax.eval_shape(optimizer.init, params), bad) if bad else ""
    return ProbeReport(tuple(leaves), bound, advice)


def check(
    optimizer: optax.GradientTransformation, params: Any, *, steps: int = 2, bound: float = 1e12
) -> None:
    """Raises where :func:`probe` finds a leaf that would break the meta-gradient.

    Args:
        optimizer: see :func:`probe`.
        params: see :func:`probe`.
        steps: see :func:`probe`.
        bound: see :func:`probe`.

    Raises:
        ValueError: naming the leaves and the replacement.
    """
    report = probe(optimizer, params, steps=steps, bound=bound)
    if not report.ok:
        raise ValueError(f"this inner optimizer breaks the meta-gradient:\n{report}")


def _gradients(params: Any, case: str, step: int) -> Any:
    """Inner gradients of one step: all zero, or random with zero first entries."""
    if case == "whole leaf":
        return jax.tree.map(jnp.zeros_like, params)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(step), len(leaves))
    drawn = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    # A scalar, or a single row, is a whole leaf: zeroing it belongs to the other case.
    drawn = [g.at[0].set(0) if g.ndim and g.shape[0] > 1 else g for g in drawn]
    return jax.tree.unflatten(treedef, drawn)


_REPLACEMENTS = {
    "ScaleByAmsgradState": "amsgrad: use amsgrad of jmeta.core.optim",
    "FactoredState": "adafactor: use adafactor of jmeta.core.optim (eps=1e-16)",
    "MuonState": "muon: use muon of jmeta.core.optim",
    "MuonMomentum": "muon: give it a positive adam_eps_root",
    "ScaleByAdamState": "adam, adamw, nadam, nadamw, radam or lamb: use the function of the same "
    "name in jmeta.core.optim (eps_root=1e-16), or adam_stopped",
    "ScaleByNovogradState": "novograd has no safe form: use lamb or lars of jmeta.core.optim",
    "ScaleByRmsState": "rmsprop: leave eps_in_sqrt=True and eps at 1e-8",
    "ScaleByRStdDevState": "centered rmsprop: leave eps_in_sqrt=True and eps at 1e-8",
}


def _advice(state: Any, bad: list[LeafProbe]) -> str:
    """The safe replacement, told from the names of the states in the chain."""
    names: set[str] = set()

    def visit(node: Any) -> bool:
        names.add(type(node).__name__)
        return False

    jax.tree.leaves(state, is_leaf=visit)
    found = [text for name, text in _REPLACEMENTS.items() if name in names]
    if all(leaf.case == "whole leaf" for leaf in bad) and "ScaleByAdamState" not in names:
        found.append(
            "a norm is taken at zero: use lars, clip_by_global_norm or clip_by_block_rms of "
            "jmeta.core.optim in place of optax's"
        )
    if any(not math.isnan(leaf.size) for leaf in bad):
        found.append("the derivative is finite but large: raise eps or eps_root, or adam_stopped")
    return "; ".join(found) or (
        "pass eps_root=1e-16 where the optimizer has the argument, replace adaptive_grad_clip by "
        "clip_by_global_norm of jmeta.core.optim, or use optax.sgd or adam of jmeta.core.optim"
    )
