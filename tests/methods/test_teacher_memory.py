"""What a soft teacher's step holds: nothing of [tokens, vocabulary] where it is asked not to."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jmeta import Episode, methods, optim
from jmeta.models import masked_lm, teacher_lm


def step_and_shapes(shape, texts, chunk):
    """A mixed-mode soft step whose distributions are never multiplied out, and its arguments."""
    student = methods.Student(
        functools.partial(masked_lm.loss, shape, chunk=chunk),
        functools.partial(masked_lm.init, shape),
        optim.adamw(1e-3),
    )
    rewriting = methods.inputs_and_labels(functools.partial(teacher_lm.write_factors, shape))
    mg = methods.soft_teacher(student, rewriting, relax=methods.unevaluated)
    key = jax.random.key(0)
    meta = jax.eval_shape(functools.partial(teacher_lm.init_teacher, shape), key)
    state = jax.eval_shape(mg.init, meta, key)

    def batch(*names, lead=(1,)):
        size = (*lead, texts, shape.max_len)
        kinds = {"tokens": jnp.int32, "labels": jnp.int32}
        return {n: jax.ShapeDtypeStruct(size, kinds.get(n, jnp.float32)) for n in names}

    task = batch("tokens", "mask", "labels", "weights", lead=(1, 1))
    data = Episode(batch("tokens", "mask"), Episode(task, task))
    return (lambda m, s, e: mg.estimate(m, s, e, None)), (meta, state, data)


def every_array(jaxpr):
    """Shapes of all intermediate arrays, those of loops and calls too."""
    for eqn in jaxpr.eqns:
        yield from (out.aval.shape for out in eqn.outvars)
        for value in eqn.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                body = getattr(item, "jaxpr", item)
                if hasattr(body, "eqns"):
                    yield from every_array(body)


@pytest.mark.parametrize(("chunk", "held"), [(20, False), (None, True)])
def test_no_pass_holds_the_scores_of_all_tokens(chunk, held):
    shape = masked_lm.config(101, 8, 1, 2, max_len=6, loop="scan", remat="full")
    step, arguments = step_and_shapes(shape, texts=2, chunk=chunk)
    found = set(every_array(jax.make_jaxpr(step)(*arguments).jaxpr))
    whole = {s for s in found if 101 in s and 8 not in s and jnp.prod(jnp.asarray(s)) >= 12 * 101}
    assert bool(whole) == held, whole


@pytest.mark.slow
def test_memory_at_the_published_size():
    """6 layers, width 256, vocabulary 30,000, 4 texts of 128: at most 0.4 of 1.17 GB."""
    shape = masked_lm.config(30_000, 256, 6, 4, max_len=128, loop="scan", remat="full")
    step, arguments = step_and_shapes(shape, texts=4, chunk=1000)
    planned = jax.jit(step).lower(*arguments).compile().memory_analysis()
    assert planned is not None
    assert planned.temp_size_in_bytes <= 0.4 * 1.17e9
