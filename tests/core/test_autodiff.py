"""Inner gradients and their derivatives: three kinds."""
# ruff: noqa: E731

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta
from jmeta import Episode, Problem, Steps
from jmeta.core.autodiff import (
    mixed_mode_grad,
    reverse_grad,
    stopped_grad,
    variables_read,
)
from jmeta.core.tracing import scan_parts
from jmeta.testing import equations, relative_error

pytestmark = pytest.mark.usefixtures("x64")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def bodies(eqn):
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            body = getattr(item, "jaxpr", item)
            if hasattr(body, "eqns"):
                yield body


def count(jaxpr, name):
    """How often a primitive runs, loops multiplied out."""
    total = 0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += eqn.primitive.name == name
        total += times * sum(count(body, name) for body in bodies(eqn))
    return total


# The three kinds of derivative of an inner gradient g(x, m) = d/dx (m x^3 + b x^2 + x m^2)


def cubic(fast, meta, batch, key):
    return meta * fast**3 + batch * fast**2 + fast * meta**2, {"square": fast**2}


@pytest.mark.parametrize("make", [reverse_grad, mixed_mode_grad, stopped_grad])
def test_value_aux_and_gradient_are_the_same_in_every_mode(make):
    value, aux, grad = jax.jit(lambda x, m, b: make(cubic)(x, m, b, None))(2.0, 5.0, 7.0)
    assert (float(value), float(aux["square"]), float(grad)) == (118.0, 4.0, 113.0)


@pytest.mark.parametrize("make", [reverse_grad, mixed_mode_grad])
def test_the_derivative_of_an_inner_gradient(make):
    g = lambda x, m, b: make(cubic)(x, m, b, None)[2]
    slopes = jax.jit(jax.grad(g, argnums=(0, 1, 2)))(2.0, 5.0, 7.0)
    # 6 m x + 2 b, 3 x^2 + 2 m, 2 x
    assert [float(s) for s in slopes] == [74.0, 22.0, 4.0]


def test_a_stopped_gradient_is_a_constant_but_its_loss_is_not():
    g = lambda x, m, b: stopped_grad(cubic)(x, m, b, None)[2]
    slopes = lambda f: [float(s) for s in jax.jit(jax.grad(f, argnums=(0, 1, 2)))(2.0, 5.0, 7.0)]
    assert slopes(g) == [0.0, 0.0, 0.0]
    value = lambda x, m, b: stopped_grad(cubic)(x, m, b, None)[0]
    assert slopes(value) == slopes(lambda x, m, b: cubic(x, m, b, None)[0])


@pytest.mark.parametrize("make", [reverse_grad, mixed_mode_grad])
def test_loss_and_gradient_can_be_scored_together(make):
    def both(x, m, b):
        value, _, grad = make(cubic)(x, m, b, None)
        return jnp.sin(value) * grad

    def plain(x, m, b):
        value, grad = jax.value_and_grad(lambda x: cubic(x, m, b, None)[0])(x)
        return jnp.sin(value) * grad

    slopes = lambda f: jax.jit(jax.grad(f, argnums=(0, 1, 2)))(0.2, 0.5, 0.7)
    assert relative_error(slopes(both), slopes(plain)) < 1e-14


@pytest.mark.parametrize("make", [reverse_grad, mixed_mode_grad, stopped_grad])
def test_no_gradient_flows_through_aux(make):
    through = lambda x: make(cubic)(x, 5.0, 7.0, None)[1]["square"]
    assert float(jax.jit(jax.grad(through))(2.0)) == 0.0


# Which inputs a loss reads


@jax.custom_jvp
def doubled(x, unread):
    return 2.0 * x


doubled.defjvp(lambda primals, tangents: (2.0 * primals[0], 2.0 * tangents[0] + tangents[1]))


@jax.custom_vjp
def hooked(x, unread):
    return x


# A gradient hook: the rule gives a derivative to what the function itself never reads.
hooked.defvjp(lambda x, unread: (x, None), lambda _, bar: (bar, 3.0 * bar))

