"""What a soft teacher's step holds, nothing of [tokens, vocabulary] where it is asked not to, and
that what saves memory leaves the gradient as it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jmeta import Episode, methods, mixed_mode_grad, optim, reverse_grad
from jmeta.models import masked_lm, teacher_lm
from jmeta.testing import relative_error


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
    whole = {s for s in found if 101 in s and 8 not in s and np.prod(s) >= 12 * 101}
    assert bool(whole) == held, whole


def random_texts(*lead, seed, vocab, labelled=True):
    """Texts with padding on the right, and labels of which some count more than others."""
    rng = np.random.default_rng(seed)
    tokens, labels = rng.integers(1, vocab, (2, *lead, 4))
    tokens[..., 0, 3:] = 0
    batch = {"tokens": jnp.asarray(tokens), "mask": jnp.asarray((tokens != 0) * 1.0)}
    if labelled:
        batch |= {"labels": jnp.asarray(labels), "weights": batch["mask"] * rng.random((*lead, 4))}
    return batch


@pytest.mark.slow
def test_what_saves_memory_leaves_the_gradient_as_it_is(x64):
    """Distributions in chunks, blocks scanned and recomputed, mixed mode: a dense reverse pass."""
    plain = masked_lm.config(7, 4, 2, 2, max_len=4, ff=6, loop="unroll", remat="none")
    saving = plain._replace(loop="scan", remat="full")
    rng = np.random.default_rng(0)

    def drawn(init):
        """Well away from the initial values, where gradients are small."""
        shapes = jax.eval_shape(lambda key: init(plain, key), jax.random.key(0))
        return jax.tree.map(lambda x: jnp.asarray(0.4 * rng.standard_normal(x.shape)), shapes)

    begun, meta = drawn(masked_lm.init), drawn(teacher_lm.init_teacher)
    tasks = (random_texts(1, 1, 2, seed=s, vocab=7) for s in (1, 2))
    data = Episode(random_texts(1, 2, seed=3, vocab=7, labelled=False), Episode(*tasks))

    def estimated(shape, network, relax, grad, chunk):
        loss = functools.partial(masked_lm.loss, shape, chunk=chunk)
        optimizer = optim.adamw(0.05, 0.9, 0.98, 1e-6)
        student = methods.Student(loss, lambda key: begun, optimizer, optax.sgd(0.2))
        mg = methods.soft_teacher(
            student, methods.inputs_and_labels(network), relax=relax, grad=grad
        )
        grads, state, info = jax.jit(mg.estimate)(meta, mg.init(meta, None), data, None)
        return {**grads, "student": state.student.fast, "loss": info.loss}

    dense = methods.without(functools.partial(teacher_lm.write, plain), [0])
    factors = functools.partial(teacher_lm.write_factors, saving)
    expected = estimated(plain, dense, methods.expected, reverse_grad, None)
    found = estimated(saving, factors, methods.unevaluated, mixed_mode_grad, 3)
    for name, exact in expected.items():  # each on its own scale: body, heads, student, loss
        assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(exact)) > 1e-6
        assert relative_error(found[name], exact) < 1e-10, name


@pytest.mark.slow
def test_memory_at_the_published_size():
    """6 layers, width 256, vocabulary 30,000, 4 texts of 128: at most 0.4 of 1.17 GB."""
    shape = masked_lm.config(30_000, 256, 6, 4, max_len=128, loop="scan", remat="full")
    step, arguments = step_and_shapes(shape, texts=4, chunk=1000)
    planned = jax.jit(step).lower(*arguments).compile().memory_analysis()
    assert planned is not None
    assert planned.temp_size_in_bytes <= 0.4 * 1.17e9
