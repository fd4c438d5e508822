"""Every estimator against the closed form of what it computes, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import jmeta
from jmeta import Episode, Problem, Steps
from jmeta.testing import central_differences, quadratic, relative_error

pytestmark = pytest.mark.usefixtures("x64")
EXACT = {
    "unrolled": jmeta.unrolled,
    "mixed_mode": jmeta.mixed_mode,
    "mixed_mode, products kept": functools.partial(jmeta.mixed_mode, keep=jmeta.keep_products()),
    "mixed_mode, written out": functools.partial(jmeta.mixed_mode, loop="unroll"),
    "unrolled, written out": functools.partial(jmeta.unrolled, loop="unroll"),
    "forward": jmeta.forward,
}
WITH_REMAT = ("unrolled", "mixed_mode")


def grads_of(mg, meta, episode, key=None):
    run = jax.jit(lambda meta, episode, key: mg.estimate(meta, mg.init(meta, key), episode, key)[0])
    return run(meta, episode, key)


@pytest.mark.parametrize("steps", [0, 1, 3, 7])
@pytest.mark.parametrize("name", EXACT)
def test_exact_estimators_equal_the_closed_form(name, steps):
    q = quadratic()
    grads = grads_of(EXACT[name](q.problem, steps), q.meta, q.episode)
    assert relative_error(grads, q.exact(steps)) < 1e-10


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_first_order_and_reptile_equal_their_closed_forms(steps):
    q = quadratic(seed=1)
    first = grads_of(jmeta.first_order(q.problem, steps), q.meta, q.episode)
    assert relative_error(first, q.first_order(steps)) < 1e-10
    moved = grads_of(jmeta.reptile(q.problem, steps), q.meta, q.episode)
    assert float(jnp.max(jnp.abs(moved - q.reptile(steps)))) < 1e-10


@pytest.mark.parametrize("name", EXACT)
def test_multi_step_is_the_weighted_sum_over_the_path(name):
    q = quadratic(seed=2)
    weights = jnp.asarray([0.2, 0.5, 0.3])
    mg = EXACT[name](q.problem, 3, objective=jmeta.multi_step(weights))
    expected = sum(w * q.exact(t + 1) for t, w in enumerate(weights))
    assert relative_error(grads_of(mg, q.meta, q.episode), expected) < 1e-10


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", [*EXACT, "first_order"])
def test_online_scores_each_chunk_before_the_update(name, shared):
    q = quadratic(seed=3)
    loss = q.problem.inner_loss
    other = loss if shared else (lambda *args: loss(*args))
    problem = q.problem._replace(outer_loss=other)
    chunks = np.random.default_rng(5).normal(size=(4, 5))
    matrix, fast = np.asarray(q.inner_matrix), np.asarray(q.meta)
    eye, expected, value = np.eye(5), 0.0, 0.0
    for t, chunk in enumerate(chunks):
        slope = matrix @ (fast - chunk)
        path = np.linalg.matrix_power(eye - q.rate * matrix, t)
        expected += (path if name in EXACT else eye) @ slope / 4
        value += 0.5 * (fast - chunk) @ slope / 4
        fast = fast - q.rate * slope
    make = {**EXACT, "first_order": jmeta.first_order}[name]
    mg = make(problem, 4, objective=jmeta.online)
    grads, _, info = jax.jit(mg.estimate)(q.meta, (), Episode(Steps(chunks)), None)
    assert relative_error(grads, expected) < 1e-10
    assert abs(float(info.loss) - value) < 1e-12


def learned_target(q):
    """The inner loss pulls to meta, from a fixed start: meta is read by the loss alone."""

    def inner(fast, meta, batch, key):
        return 0.5 * (fast - meta) @ q.inner_matrix @ (fast - meta), {}

    return q.problem._replace(inner_loss=inner, init=lambda meta, key: jnp.zeros_like(meta))


@pytest.mark.parametrize("window", [0, 1, 3, 6])
def test_truncated_sees_the_last_window_only(window):
    q = quadratic(seed=4)
    problem, eye = learned_target(q), jnp.eye(5)
    adapted = q.meta - q.contraction(6) @ q.meta
    expected = (eye - q.contraction(window)) @ q.outer_matrix @ (adapted - q.episode.query)
    if window == 0:
        with pytest.raises(ValueError, match="exactly zero"):
            grads_of(jmeta.truncated(problem, 6, window=0), q.meta, q.episode)
        return
    grads = grads_of(jmeta.truncated(problem, 6, window=window), q.meta, q.episode)
    assert relative_error(grads, expected) < 1e-10


def test_implicit_equals_the_dense_solve_at_the_optimum():
    q = quadratic(seed=5)
    strength = 0.7
    problem = jmeta.proximal(q.problem, strength)
    inner, outer, meta, support, query = map(
        np.asarray, (q.inner_matrix, q.outer_matrix, q.meta, *q.episode)
    )
    hessian = inner + strength * np.eye(5)
    slope = outer @ (np.linalg.solve(hessian, inner @ support + strength * meta) - query)
    expected = strength * np.linalg.solve(hessian, slope)
    mg = jmeta.implicit(problem, 1000, solver=jmeta.cg(50, tol=1e-13))
    grads, _, info = jax.jit(mg.estimate)(q.meta, (), q.episode, None)
    assert relative_error(grads, expected) < 1e-10
    assert float(info.diagnostics["residual"]) < 1e-10
    assert float(info.diagnostics["stationarity"]) < 1e-10

    damped = jmeta.implicit(problem, 1000, solver=jmeta.cg(50, tol=1e-13, damping=0.4))
    expected = strength * np.linalg.solve(hessian + 0.4 * np.eye(5), slope)
    assert relative_error(grads_of(damped, q.meta, q.episode), expected) < 1e-10

    rate, terms = 0.2, 7
    series = sum(np.linalg.matrix_power(np.eye(5) - rate * hessian, i) for i in range(terms))
    series_mg = jmeta.implicit(problem, 1000, solver=jmeta.neumann(terms, rate=rate))
    expected = strength * rate * series @ slope
    assert relative_error(grads_of(series_mg, q.meta, q.episode), expected) < 1e-10

    t1t2 = jmeta.implicit(problem, 1000, solver=jmeta.identity(0.3))
    assert relative_error(grads_of(t1t2, q.meta, q.episode), strength * 0.3 * slope) < 1e-10


def test_implicit_averages_the_batches_of_steps():
    q = quadratic(seed=6)
    problem = jmeta.proximal(q.problem, 1.0)
    targets = np.stack([np.asarray(q.episode.support)] * 800)
    one = grads_of(jmeta.implicit(problem, 800), q.meta, q.episode)
    many = grads_of(jmeta.implicit(problem, 800), q.meta, Episode(Steps(targets), q.episode.query))
    assert relative_error(many, one) < 1e-8


def test_evolution_is_unbiased_for_the_smoothed_objective():
    # For a quadratic the smoothed gradient is the gradient itself.
    q = quadratic(seed=7)
    mg = jmeta.evolution(q.problem, 3, pairs=64, sigma=0.3)
    run = jax.jit(jax.vmap(lambda k: mg.estimate(q.meta, mg.init(q.meta, k), q.episode, k)[0]))
    draws = np.asarray(run(jax.random.split(jax.random.key(0), 400)))
    error = draws.std(axis=0, ddof=1) / np.sqrt(len(draws))
    assert np.all(np.abs(draws.mean(axis=0) - q.exact(3)) < 4 * error)


def test_persistent_evolution_is_unbiased_for_the_whole_unroll():
    # A learned target read by every step: two unrolls of two steps. PES sums to the gradient of
    # L(theta_2) + L(theta_4), each perturbation living in its own unroll; plain ES would not.
    q = quadratic(seed=8, dim=3)
    problem = learned_target(q)

    def total(meta):
        values = []
        for steps in (2, 4):
            fast = meta - q.contraction(steps) @ meta
            values.append(
                0.5 * (fast - q.episode.query) @ q.outer_matrix @ (fast - q.episode.query)
            )
        return sum(values)

    mg = jmeta.evolution(problem, 2, pairs=64, sigma=0.2, persistent=True)

    def both(key):
        first, second = jax.random.split(key)
        state = mg.init(q.meta, first)
        one, state, _ = mg.estimate(q.meta, state, q.episode, first)
        two, _, _ = mg.estimate(q.meta, state, q.episode, second)
        return one + two

    draws = np.asarray(jax.jit(jax.vmap(both))(jax.random.split(jax.random.key(1), 600)))
    error = draws.std(axis=0, ddof=1) / np.sqrt(len(draws))
    assert np.all(np.abs(draws.mean(axis=0) - jax.jit(jax.grad(total))(q.meta)) < 4 * error)


@pytest.mark.parametrize("sigma", [0.3, 0.8])
@pytest.mark.parametrize("persistent", [False, True])
def test_evolution_smooths_a_cubic_as_far_as_sigma_says(persistent, sigma):
    # E (m + s e)^3 = m^3 + 3 m s^2, so its gradient in m is 3 m^2 + 3 s^2. One inner step halves
    # the way to meta; under PES two unrolls of one step, each with a perturbation of its own.
    def inner(fast, meta, batch, key):
        return 0.5 * (fast - meta) ** 2, {}

    def cube(fast, meta, batch, key):
        return fast**3, {}

    problem = Problem(inner, cube, lambda meta: optax.sgd(0.5), init=lambda meta, key: 0.0 * meta)
    mg = jmeta.evolution(problem, 1, pairs=64, sigma=sigma, persistent=persistent)
    meta, episode = np.float64(0.4), Episode(0.0, 0.0)
    # What each unroll's perturbation weighs in the fast weights at the end of it.
    unrolls = [(0.5,), (0.25, 0.5)] if persistent else [(0.5,)]
    plain = [sum(c) * 3 * (sum(c) * meta) ** 2 for c in unrolls]
    smoothing = [sum(c) * 3 * sigma**2 * sum(w**2 for w in c) for c in unrolls]

    def whole(key):
        first, *each = jax.random.split(key, 1 + len(unrolls))
        state, total = mg.init(meta, first), 0.0
        for k in each:
            grads, state, _ = mg.estimate(meta, state, episode, k)
            total = total + grads
        return total

    draws = np.asarray(jax.jit(jax.vmap(whole))(jax.random.split(jax.random.key(2), 600)))
    error = float(draws.std(ddof=1)) / np.sqrt(len(draws))
    assert abs(float(draws.mean() - sum(plain) - sum(smoothing))) < 4 * error
    assert sum(smoothing) > 12 * error  # the plain gradient is too far away to pass


def network_problem(optimizer, draws=False):
    """A two-layer network with labels made from meta, a learned rate and an encoder."""

    def forward(fast, x):
        return jnp.tanh(x @ fast["a"]["w"]) @ fast["b"]["w"]

    # Few leaves and a plain loss: every operation here is differentiated many times over.
    def inner(fast, meta, batch, key):
        logits = forward(fast, batch["x"])
        # Mostly the bits of the key will do for noise: a draw takes a second to compile.
        if key is None:
            noise = 0.0
        elif draws:
            noise = jax.random.uniform(key, (), jnp.float64)
        else:
            noise = jnp.mean(jax.random.key_data(key).astype(jnp.float64)) / 2**32
        penalty = noise * jnp.sum(fast["b"]["w"] ** 3)
        return jnp.mean((logits - batch["soft"]) ** 2) + 0.2 * penalty, {"logits": logits}

    def outer(fast, meta, batch, key):
        logits = forward(fast, batch["x"])
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][:, None], axis=1)
        return -jnp.mean(picked), {"first": logits[0, 0]}

    def encode(meta, batch, key):
        return {**batch, "soft": batch["x"] @ meta["teacher"]}

    rng = np.random.default_rng(0)

    def batch():
        return {"x": rng.normal(size=(6, 3)), "y": rng.integers(0, 2, 6)}

    net = {"a": {"w": rng.normal(size=(3, 4))}, "b": {"w": rng.normal(size=(4, 2))}}
    meta = {"net": net, "teacher": rng.normal(size=(3, 2)), "rate": np.asarray(-1.0)}
    problem = Problem(
        inner,
        outer,
        lambda meta: optimizer(jnp.exp(meta["rate"])),
        init=lambda meta, key: meta["net"],
        encode=encode,
    )
    return problem, *jax.tree.map(jnp.asarray, (meta, Episode(batch(), batch())))


OPTIMIZERS = {
    "sgd": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "adam": lambda rate: optax.adam(rate, eps_root=1e-16),
    "clipped": lambda rate: optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(rate)),
    # Asks for the loss, of which its step size is made.
    "polyak": lambda rate: optax.polyak_sgd(max_learning_rate=10.0, scaling=rate, f_min=0.1),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("optimizer", "keyed", "remats"),
    [
        ("sgd", False, ["none", "offload"]),
        ("momentum", True, ["nested"]),
        ("adam", True, ["none", "step", "nested"]),
        ("clipped", False, ["step"]),
        ("polyak", True, ["none"]),
    ],
)
def test_every_exact_estimator_agrees_with_central_differences(optimizer, keyed, remats):
    problem, meta, episode = network_problem(OPTIMIZERS[optimizer], draws=optimizer == "momentum")
    key = jax.random.key(3) if keyed else None

    @jax.jit  # which central_differences calls twice
    def value(meta):
        return jmeta.unrolled(problem, 4).estimate(meta, (), episode, key)[2].loss

    reference = grads_of(jmeta.unrolled(problem, 4), meta, episode, key)
    assert relative_error(reference, central_differences(value, meta)) < 1e-7
    for name, make in EXACT.items():
        if name.endswith("written out") and optimizer != "sgd":
            continue  # the same steps, which take long to compile
        if optimizer == "polyak" and name not in WITH_REMAT:
            continue  # on a closed form, below
        for remat in [{"remat": each} for each in remats] if name in WITH_REMAT else [{}]:
            if (name, remat) == ("unrolled", {"remat": "none"}):
                continue  # the reference itself
            grads = grads_of(make(problem, 4, **remat), meta, episode, key)
            assert relative_error(grads, reference) < 1e-10, (name, remat)


@pytest.mark.usefixtures("standard_promotion")
def test_a_step_size_made_of_the_loss_moves_along_its_derivative():
    # L = c theta^2 / 2 and Polyak's step L / |g|^2: each step takes half a theta, whatever c is;
    # a rate that took the loss for a constant would give another number. First order has constant
    # gradients: d(theta - L(theta) / g) = 1 - g / g = 0.
    def loss(fast, meta, batch, key):
        return 0.5 * batch * fast**2, {}

    problem = Problem(loss, loss, lambda meta: optax.polyak_sgd(max_learning_rate=10.0))
    episode, theta = Episode(jnp.asarray(0.7), jnp.asarray(3.0)), jnp.asarray(2.0)
    for name, make in EXACT.items():
        if not name.endswith("written out"):
            grads = grads_of(make(problem, 3), theta, episode)
            assert relative_error(grads, 3.0 * 0.5**6 * theta) < 1e-10, name
    assert abs(float(grads_of(jmeta.first_order(problem, 3), theta, episode))) < 1e-12
    assert relative_error(grads_of(jmeta.reptile(problem, 3), theta, episode), 0.875 * theta) < 1e-9


@pytest.mark.usefixtures("standard_promotion")
def test_a_rate_that_is_halved_on_a_plateau():
    # Nothing is improvement enough after the first loss: rates r, r / 2 and r / 4.
    def loss(fast, meta, batch, key):
        return 0.5 * batch * fast**2, {}

    plateau = contrib.reduce_on_plateau(0.5, patience=1, rtol=0.9999)
    problem = Problem(loss, loss, lambda meta: optax.chain(optax.sgd(0.2), plateau))
    episode, theta = Episode(jnp.asarray(0.7), jnp.asarray(3.0)), jnp.asarray(2.0)
    shrunk = (1 - 0.14) * (1 - 0.07) * (1 - 0.035)
    for make in (jmeta.unrolled, jmeta.mixed_mode):
        grads = grads_of(make(problem, 3), theta, episode)
        assert relative_error(grads, 3.0 * shrunk**2 * theta) < 1e-10


@pytest.mark.parametrize("as_rate", [False, True])
def test_the_loss_before_the_step_is_what_an_optimizer_is_told(as_rate):
    """The update is minus the loss, or the loss is the rate: a scalar, but no constant one."""

    def update(updates, state, params=None, *, value, **_):
        move = jax.tree.map(lambda g: -value * (g if as_rate else jnp.ones_like(g)), updates)
        return move, state

    def loss(fast, meta, batch, key):
        return batch * fast**3, {}

    told = optax.GradientTransformationExtraArgs(lambda _: (), update)
    problem = Problem(loss, loss, lambda meta: told)
    episode = Episode(Steps(jnp.asarray([0.1, 0.2])), jnp.asarray(0.5))

    def value(theta):
        for c in (0.1, 0.2):
            theta = theta - c * theta**3 * (3 * c * theta**2 if as_rate else 1.0)
        return 0.5 * theta**3

    theta = jnp.asarray(0.9, jnp.float64)  # of no weak type: seen as an array is
    exact, slope = (jmeta.unrolled, jmeta.mixed_mode), jax.jit(jax.grad(value))(theta)
    # Without the gradient in the update there is nothing that first order could stop.
    for make in exact if as_rate else (*exact, jmeta.first_order):
        grads = grads_of(make(problem, 2), theta, episode)
        assert relative_error(grads, slope) < 1e-12


@pytest.mark.parametrize(
    "objective", ["final", pytest.param("multi", marks=pytest.mark.slow), "online"]
)
def test_mixed_mode_equals_reverse_under_jit_vmap_and_steps(objective):
    problem, meta, _ = network_problem(optax.sgd)
    chosen = {
        "final": jmeta.final,
        "multi": jmeta.multi_step([0.1, 0.2, 0.3, 0.4]),
        "online": jmeta.online,
    }[objective]
    rng = np.random.default_rng(9)
    x, y = rng.normal(size=(2, 4, 6, 3)), rng.integers(0, 2, (2, 4, 6))
    episodes = Episode(Steps({"x": x, "y": y}), {"x": x[:, 0], "y": y[:, 0]})
    results = []
    for make, remat in ((jmeta.unrolled, "none"), (jmeta.mixed_mode, "nested")):
        mg = jmeta.over_tasks(make(problem, 4, objective=chosen, remat=remat))
        results.append(jax.jit(mg.estimate)(meta, (), episodes, jax.random.key(9))[0])
    for other in results[1:]:
        assert relative_error(other, results[0]) < 1e-10


def test_mixed_mode_takes_a_loss_that_closes_over_traced_values():
    problem, meta, episode = network_problem(optax.sgd)

    def grads(make, scale):
        def inner(fast, meta, batch, key):
            loss, aux = problem.inner_loss(fast, meta, batch, key)
            return loss * scale, aux

        return make(problem._replace(inner_loss=inner), 3).estimate(meta, (), episode, None)[0]

    exact = jax.jit(lambda s: grads(jmeta.unrolled, s))(1.5)
    mixed = jax.jit(lambda s: grads(jmeta.mixed_mode, s))(1.5)
    assert relative_error(mixed, exact) < 1e-10


def test_the_estimators_differ_where_they_should():
    problem, meta, episode = network_problem(optax.sgd)
    exact = grads_of(jmeta.unrolled(problem, 4), meta, episode)
    first = grads_of(jmeta.first_order(problem, 4), meta, episode)
    assert relative_error(first, exact) > 1e-2
    # The teacher is read through inner gradients alone: first order cannot see it.
    assert np.max(np.abs(first["teacher"])) == 0.0
    # The learned rate multiplies the gradient: first order keeps its derivative.
    assert abs(float(first["rate"])) > 1e-6


def test_first_order_keeps_weight_decay():
    q = quadratic(seed=11)
    decay = 0.3
    problem = q.problem._replace(
        optimizer=lambda meta: optax.chain(optax.add_decayed_weights(decay), optax.sgd(q.rate))
    )
    grads = grads_of(jmeta.first_order(problem, 2), q.meta, q.episode)
    inner, outer, fast, support, query = map(
        np.asarray, (q.inner_matrix, q.outer_matrix, q.meta, *q.episode)
    )
    for _ in range(2):
        fast = fast - q.rate * (inner @ (fast - support) + decay * fast)
    expected = (1 - q.rate * decay) ** 2 * outer @ (fast - query)
    assert relative_error(grads, expected) < 1e-10


@pytest.mark.parametrize("name", [*WITH_REMAT, "mixed_mode, written out", "forward"])
def test_persistent_unrolls_continue_where_they_stopped(name):
    q = quadratic(seed=12)
    problem = learned_target(q)
    mg = EXACT[name](problem, 2, persistent=True)
    state, estimate = jax.jit(mg.init)(q.meta, None), jax.jit(mg.estimate)
    meta, path = np.asarray(q.meta), np.asarray(q.contraction(2))
    slope = (np.eye(5) - path) @ np.asarray(q.outer_matrix)
    for part in range(3):
        begin = np.asarray(state.fast)
        grads, state, _ = estimate(q.meta, state, q.episode, None)
        fast = meta + path @ (begin - meta)
        expected = slope @ (fast - np.asarray(q.episode.query))
        assert relative_error(grads, expected) < 1e-10
        assert relative_error(state.fast, fast) < 1e-12
        assert int(state.step) == 2 * (part + 1)


@pytest.mark.parametrize("microbatch", [None, 1, 2, 6])
def test_over_tasks_is_the_mean_whatever_the_microbatch(microbatch):
    q = quadratic(seed=13)
    targets = np.random.default_rng(2).normal(size=(2, 6, 5))
    mg = jmeta.over_tasks(jmeta.mixed_mode(q.problem, 3), microbatch=microbatch)
    run = mg.estimate if microbatch == 2 else jax.jit(mg.estimate)  # outside of jit too
    grads, _, info = run(q.meta, (), Episode(*targets), None)
    each = [q._replace(episode=Episode(*targets[:, i])).exact(3) for i in range(6)]
    mean = np.mean(each, axis=0)
    assert relative_error(grads, mean) < 1e-10
    assert float(info.grad_norm) == pytest.approx(np.linalg.norm(mean), rel=1e-12)


def test_over_tasks_keeps_one_state_and_one_key_for_each_task():
    problem, meta, episode = network_problem(optax.sgd)
    episodes = jax.tree.map(lambda x: np.stack([np.asarray(x)] * 4), episode)
    single = jmeta.mixed_mode(problem, 2, persistent=True)
    key = jax.random.key(4)
    results = []
    for microbatch in (None, 2):
        mg = jmeta.over_tasks(single, tasks=4, microbatch=microbatch)
        state = jax.jit(mg.init)(meta, key)
        assert state.step.shape == (4,)
        grads, state, _ = jax.jit(mg.estimate)(meta, state, episodes, key)
        results.append((grads, state.fast))
    assert relative_error(results[1], results[0]) < 1e-12
    weights = np.asarray(results[0][1]["a"]["w"])
    assert np.max(np.abs(weights[0] - weights[1])) > 1e-6  # keys differ between tasks