READS = {
    "plain": (lambda x, y: (x * 2, y), [True, False]),
    "jit": (lambda x, y: jax.jit(lambda a, b: (a + 1, b * 2))(x, y), [True, False]),
    "nested jit": (
        lambda x, y: jax.jit(lambda a, b: jax.jit(lambda c, d: (d, c))(b, a))(x, y),
        [True, False],
    ),
    "remat": (lambda x, y: jax.checkpoint(lambda a, b: (jnp.sin(a), b))(x, y), [True, False]),
    "both": (lambda x, y: (x * y, 0.0), [True, True]),
    "neither": (lambda x, y: (jnp.ones(()), x + y), [False, False]),
    "dead": (lambda x, y: (x + 0.0 * jnp.zeros(()), jnp.sin(y)), [True, False]),
    # Loops, branches and custom rules count all their inputs: never wrong, only less sharp.
    "custom_jvp": (lambda x, y: (doubled(x, y), 0.0), [True, True]),
    "custom_vjp": (lambda x, y: (hooked(x, y), 0.0), [True, True]),
    "scan": (
        lambda x, y: (jax.lax.scan(lambda c, _: (c * x, None), x, length=3)[0], y),
        [True, False],
    ),
    "cond": (lambda x, y: (jax.lax.cond(True, jnp.sin, jnp.cos, x), y), [True, False]),
}


@pytest.mark.parametrize("name", READS)
def test_variables_read(name):
    function, expected = READS[name]
    jaxpr = jax.make_jaxpr(function)(1.0, 2.0).jaxpr
    read = variables_read(jaxpr, jaxpr.outvars[:1])
    assert [v in read for v in jaxpr.invars] == expected


# What mixed mode carries


def two_part_problem(reads_extra):
    """A linear model in meta["net"]; meta["extra"] is read by the outer loss alone, or by both."""

    def inner(fast, meta, batch, key):
        shift = jnp.sum(meta["extra"] ** 2) * jnp.sum(fast["w"]) if reads_extra else 0.0
        return jnp.mean((batch["x"] @ fast["w"] - batch["y"]) ** 2) + shift, {}

    def outer(fast, meta, batch, key):
        value = jnp.mean((batch["x"] @ fast["w"] - batch["y"]) ** 2)
        return value + jnp.sum(meta["extra"] ** 3), {}

    problem = Problem(inner, outer, lambda m: optax.sgd(0.1), init=lambda m, key: m["net"])
    meta = {"net": {"w": np.linspace(-1.0, 1.0, 3)}, "extra": np.linspace(0.0, 1.0, 11)}
    batch = {"x": normal(0, 7, 3), "y": np.linspace(0.0, 1.0, 7)}
    return problem, *jax.tree.map(jnp.asarray, (meta, Episode(batch, batch)))


@pytest.mark.parametrize("reads_extra", [False, True])
def test_leaves_that_the_inner_loss_never_reads_do_not_ride_along(reads_extra):
    problem, meta, episode = two_part_problem(reads_extra)
    mg = jmeta.mixed_mode(problem, 4)
    jaxpr = jax.make_jaxpr(lambda m: mg.estimate(m, (), episode, None)[0])(meta)
    carried = [
        v.aval.shape
        for eqn in equations(jaxpr)
        if eqn.primitive.name == "scan"
        for v in (*eqn.invars[scan_parts(eqn)[0] :], *eqn.outvars)
        if v.aval.shape[-1:] == (11,)
    ]
    assert bool(carried) is reads_extra  # nothing that a loop carries or stacks has its shape
    exact, mixed = (
        jax.jit(lambda m, each=each: each.estimate(m, (), episode, None)[0])(meta)
        for each in (jmeta.unrolled(problem, 4), mg)
    )
    assert relative_error(mixed, exact) < 1e-12


def test_a_batch_is_differentiated_only_where_it_is_made_from_meta():
    def inner(fast, meta, batch, key):
        return jnp.mean(jnp.tanh(batch["x"] @ fast) ** 2), {}

    problem = Problem(inner, inner, lambda m: optax.sgd(0.1), init=lambda m, key: m["w"])
    made = problem._replace(encode=lambda m, batch, key: {"x": batch["x"] + m["shift"]})
    meta = {"w": jnp.ones((3, 2)), "shift": jnp.full((5, 3), 0.1)}
    batch = {"x": normal(0, 5, 3)}
    episode = Episode(batch, batch)
    counts = {}
    for name, chosen in (("data", problem), ("made", made)):
        mg = jmeta.mixed_mode(chosen, 3)
        jaxpr = jax.make_jaxpr(lambda m, mg=mg: mg.estimate(m, (), episode, None)[0])(meta)
        counts[name] = count(jaxpr, "dot_general")
        mixed, exact = (
            jax.jit(lambda m, each=each: each.estimate(m, (), episode, None)[0])(meta)
            for each in (mg, jmeta.unrolled(chosen, 3))
        )
        assert relative_error(mixed, exact) < 1e-12
    # Per inner step: forward and backward, then their tangents: x@w, x.T@., x@dw, x.T@d. and the
    # recomputation of two. Inputs made from meta cost products with w on top.
    assert counts["data"] <= 3 * 6 + 2
    assert counts["made"] >= counts["data"] + 3


