"""Each published method against a closed form or a loop written by hand, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick_numbers import differences, relative_error

import jmeta
from jmeta import Episode, cg, methods
from jmeta.methods.maml_plus_plus import step_weights
from jmeta.models import transformer
from jmeta.runtime.train import stage_at
from jmeta.testing import quadratic

pytestmark = pytest.mark.usefixtures("x64")


def grads_of(mg, meta, episode):
    return jax.jit(lambda m, e: mg.estimate(m, (), e, None)[0])(meta, episode)


def test_maml_fomaml_and_reptile_on_the_quadratic():
    q = quadratic()
    # One loss serves both ends here, so the outer matrix is the inner one.
    q = q._replace(outer_matrix=q.inner_matrix)

    def loss(params, batch, key):
        return q.problem.inner_loss(params, None, batch, key)

    settings = {"steps": 3, "optimizer": optax.sgd(q.rate)}
    for method, expected in (
        (methods.maml, q.exact(3)),
        (methods.fomaml, q.first_order(3)),
        (methods.reptile, q.reptile(3)),
    ):
        assert (
            relative_error(grads_of(method(loss, **settings), q.meta, q.episode), expected) < 1e-10
        )


def test_imaml_equals_the_dense_solve():
    q, strength = quadratic(seed=1), 0.7

    def loss(params, batch, key):
        return q.problem.inner_loss(params, None, batch, key)

    mg = methods.imaml(
        loss,
        steps=1000,
        optimizer=optax.sgd(q.rate),
        strength=strength,
        solver=cg(50, tol=1e-13),
    )
    eye, matrix = jnp.eye(5), q.inner_matrix
    hessian = matrix + strength * eye
    optimum = jnp.linalg.solve(hessian, matrix @ q.episode.support + strength * q.meta)
    slope = matrix @ (optimum - q.episode.query)
    expected = jnp.linalg.solve(eye + matrix / strength, slope)
    assert relative_error(grads_of(mg, q.meta, q.episode), expected) < 1e-10


def network(params, batch, key):
    hidden = jnp.tanh(batch["x"] @ params["body"])
    return head(params, {"h": hidden, "y": batch["y"]}, key)


def head(params, batch, key):
    return jnp.mean((batch["h"] @ params["head"]["w"] - batch["y"]) ** 2), {}


def start():
    return {
        "body": jnp.asarray(np.linspace(-1.0, 1.0, 6).reshape(2, 3)),
        "head": {"w": jnp.asarray(np.linspace(0.5, -0.5, 3))},
    }


def draw(seed):
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(5, 2)), "y": rng.normal(size=5)}


def double(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, float), tree)


def descend(loss, params, batch, rates):
    """Plain gradient descent by hand; one tree of rates for each step."""
    for rate in rates:
        slope = jax.grad(lambda p: loss(p, batch, None)[0])(params)
        params = jax.tree.map(lambda p, r, g: p - r * g, params, rate, slope)
    return params


def test_anil_adapts_the_head_alone_and_learns_the_body_through_it():
    params, episode = start(), Episode(draw(0), draw(1))

    @jax.jit
    def value(params):
        frozen = jax.tree.map(jnp.zeros_like, params)
        rate = {**frozen, "head": jax.tree.map(lambda x: x + 0.2, frozen["head"])}
        adapted = descend(network, params, episode.support, [rate] * 3)
        return network(adapted, episode.query, None)[0]

    def features(params, batch, key):
        return {"h": jnp.tanh(batch["x"] @ params["body"]), "y": batch["y"]}

    plain = methods.anil(network, steps=3, optimizer=optax.sgd(0.2))
    hoisted = methods.anil(head, steps=3, optimizer=optax.sgd(0.2), features=features)
    grads = grads_of(plain, params, episode)
    assert relative_error(grads, differences(value, params)) < 1e-7
    assert relative_error(grads_of(hoisted, params, episode), grads) < 1e-12
    assert np.abs(np.asarray(grads["body"])).min() > 1e-6
    problem = methods.learned_body(network, optax.sgd(0.2))
    assert problem.init(params, None)["body"] is None  # nothing of the body can move


def test_meta_sgd_learns_a_rate_for_each_parameter():
    q = quadratic(seed=2)
    rates = jnp.linspace(0.05, 0.2, 5)
    meta = {"start": q.meta, "rates": rates}
    mg = methods.meta_sgd(lambda p, b, key: q.problem.inner_loss(p, None, b, key))
    grads = grads_of(mg, meta, q.episode)
    slope = q.inner_matrix @ (q.meta - q.episode.support)
    outer = q.inner_matrix @ (q.meta - rates * slope - q.episode.query)
    expected = {"start": outer - q.inner_matrix @ (rates * outer), "rates": -slope * outer}
    assert relative_error(grads, expected) < 1e-10


def test_maml_plus_plus_equals_a_loop_by_hand():
    params, episode, steps = start(), Episode(draw(2), draw(3)), 3
    meta = double(methods.maml_plus_plus_init(params, 0.1, steps))
    meta["rates"] = jax.tree.map(lambda r: r * np.asarray([1.0, 2.0, 0.5]), meta["rates"])
    weights = step_weights(steps, 0.4)
    assert weights.tolist() == pytest.approx([0.2, 0.2, 0.6], abs=1e-6)

    def value(meta):
        total = 0.0
        for t in range(1, steps + 1):
            rates = [jax.tree.map(lambda r, i=i: r[i], meta["rates"]) for i in range(t)]
            adapted = descend(network, meta["start"], episode.support, rates)
            total = total + weights[t - 1] * network(adapted, episode.query, None)[0]
        return total

    mg = methods.maml_plus_plus(network, steps=steps, progress=0.4)
    assert relative_error(grads_of(mg, meta, episode), jax.jit(jax.grad(value))(meta)) < 1e-10


def test_rates_by_layer_of_a_transformer_leave_its_embedding_one():
    config = transformer.TransformerConfig(vocab=13, width=8, layers=3, heads=2, max_len=6)
    params = jax.eval_shape(lambda key: transformer.init(config, key), jax.random.key(0))
    make = functools.partial(
        methods.maml_plus_plus_init, rate=0.1, steps=4, per="layer", stacked="blocks.**"
    )
    rates = jax.eval_shape(make, params)["rates"]
    assert rates["embed"]["tokens"].shape == (4,)
    for part, leaves in rates.items():
        shapes = {leaf.shape for leaf in jax.tree.leaves(leaves)}
        assert shapes == ({(4, 3)} if part == "blocks" else {(4,)}), part
    with pytest.raises(ValueError, match=r"stacked='layers\.\*\*' matches none"):
        make({"w": jnp.zeros(2)}, stacked="layers.**")


def test_annealing_begins_where_it_says():
    schedule = methods.annealed(
        network, steps=2, first_order_until=30, multi_step_until=100, phases=4
    )
    assert [begin for begin, _ in schedule] == [0, 25, 30, 50, 75, 100]


@pytest.mark.parametrize(
    ("step", "second_order", "weights"),
    [(29, False, (0.375, 0.625)), (30, True, (0.35, 0.65)), (100, True, (0.0, 1.0))],
)
def test_annealing_differs_by_order_and_weights_on_both_sides_of_a_switch(
    step, second_order, weights
):
    # Weights by hand: (1 - p) / 2 on the first step, with p = 0.25 from step 25 on, and 0.3 at 30.
    schedule = jmeta.stages(
        methods.annealed(network, steps=2, first_order_until=30, multi_step_until=100, phases=4)
    )
    params, episode = start(), Episode(draw(2), draw(3))
    meta = double(methods.maml_plus_plus_init(params, 0.1, 2))

    def value(meta):
        params, total = meta["start"], 0.0
        for t, weight in enumerate(weights):
            slope = jax.grad(lambda p: network(p, episode.support, None)[0])(params)
            slope = slope if second_order else jax.lax.stop_gradient(slope)
            params = jax.tree.map(lambda p, r, g, t=t: p - r[t] * g, params, meta["rates"], slope)
            total = total + weight * network(params, episode.query, None)[0]
        return total

    grads = grads_of(schedule.estimators[stage_at(schedule, step)], meta, episode)
    assert relative_error(grads, jax.jit(jax.grad(value))(meta)) < 1e-10


def test_cavia_adapts_a_context_and_learns_the_rest():
    params, episode = {"body": start()["body"], "mix": np.ones((3, 2))}, (draw(4), draw(5))

    def loss(params, context, batch, key):
        hidden = jnp.tanh(batch["x"] @ params["body"] + (params["mix"] @ context)[None])
        return jnp.mean((jnp.sum(hidden, axis=1) - batch["y"]) ** 2), {}

    def value(params):
        context = jnp.zeros(2)
        for _ in range(2):
            context = context - 0.3 * jax.grad(lambda c: loss(params, c, episode[0], None)[0])(
                context
            )
        return loss(params, context, episode[1], None)[0]

    mg = methods.cavia(loss, steps=2, size=2, optimizer=optax.sgd(0.3))
    grads = grads_of(mg, params, Episode(*episode))
    assert relative_error(grads, jax.jit(jax.grad(value))(params)) < 1e-10
