"""``jmeta.auto``: the fastest exact meta-gradient that fits a memory, found by measuring.

Candidates are compiled, those over the memory are dropped, the others are timed in turns.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jmeta.core.estimators import mixed_mode, unrolled
from jmeta.core.inner import Objective, final, online
from jmeta.core.types import Episode, Key, MetaGradient, Problem, PyTree
from jmeta.cost import topology as machines
from jmeta.cost.choice import Choice, digest, in_words, keep, recall, setting_of, trace
from jmeta.cost.measured import gradient_error, median
from jmeta.cost.race import fastest_of, race
from jmeta.cost.variants import (
    REVERSE,
    Trial,
    Variant,
    build,
    compiled,
    describe,
    microbatches,
    variants,
)
from jmeta.files import cache_dir


class DoesNotFitError(ValueError):
    """No exact variant fits the memory that was asked for."""


def auto(
    problem: Problem,
    steps: int,
    *,
    memory: str | float | None = None,
    tasks: int | None = None,
    objective: Objective = final,
    persistent: bool = False,
    repeats: int = 5,
    folder: Path | str | None = None,
    report: Callable[[Choice], object] = lambda choice: None,
) -> MetaGradient:
    """The exact meta-gradient, by whatever way of computing it is fastest here and fits.

    The choice is made when ``estimate`` first sees a shape of meta and episode: by ``fastest``,
    once, before the estimate itself is traced. So it may be made inside ``jax.jit``, where only
    shapes are known, and it takes as long as compiling and running a few programs. Kept on disk,
    it is there at once the next time. Ask ``fastest`` for it beforehand to see what was tried.

    Args:
        problem: what to differentiate.
        steps: number of inner steps.
        memory: what one estimate may use on the device, such as ``"12GiB"``: arguments,
            temporaries and outputs together; None: all that the device has.
        tasks: number of episodes in one estimate, as ``over_tasks`` takes them: the microbatch is
            part of the choice. None: one episode. (Within ``over_tasks`` or ``jax.vmap`` the
            choice is made for one episode and knows nothing of the others.)
        objective: where the outer loss is read.
        persistent: keep the inner loop's state from one estimate to the next.
        repeats: timed runs of the variants that stay in the race.
        folder: where choices are kept; None: ``auto`` in jmeta's folder of caches.
        report: called with each ``Choice``: ``lambda choice: print(jmeta.cost.explain(choice))``.

    Returns:
        A ``MetaGradient``, equal to ``unrolled`` (over tasks) up to rounding.

    Raises:
        DoesNotFitError: when a choice is made: nothing exact fits.
        ValueError: a memory that is none; when a choice is made: on several devices, see
            ``fastest``.

    Example:
        >>> import tempfile
        >>> from jmeta.testing import quadratic
        >>> q = quadratic()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     mg = auto(q.problem, steps=3, memory="1MiB", folder=folder)
        ...     grads, _, _ = mg.estimate(q.meta, mg.init(q.meta, None), q.episode, None)
        >>> bool(jnp.allclose(grads, q.exact(3), atol=1e-5))
        True
    """
    usable = None if memory is None else machines.memory_bytes(memory)
    _require_counts(steps, tasks, repeats)
    plain = Variant("mixed_mode", "none", tasks)
    how: Any = {"tasks": tasks, "objective": objective, "persistent": persistent}
    init = build(problem, steps, plain, **how).init
    made: dict[Any, MetaGradient] = {}

    def estimate(meta: PyTree, state: PyTree, episode: Episode, key: Key):
        shapes = shapes_of((meta, episode, key))
        leaves, structure = jax.tree.flatten(shapes)
        name = (structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        if name not in made:
            choice = fastest(
                problem, steps, *shapes, memory=usable, repeats=repeats, folder=folder, **how
            )
            report(choice)
            made[name] = choice.mg
        return made[name].estimate(meta, state, episode, key)

    return MetaGradient(init, estimate)


def fastest(
    problem: Problem,
    steps: int,
    meta: PyTree,
    episode: Episode,
    key: Key = None,
    *,
    memory: str | float | None = None,
    tasks: int | None = None,
    objective: Objective = final,
    persistent: bool = False,
    repeats: int = 5,
    folder: Path | str | None = None,
) -> Choice:
    """Find the fastest exact variant that fits, and say what was tried.

    All tasks together come first, then microbatches, as long as something does not fit yet or
    gets faster. ``remat="nested"`` is tried where ``"step"`` does not fit: it computes more. Where
    reverse over reverse was run too, mixed mode's gradient is compared with it: a loss whose
    custom derivative is none has no symmetric Hessian, and is left to reverse mode.

    Args:
        problem: what to differentiate.
        steps: number of inner steps.
        meta: the meta-parameters: arrays, or ``jax.ShapeDtypeStruct``.
        episode: one episode, or ``tasks`` of them with a leading task axis; likewise.
        key: a random key, its shape, or None.
        memory: what one estimate may use, see ``auto``.
        tasks: number of episodes, or None.
        objective: where the outer loss is read.
        persistent: keep the inner loop's state from one estimate to the next.
        repeats: timed runs of the variants that stay in the race.
        folder: where choices are kept.

    Returns:
        A ``Choice``: ``choice.mg`` is the estimator, ``explain(choice)`` the table.

    Raises:
        DoesNotFitError: nothing exact fits; it names the leanest variant and what to do.
        ValueError: under a mesh of several devices or in one of several processes, which would
            have to agree; choose on one device and build that variant (``choice.variant``) there.

    Example:
        >>> import tempfile
        >>> from jmeta.testing import quadratic
        >>> q = quadratic()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     choice = fastest(q.problem, 3, q.meta, q.episode, folder=folder)
        >>> choice.remembered, choice.file.suffix
        (False, '.json')
    """
    _require_one_device()
    _require_counts(steps, tasks, repeats)
    usable = (
        machines.usable_bytes(jax.devices()[0]) if memory is None else machines.memory_bytes(memory)
    )
    with jax.ensure_compile_time_eval():  # inside a trace too, what follows is run
        asked = _Asked(problem, steps, tasks, objective, persistent)
        shapes = shapes_of((meta, episode, key))
        one = Episode(*shapes[1])
        if tasks is not None:
            one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), one)
        text = trace(problem, steps, objective, shapes[0], one, shapes[2])
        setting = setting_of(
            text,
            steps=steps,
            tasks=tasks,
            usable=usable,
            objective=objective.name,
            persistent=persistent,
        )
        place = cache_dir() / "auto" if folder is None else Path(folder)
        file = place / f"{digest(setting)}.json"
        known = recall(file, setting)
        if known is None:
            values = jax.tree.map(stand_in, (meta, episode, key))
            variant, trials = _search(asked, values, usable, repeats, text)
            keep(file, setting, variant, trials)
        else:
            variant, trials = known
    mg = asked.build(variant)
    return Choice(variant, mg, tuple(trials), usable, setting, file, known is not None)


class _Asked(NamedTuple):
    """What is to be computed, however it is."""

    problem: Problem
    steps: int
    tasks: int | None
    objective: Objective
    persistent: bool

    def build(self, variant: Variant) -> MetaGradient:
        """A variant of it."""
        return build(
            self.problem,
            self.steps,
            variant,
            tasks=self.tasks,
            objective=self.objective,
            persistent=self.persistent,
        )


def _search(
    asked: _Asked, values: tuple[PyTree, Episode, Key], usable: int, repeats: int, text: str
) -> tuple[Variant, list[Trial]]:
    """Compile, drop, race; from all tasks together to one at a time."""
    meta, episode, key = values
    first = asked.build(Variant("mixed_mode", "none", asked.tasks))
    state = jax.jit(first.init)(meta, key)
    arguments = (meta, state, episode, key)
    shapes = shapes_of(arguments)
    trials: dict[Variant, Trial] = {}
    programs: dict[Variant, Callable[[], Any]] = {}
    gradients: dict[str, PyTree] = {}

    def ready(variant: Variant) -> bool:
        """Compile a variant that was not, and say whether it fits."""
        if variant not in trials:
            trials[variant], program = compiled(asked.build(variant), variant, shapes, usable)
            if program is not None:
                programs[variant] = lambda: program(*arguments)
        return variant in programs

    def seen(variant: Variant, answer: Any) -> None:
        kind = "reverse" if variant.estimator in REVERSE else "mixed"
        if kind not in gradients:
            gradients[kind] = jax.device_get(answer[0])

    best: Variant | None = None
    for microbatch in microbatches(asked.tasks):
        level = variants(asked.steps, microbatch)
        if best is not None:  # what fitted before, and was slow, will not win with fewer tasks
            level = [v for v in level if _worth_it(v, best, trials)]
        # The others keep as much and more: where it needs twice what there is, only nesting helps.
        usual = Variant("mixed_mode", "step", microbatch)
        if usual in level and not ready(usual) and trials[usual].bytes > 2 * usable:
            level = [usual, *(v for v in level if v.remat == "nested")]
        entrants = []
        for variant in level:
            leaner = variant.remat == "nested" and variant._replace(remat="step") in programs
            if not leaner and ready(variant):
                entrants.append(variant)
        before = best
        if entrants:
            together = entrants if best is None else [*entrants, best]
            found = race({v: programs[v] for v in together}, repeats, seen)
            for variant, seconds in found.items():
                trials[variant] = trials[variant]._replace(seconds=tuple(seconds))
            best = fastest_of(found, {v: trials[v].bytes for v in found})
        missing = any(trial.note and trial.variant.microbatch == microbatch
                      for trial in trials.values())  # fmt: skip
        if not missing and before is not None and best == before:
            break
    tried = list(trials.values())
    if best is None:
        raise DoesNotFitError(_nothing_fits(tried, usable))
    if _same(gradients, asked, values, text):
        return best, tried
    tried = [
        trial._replace(note="inexact here: a custom derivative is not symmetric")
        if trial.variant.estimator not in REVERSE
        else trial
        for trial in tried
    ]
    left = {t.variant: list(t.seconds) for t in tried if t.seconds and not t.note}
    if not left:
        reverse = [t for t in tried if t.variant.estimator in REVERSE]
        raise DoesNotFitError(_nothing_fits(reverse, usable))
    return fastest_of(left, {v: trials[v].bytes for v in left}), tried


def _worth_it(variant: Variant, best: Variant, trials: dict[Variant, Trial]) -> bool:
    """Whether a smaller microbatch of a variant may win: it did not fit, or was nearly the best."""
    before = [
        trial for trial in trials.values() if trial.variant._replace(microbatch=None)
        == variant._replace(microbatch=None)
    ]  # fmt: skip
    timed = [median(trial.seconds) for trial in before if trial.seconds]
    return not timed or min(timed) <= 1.5 * median(trials[best].seconds)


def _same(gradients: dict[str, PyTree], asked: _Asked, values: Any, text: str) -> bool:
    """Whether mixed mode and reverse mode differentiate this problem alike."""
    meta, episode, key = values
    if "mixed" not in gradients:
        return True
    tolerance = _tolerance(meta, text)
    if "reverse" in gradients:
        gap = gradient_error(gradients["mixed"], gradients["reverse"])
        if gap <= tolerance:
            return True
    elif "custom_vjp_call" not in text:
        return True
    # Over many steps rounding may grow; one step tells whether its Hessian is symmetric.
    if asked.tasks is not None:
        episode = jax.tree.map(lambda x: x[0], episode)
    objective = online if episode.query is None else final
    steps = min(asked.steps, 1)

    def once(make: Callable[..., MetaGradient]) -> PyTree:
        mg = make(asked.problem, steps, objective=objective)
        run = jax.jit(lambda m, e, k: mg.estimate(m, mg.init(m, k), e, k)[0])
        return run(meta, episode, key)

    gap = gradient_error(once(mixed_mode), once(unrolled))
    return not gap > tolerance  # what is not finite cannot be compared


def _tolerance(meta: PyTree, text: str) -> float:
    """The square root of the rounding of the narrowest floating-point type."""
    kinds = [jnp.result_type(leaf) for leaf in jax.tree.leaves(meta)]
    kinds += [jnp.dtype(kind) for short, kind in (("bf16[", "bfloat16"), (":f16[", "float16"))
              if short in text]  # fmt: skip
    return max(float(jnp.finfo(kind).eps) for kind in kinds) ** 0.5


def _nothing_fits(tried: list[Trial], usable: int) -> str:
    """The error's words: the leanest variant, its size, and what to do."""
    sized = [trial for trial in tried if trial.bytes]
    if not sized:
        return f"no exact variant can be built: {tried[0].note}"
    leanest = min(sized, key=lambda trial: trial.bytes)
    return (
        f"no exact meta-gradient fits {in_words(usable)}: the leanest of {len(sized)} is "
        f"{describe(leanest.variant)} with {in_words(leanest.bytes)} "
        f"({in_words(leanest.temp_bytes)} of them temporaries). Allow more (memory=), adapt "
        "fewer weights (jmeta.partition, a LoRA inner loop), rematerialise the network's blocks, "
        "take smaller batches, keep the weights of long loops on the host of an accelerator "
        "(remat='offload'); or give up exactness knowingly: jmeta.truncated, jmeta.first_order"
    )