def test_keys_and_integers_in_a_batch_are_left_alone():
    def inner(fast, meta, batch, key):
        # One draw, and the bits of the other key: a draw takes a second to compile.
        bits = jax.random.key_data(key).astype(jnp.float64)
        noise = jax.random.uniform(batch["key"], (3,)) + jnp.mean(bits) / 2**32
        rows = fast["table"][batch["rows"]]
        return jnp.sum((rows * noise[:, None]) ** 2 * batch["mask"][:, None]) + meta["c"] * jnp.sum(
            fast["table"] ** 3
        ), {"rows": batch["rows"], "flag": batch["flag"]}

    problem = Problem(inner, inner, lambda m: optax.sgd(0.01), init=lambda m, key: m["net"])
    meta = {"net": {"table": jnp.linspace(-1.0, 1.0, 8).reshape(4, 2)}, "c": jnp.asarray(0.3)}
    batch = {
        "key": jax.random.key(4),
        "rows": jnp.asarray([0, 2, 3]),
        "mask": jnp.asarray([1.0, 0.0, 1.0]),
        "flag": jnp.asarray(True),
    }
    episode = Episode(batch, batch)

    def run(make):
        estimate = jax.jit(make(problem, 3).estimate)
        return estimate(meta, (), episode, jax.random.key(5))

    exact, _, info = run(jmeta.unrolled)
    mixed, _, same = run(jmeta.mixed_mode)
    assert relative_error(mixed, exact) < 1e-12
    assert same.aux["rows"].tolist() == info.aux["rows"].tolist() == [0, 2, 3]


# Losses with structure inside


@jax.custom_vjp
def softplus(x):
    return jnp.logaddexp(x, 0.0)


softplus.defvjp(lambda x: (softplus(x), x), lambda x, bar: (bar * jax.nn.sigmoid(x),))


def layered(body):
    def loss(fast, meta, batch, key):
        x = body(fast["layers"], batch["x"])
        return jnp.mean((x - 0.5) ** 2) + meta["decay"] * jnp.sum(fast["layers"] ** 2), {}

    return loss


def looped(layers, x, activation=jnp.tanh):
    for layer in layers:
        x = activation(x @ layer)
    return x


def scanned(layers, x):
    return jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, layers)[0]


def branched(layers, x):
    return jax.lax.cond(jnp.sum(x) > -1e9, scanned, lambda layers, x: x, layers, x)


def while_free(layers, x):
    return jax.lax.fori_loop(0, len(layers), lambda i, x: jnp.tanh(x @ layers[i]), x)


BODIES = {
    "checkpoint": jax.checkpoint(looped),
    "scan": scanned,
    "scan of checkpoint": lambda layers, x: jax.lax.scan(
        jax.checkpoint(lambda x, layer: (jnp.tanh(x @ layer), None)), x, layers
    )[0],
    "relu": lambda layers, x: looped(layers, x, jax.nn.relu),  # custom_jvp
    "custom_vjp": lambda layers, x: looped(layers, x, softplus),
    "cond": branched,
    "fori_loop": while_free,
    "jit": jax.jit(looped),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow) if n in ("scan", "relu", "jit") else n
        for n in BODIES
    ],
)
def test_mixed_mode_equals_reverse_whatever_the_loss_is_made_of(name):
    loss = layered(BODIES[name])
    problem = Problem(loss, loss, lambda m: optax.sgd(m["rate"]), init=lambda m, key: m["net"])
    meta = {
        "net": {"layers": normal(0, 2, 4, 4)},
        "decay": jnp.asarray(0.1),
        "rate": jnp.asarray(0.3),
    }
    batch = {"x": normal(1, 6, 4)}

    keeping = functools.partial(jmeta.mixed_mode, keep=jmeta.keep_products(at_least=4))

    @jax.jit
    def both(meta, episode):
        return [
            make(problem, 3).estimate(meta, (), episode, None)[0]
            for make in (jmeta.unrolled, jmeta.mixed_mode, keeping)
        ]

    exact, mixed, kept = both(meta, Episode(batch, batch))
    assert relative_error(mixed, exact) < 1e-12
    assert relative_error(kept, exact) < 1e-12


