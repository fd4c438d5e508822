"""The outer loop as two pure functions: one meta-gradient and one optax update per step.

Everything a run needs to go on is one pytree, ``TrainState``; ``fit`` adds files and progress.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jmeta.core.tree import path_name
from jmeta.core.types import Array, Info, MetaGradient, PyTree
from jmeta.core.updates import updated

_ESTIMATOR_KEY = 2**32 - 1  # folded in for the estimator's init; no outer step reaches it


class TrainState(NamedTuple):
    """The whole state of a run, and all that a checkpoint holds beside the data's position.

    Attributes:
        step: int32 scalar, the number of outer steps done.
        meta: the meta-parameters.
        opt_state: the outer optimizer's state.
        estimator_state: the meta-gradient estimator's state, ``()`` for most.
        key: the run's PRNG key; it never changes, each step folds its own number into it.
    """

    step: Array
    meta: PyTree
    opt_state: PyTree
    estimator_state: PyTree
    key: Array


class Stages(NamedTuple):
    """Estimators by the outer step they start at; see ``stages``.

    Attributes:
        starts: the first outer step of each stage, ascending from 0.
        estimators: one meta-gradient estimator for each.
    """

    starts: tuple[int, ...]
    estimators: tuple[MetaGradient, ...]


class MetaTrainer(NamedTuple):
    """What ``meta_trainer`` returns.

    Attributes:
        init: ``(meta, key) -> TrainState``.
        step: ``(state, episodes) -> (state, Info)``.
    """

    init: Callable[[PyTree, Array], TrainState]
    step: Callable[[TrainState, PyTree], tuple[TrainState, Info]]


def stages(schedule: Sequence[tuple[int, MetaGradient]]) -> Stages:
    """Change the estimator at given outer steps, as in MAML++'s derivative-order annealing.

    The trainer switches between separately compiled steps. A ``lax.cond`` would instead pay for
    the dearest estimator at every step, because under ``vmap`` both branches run.

    Args:
        schedule: ``(first outer step, estimator)`` pairs, ascending, the first at step 0.

    Returns:
        A ``Stages`` that ``meta_trainer`` and ``fit`` take in place of an estimator.

    Raises:
        ValueError: the schedule is empty, does not start at 0 or is not ascending.

    Example:
        >>> from jmeta.core.types import MetaGradient
        >>> early, late = MetaGradient(init=None, estimate=None), MetaGradient(None, None)
        >>> stages([(0, early), (1000, late)]).starts
        (0, 1000)

    Source: Antoniou, Edwards & Storkey (2019), "How to train your MAML", section 4.
    """
    starts = tuple(start for start, _ in schedule)
    if not starts or starts[0] != 0:
        raise ValueError(f"stages must begin at outer step 0, but the starts are {list(starts)}")
    if any(late <= early for early, late in pairwise(starts)):
        raise ValueError(f"stages must be in ascending order, but the starts are {list(starts)}")
    return Stages(starts, tuple(estimator for _, estimator in schedule))


def stage_at(schedule: Stages, step: int) -> int:
    """The index of the stage that outer step ``step`` (counted from 0) belongs to."""
    return max(index for index, start in enumerate(schedule.starts) if start <= step)


def as_stages(mg: MetaGradient | Stages) -> Stages:
    """A single estimator as a schedule of one stage; a schedule as it is."""
    return mg if isinstance(mg, Stages) else Stages((0,), (mg,))


def meta_trainer(
    mg: MetaGradient | Stages, outer_optimizer: optax.GradientTransformation
) -> MetaTrainer:
    r"""Two pure functions that train meta-parameters.

    .. math::
        \phi_{s+1} = \phi_s + \mathrm{outer}(g_s), \qquad
        g_s = \mathrm{estimate}(\phi_s, \mathrm{episodes}_s, \mathrm{fold\_in}(key, s))

    The step's key depends on the run's key and the step's number alone, so a resumed run draws
    what an uninterrupted one would have. Gradients are cast to the dtype of their meta leaf before
    the update: float32 master weights stay float32 whatever the losses compute in. Optimizers that
    want the loss, such as ``optax.contrib.reduce_on_plateau``, get it as ``value``.

    Args:
        mg: an estimator, or ``stages([...])``. Wrap it in ``over_tasks`` if episodes are batched.
        outer_optimizer: any optax optimizer; clip and schedule here.

    Returns:
        ``(init, step)``. ``step`` is pure: ``jax.jit(step, donate_argnums=0)``. With stages it
        reads ``state.step`` on the host and compiles each stage itself: call it as it is.

    Raises:
        TypeError: from ``init``, if a leaf of meta is not floating point.
        ValueError: from ``init``, if stages have states of different shapes.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jmeta.core.types import Info, MetaGradient
        >>> def estimate(meta, state, target, key):
        ...     loss, grads = jax.value_and_grad(lambda m: 0.5 * (m - target) ** 2)(meta)
        ...     return grads, state, Info(loss, jnp.zeros(0), {}, jnp.abs(grads))
        >>> mg = MetaGradient(init=lambda meta, key: (), estimate=estimate)
        >>> init, step = meta_trainer(mg, optax.sgd(0.5))
        >>> state, info = jax.jit(step)(init(jnp.float32(4.0), jax.random.key(0)), jnp.float32(0.0))
        >>> float(state.meta), float(info.loss)
        (2.0, 8.0)
    """
    schedule = as_stages(mg)
    init = partial(init_state, schedule, outer_optimizer)

    if not isinstance(mg, Stages):

        def step(state: TrainState, episodes: PyTree) -> tuple[TrainState, Info]:
            state, info, _ = advance(mg, outer_optimizer, state, episodes)
            return state, info

        return MetaTrainer(init, step)

    compiled = [
        jax.jit(meta_trainer(estimator, outer_optimizer).step) for estimator in schedule.estimators
    ]

    def staged_step(state: TrainState, episodes: PyTree) -> tuple[TrainState, Info]:
        try:
            now = int(state.step)
        except jax.errors.ConcretizationTypeError as error:
            raise TypeError(
                "stages choose the estimator on the host from state.step, and each stage is "
                "compiled already: call step as it is, not inside jax.jit, vmap or scan"
            ) from error
        return compiled[stage_at(schedule, now)](state, episodes)

    return MetaTrainer(init, staged_step)


def init_state(
    schedule: Stages, outer_optimizer: optax.GradientTransformation, meta: PyTree, key: Array
) -> TrainState:
    """``meta_trainer``'s ``init``; every leaf is a copy of its own, so a step may donate them."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(meta):
        dtype = jnp.asarray(leaf).dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"the meta-parameter '{path_name(path)}' is {dtype}{list(jnp.shape(leaf))}, but "
                "only floating-point leaves have a meta-gradient. Take it out of meta: close over "
                "it in the losses, or pass it in the episode; if it should be learned, cast it "
                "with .astype(jnp.float32)"
            )
    meta = _strong(meta)
    estimator_key = jax.random.fold_in(key, _ESTIMATOR_KEY)
    for start, estimator in zip(schedule.starts[1:], schedule.estimators[1:], strict=True):
        kinds = [
            [(path_name(path), describe(leaf)) for path, leaf in _leaves(each.init, meta, key)]
            for each in (schedule.estimators[0], estimator)
        ]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"the stage that starts at step {start} keeps the state {kinds[1]}, but the one at "
                f"step 0 keeps {kinds[0]}: stages hand their state on, so give them estimators "
                "with the same one (all persistent over the same tasks, or none)"
            )
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        meta=meta,
        opt_state=_strong(outer_optimizer.init(meta)),
        estimator_state=_strong(schedule.estimators[0].init(meta, estimator_key)),
        key=key,
    )
    return jax.tree.map(jnp.copy, state)  # optimizers may hold meta itself: no buffer twice