def shapes_of(tree: PyTree) -> Any:
    """The shapes and dtypes of a pytree of arrays, traced or not.

    Example:
        >>> shapes_of({"w": jnp.ones((2, 3))})
        {'w': ShapeDtypeStruct(shape=(2, 3), dtype=float32)}
    """
    found = jax.eval_shape(lambda t: t, tree)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), found)


def stand_in(leaf: Any) -> Any:
    """An array to time with: small random numbers for a shape; an array stays as it is.

    Integers become zero, which is a token of every vocabulary and a class of every task.

    Example:
        >>> stand_in(jax.ShapeDtypeStruct((2,), "int32")).tolist()
        [0, 0]
    """
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return (0.05 * jax.random.normal(jax.random.key(0), leaf.shape)).astype(leaf.dtype)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.empty(leaf.shape, leaf.dtype)
    return jnp.zeros(leaf.shape, leaf.dtype)


def _require_counts(steps: int, tasks: int | None, repeats: int) -> None:
    for name, value, least in (("steps", steps, 0), ("tasks", tasks, 1), ("repeats", repeats, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")


def _require_one_device() -> None:
    """Devices that have to agree cannot each choose by their own clock."""
    devices, processes = jax.sharding.get_abstract_mesh().size, jax.process_count()
    if devices > 1 or processes > 1:
        where = f"a mesh of {devices} devices" if devices > 1 else f"{processes} processes"
        raise ValueError(
            f"an estimator is chosen by measuring on one device, and this is {where}: call "
            "jmeta.cost.fastest with one device's share of the tasks beforehand, and use "
            "jmeta.cost.build(problem, steps, choice.variant) there; or plan with jmeta.cost.plan"
        )