@pytest.mark.parametrize("keep", [None, jmeta.keep_products()])
def test_mixed_mode_under_vmap_equals_one_at_a_time(keep):
    loss = layered(scanned)
    problem = Problem(loss, loss, lambda m: optax.sgd(0.2), init=lambda m, key: m["net"])
    mg = jmeta.mixed_mode(problem, 2, keep=keep)
    net = {"layers": normal(0, 2, 3, 4, 4)}
    metas = {"net": net, "decay": jnp.asarray([0.1, 0.2])}
    x = normal(1, 2, 6, 4)
    run = jax.jit(lambda meta, x: mg.estimate(meta, (), Episode({"x": x}, {"x": x}), None)[0])
    mapped = jax.vmap(run)(metas, x)
    for i in range(2):
        pick = lambda tree, i=i: jax.tree.map(lambda leaf: np.asarray(leaf)[i], tree)
        assert relative_error(pick(mapped), run(pick(metas), x[i])) < 1e-12


def test_third_order_through_mixed_mode_equals_reverse():
    problem, meta, episode = two_part_problem(True)
    direction = jax.tree.map(lambda leaf: np.sin(np.arange(leaf.size)), meta)

    def along(make):
        def value(meta):
            grads = make(problem, 3).estimate(meta, (), episode, None)[0]
            return optax.tree.vdot(grads, direction)

        return jax.jit(jax.grad(value))(meta)

    assert relative_error(along(jmeta.mixed_mode), along(jmeta.unrolled)) < 1e-11


@pytest.mark.parametrize("shared", [True, False])
def test_kept_values_serve_a_scored_loss_and_an_adaptive_optimizer(shared):
    loss = layered(scanned)
    problem = Problem(
        loss,
        loss if shared else lambda *args: loss(*args),
        lambda m: jmeta.optim.adam(jnp.exp(m["rate"])),
        init=lambda m, key: m["net"],
    )
    meta = {
        "net": {"layers": normal(0, 2, 4, 4)},
        "decay": jnp.asarray(0.1),
        "rate": jnp.asarray(-3.0),
    }
    chunks = Episode(Steps({"x": normal(1, 3, 6, 4)}))
    exact, kept = (
        jax.jit(lambda m, mg=mg: mg.estimate(m, (), chunks, None)[0])(meta)
        for mg in (
            jmeta.unrolled(problem, 3, objective=jmeta.online),
            jmeta.mixed_mode(problem, 3, objective=jmeta.online, keep=jmeta.keep_products()),
        )
    )
    assert relative_error(kept, exact) < 1e-11


def test_what_is_kept_is_not_what_a_remat_computes_again():
    loss = layered(scanned)
    problem = Problem(loss, loss, lambda m: optax.sgd(0.2), init=lambda m, key: m["net"])
    with pytest.raises(ValueError, match=r'keep= stores.*remat="none"'):
        jmeta.mixed_mode(problem, 3, remat="step", keep=jmeta.keep_products())
    with pytest.raises(ValueError, match="at least one entry"):
        jmeta.keep_products(at_least=0)


def test_mixed_mode_may_stand_inside_a_users_own_derivatives():
    # Differentiated in something else than meta: a closed-over scale, in forward mode.
    problem, meta, episode = two_part_problem(True)

    def norm(make, scale):
        def inner(fast, meta, batch, key):
            value, aux = problem.inner_loss(fast, meta, batch, key)
            return value * scale, aux

        grads = make(problem._replace(inner_loss=inner), 2).estimate(meta, (), episode, None)[0]
        return optax.tree.norm(grads)

    slopes = [
        jax.jit(jax.grad(lambda s, m=m: norm(m, s)))(0.7)
        for m in (jmeta.unrolled, jmeta.mixed_mode)
    ]
    assert float(slopes[1]) == pytest.approx(float(slopes[0]), rel=1e-11)


def test_the_same_episode_as_steps_or_as_one_batch():
    problem, meta, episode = two_part_problem(True)
    mg = jmeta.mixed_mode(problem, 5, remat="nested")
    stacked = jax.tree.map(lambda x: np.stack([np.asarray(x)] * 5), episode.support)
    estimate = jax.jit(lambda episode: mg.estimate(meta, (), episode, None)[0])
    one, many = estimate(episode), estimate(Episode(Steps(stacked), episode.query))
    assert relative_error(many, one) < 1e-12