def advance(
    mg: MetaGradient,
    outer_optimizer: optax.GradientTransformation,
    state: TrainState,
    episodes: PyTree,
) -> tuple[TrainState, Info, PyTree]:
    """One outer step; as ``meta_trainer``'s ``step``, and the meta-gradient beside it.

    Args:
        mg: the estimator.
        outer_optimizer: the outer optimizer.
        state: the state before the step.
        episodes: what ``mg.estimate`` takes.

    Returns:
        The state after the step, the estimate's ``Info``, and the gradients in meta's dtypes.
    """
    key = jax.random.fold_in(state.key, state.step)
    grads, estimator_state, info = mg.estimate(state.meta, state.estimator_state, episodes, key)
    grads = jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), grads, state.meta)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes, even in adam
        updates, opt_state = updated(outer_optimizer, grads, state.opt_state, state.meta, info.loss)
        meta = optax.apply_updates(state.meta, updates)
    after = TrainState(
        state.step + 1, meta, _strong(opt_state), _strong(estimator_state), state.key
    )
    return after, info, grads


def dotted(name: str) -> str:
    """A leaf's name in a file as ``path_name`` gives it: earlier files join paths by slashes."""
    return "." if name == "(the whole tree)" else name.replace("/", ".")


def describe(leaf: Any) -> str:
    """A leaf's dtype and shape: ``float32[3, 4]``."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else type(leaf).__name__
    return f"{dtype}{list(jnp.shape(leaf))}"


def _leaves(init: Callable[..., PyTree], meta: PyTree, key: Array) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(jax.eval_shape(init, meta, key))


def _strong(tree: PyTree) -> PyTree:
    """The tree without weak types, which would make a step compile twice; keys stay as they are."""

    def strong(leaf: Any) -> Array:
        leaf = jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return leaf
        return jnp.asarray(leaf, dtype=leaf.dtype)

    return jax.tree.map(strong, tree)
