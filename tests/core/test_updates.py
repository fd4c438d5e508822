"""Optimizers that ask for more than a gradient: what they get, and what is refused."""

import jax
import optax
import pytest
from optax import contrib

import jmeta
from jmeta.testing import quadratic, relative_error

pytestmark = pytest.mark.usefixtures("standard_promotion")  # which these optimizers count on


def grads_of(mg, meta, episode):
    return jax.jit(lambda m, e: mg.estimate(m, mg.init(m, None), e, None)[0])(meta, episode)


@pytest.mark.parametrize("make", [jmeta.unrolled, jmeta.mixed_mode])
def test_a_line_search_is_refused_in_plain_words(make):
    search = optax.chain(optax.sgd(0.1), optax.scale_by_backtracking_linesearch(5))
    q = quadratic()
    with pytest.raises(TypeError, match="is a line search: it asks for value_fn"):
        grads_of(make(q.problem._replace(optimizer=lambda meta: search), 2), q.meta, q.episode)


@pytest.mark.parametrize(
    ("asks", "said"),
    [
        (contrib.sam(optax.sgd(0.1), optax.sgd(0.05), opaque_mode=True), "asks for grad_fn"),
        (contrib.sophia(0.1), "asks for obj_fn"),
    ],
)
def test_optimizers_that_evaluate_the_objective_themselves_are_refused(asks, said):
    q = quadratic()
    problem = q.problem._replace(optimizer=lambda meta: asks)
    with pytest.raises(TypeError, match=said):
        grads_of(jmeta.mixed_mode(problem, 2), q.meta, q.episode)


@pytest.mark.parametrize("make", [jmeta.unrolled, jmeta.mixed_mode])
def test_sharpness_aware_minimisation_alternates_its_steps(x64, make):
    """Steps up to a neighbour, and from its gradient down again: SAM where it asks for no more."""
    q = quadratic()
    sam = contrib.sam(optax.sgd(0.1), optax.sgd(0.05), sync_period=2)

    def value(meta):
        theta, state = q.problem.init(meta, None), sam.init(q.problem.init(meta, None))
        for _ in range(4):
            grads = jax.grad(lambda w: q.problem.inner_loss(w, meta, q.episode.support, None)[0])
            updates, state = sam.update(grads(theta), state, theta)
            theta = optax.apply_updates(theta, updates)
        return q.problem.outer_loss(theta, meta, q.episode.query, None)[0]

    grads = grads_of(make(q.problem._replace(optimizer=lambda m: sam), 4), q.meta, q.episode)
    assert relative_error(grads, jax.grad(value)(q.meta)) < 1e-12
