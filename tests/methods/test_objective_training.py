"""Training on sampled objectives: paired rewards, equal draws on all devices, exact mixtures."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import jmeta
from jmeta import methods
from jmeta.core.types import Episode, Steps
from jmeta.methods import Mixture, Objective
from jmeta.runtime import fit, parallel

WIDTH = 3


def noisy(rows, key):
    return rows + jax.random.uniform(key, rows.shape, minval=-0.2, maxval=0.2)


def squares(to):
    """A loss whose minimum in the parameters is the mean of the rows, moved by ``to``."""

    def loss(params, batch, key):
        del key
        return ((params[None] - batch - to) ** 2).sum(-1).mean(), {}

    return loss


OBJECTIVES = [Objective(f"to {to}", noisy, squares(to)) for to in (0.0, 1.0, -2.0)]


@pytest.fixture
def rows():
    return jnp.asarray(np.random.default_rng(0).normal(size=(16, WIDTH)), jnp.float32)


def compiled(measure):
    """A measure that reads the parameters and its key alone, as one program."""
    return jax.jit(lambda params, key: measure(params, None, None, None, key))


def drawing(learner):
    return jax.jit(lambda state, key: methods.draw_objective(learner, state, key))


def test_paired_rewards_are_zero_where_nothing_was_learned_and_fresh_ones_are_not(rows):
    params, keys = jnp.ones(WIDTH), jax.random.split(jax.random.key(1))
    paired = compiled(methods.paired_losses(OBJECTIVES, rows, jax.random.key(2)))
    fresh = compiled(methods.fresh_losses(OBJECTIVES, rows, 8))
    for measure, same in ((paired, True), (fresh, False)):
        first, again = (measure(params, key) for key in keys)
        reward = methods.relative_improvement(first, again, threshold=0.0)
        # one is exactly zero, but for the epsilons in its numerator that the threshold takes out
        assert bool((reward == 0).all()) == same, measure
    moved, same = (np.asarray(paired(params + by, keys[0])) for by in (0.1, 0.0))
    assert (moved != same).all()


def test_a_step_is_the_gradient_of_the_objective_that_was_drawn(rows):
    learner = methods.fixed_mix([1, 2, 3])
    mg = methods.sampled_training(OBJECTIVES, learner)
    params, state, names = jnp.ones(WIDTH), mg.init(jnp.ones(WIDTH), None), set()
    step, draw = jax.jit(mg.estimate), drawing(learner)
    alone = lambda p, k, i: methods.objective_loss(OBJECTIVES[i], p, rows, k, train=True)  # noqa: E731
    slope = jax.jit(jax.value_and_grad(alone), static_argnums=2)
    for seed in range(12):
        key = jax.random.key(seed)
        draw_key, loss_key, _ = jax.random.split(key, 3)
        index, expected_state = draw(state, draw_key)
        objective = OBJECTIVES[int(index)]
        names.add(objective.name)
        loss, expected = slope(params, loss_key, int(index))
        grads, state, info = step(params, state, Episode(None, rows), key)
        np.testing.assert_allclose(grads, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(info.loss, loss, rtol=1e-6)
        np.testing.assert_array_equal(state.counts, expected_state.counts)
        assert info.diagnostics[f"drawn {objective.name}"] == 1
    assert len(names) == 3


def test_windows_measure_once_and_the_sampler_learns_from_the_counts(rows):
    learner = methods.mometas(3, entropy=0.0)
    measure = methods.paired_losses(OBJECTIVES, rows, jax.random.key(3))
    mg = methods.sampled_training(OBJECTIVES, learner, measure, window=4)
    params, step = jnp.full(WIDTH, 5.0), jax.jit(mg.estimate)
    draw, losses, update = drawing(learner), compiled(measure), jax.jit(learner.update)
    state = mg.init(params, None)
    by_hand = update(learner.init(), jnp.zeros(3), losses(params, None))
    for at in range(9):
        key = jax.random.key(at)
        if at in (4, 8):  # the parameters as the window's last step left them
            now = losses(params, None)
            by_hand = update(by_hand, by_hand.counts, now)
        _, by_hand = draw(by_hand, jax.random.split(key, 3)[0])
        grads, state, _ = step(params, state, Episode(None, rows), key)
        params = params - 0.05 * grads
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state, by_hand)
    assert int(state.windows) == 3
    # where nothing is measured there is no branch that could
    plain = methods.sampled_training(OBJECTIVES, methods.uniform_mix(3))
    shapes = (params, plain.init(params, None), Episode(None, rows), jax.random.key(0))
    assert str(jax.make_jaxpr(plain.estimate)(*shapes)).count("cond[") == 2  # the switch, twice
    shapes = (params, state, Episode(None, rows), jax.random.key(0))
    assert str(jax.make_jaxpr(mg.estimate)(*shapes)).count("cond[") == 3


def test_all_devices_draw_the_same_and_eight_train_as_one(rows):
    learner = methods.mometas(3, entropy=0.1)
    measure = methods.paired_losses(OBJECTIVES, rows, jax.random.key(4))
    mg = methods.sampled_training(OBJECTIVES, learner, measure, window=3)
    sample = fit.from_function(
        lambda step: Episode(
            None, np.random.default_rng(step).normal(size=(16, WIDTH)).astype(np.float32)
        )
    )
    runs = {}
    for name, mesh in (
        ("one", None),
        ("eight", parallel.make_mesh()),
    ):
        sample.restore(0)
        runs[name] = fit.fit(
            mg, optax.sgd(0.05), jnp.ones(WIDTH), sample, steps=12, mesh=mesh, progress=False,
            log_every=1,
        )  # fmt: skip
    drawn = [
        [[row[f"diagnostics/drawn {o.name}"] for o in OBJECTIVES] for row in run.history]
        for run in runs.values()
    ]
    assert drawn[0] == drawn[1]
    assert np.asarray(drawn[0]).sum(0).min() > 0
    np.testing.assert_allclose(runs["one"].meta, runs["eight"].meta, rtol=1e-5)
    devices = runs["eight"].state.estimator_state.counts.addressable_shards
    assert len(devices) == 8
    for each in devices:
        np.testing.assert_array_equal(each.data, devices[0].data)

    # and inside shard_map, each device by itself
    spec = PartitionSpec()
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    own = jax.shard_map(
        lambda key: methods.draw_objective(learner, learner.init(), key)[0][None],
        mesh=mesh, in_specs=spec, out_specs=PartitionSpec("x"), check_vma=False,
    )  # fmt: skip
    for seed in range(5):
        assert len(set(np.asarray(jax.jit(own)(jax.random.key(seed))).tolist())) == 1


def mixture_case(rows, dtype=float):
    problem = methods.mixture_problem(
        OBJECTIVES, lambda meta: optax.sgd(0.1), rows, jax.random.key(5)
    )
    meta = Mixture(jnp.asarray([0.3, -0.2, 0.5], dtype), jnp.full(WIDTH, 2.0, dtype))
    start = compiled(methods.paired_losses(OBJECTIVES, rows, jax.random.key(5)))(meta.params, None)
    support = jnp.asarray(np.random.default_rng(6).normal(size=(2, 4, WIDTH)), dtype)
    return problem, meta, Episode(Steps(support), start)


@pytest.mark.parametrize("estimator", [jmeta.mixed_mode, jmeta.unrolled])
def test_the_gradient_of_the_mixture_equals_central_differences(x64, rows, estimator):
    problem, meta, episode = mixture_case(rows.astype(float))
    mg, key = estimator(problem, 2), jax.random.key(7)
    estimate = jax.jit(mg.estimate)
    grads, _, _ = estimate(meta, (), episode, key)
    np.testing.assert_array_equal(grads.params, 0)  # where the steps start is a constant
    value = lambda logits: estimate(meta._replace(logits=logits), (), episode, key)[2]  # noqa: E731
    logits = np.asarray(meta.logits)
    for k in range(3):
        bump = 1e-5 * np.eye(3)[k]
        up, down = (value(logits + s * bump).loss for s in (1, -1))
        np.testing.assert_allclose(grads.logits[k], (up - down) / 2e-5, rtol=1e-7, atol=1e-9)


def test_the_gradient_of_one_step_is_the_alignment_of_gradients(x64):
    """Without noise: d(outer)/d(logits_j) = -eta p_j <grad V(theta_1), grad L_j - grad L>."""
    exact = [o._replace(corrupt=lambda rows, key: rows) for o in OBJECTIVES]
    held_out, batch = jnp.ones((2, WIDTH)), jnp.linspace(-1.0, 1.0, 4 * WIDTH).reshape(4, WIDTH)
    params, p = jnp.asarray([0.5, -1.0, 2.0]), jnp.asarray([0.2, 0.3, 0.5])
    measure = methods.mixture_gradients(
        exact, optax.sgd(0.1), held_out, jax.random.key(0), steps=1, batch=4
    )
    found = jax.jit(lambda p: measure(params, None, p, batch, jax.random.key(1)))(p)

    @jax.jit
    def by_hand(params, p):
        gradients = jnp.stack(
            [jax.grad(lambda x, o=o: o.loss(x, batch, None)[0])(params) for o in exact]
        )
        mean = p @ gradients
        start = jnp.stack([o.loss(params, held_out, None)[0] for o in exact])
        outer = jax.grad(
            lambda x: sum(
                o.loss(x, held_out, None)[0] / s for o, s in zip(exact, start, strict=True)
            )
        )(params - 0.1 * mean)
        return -0.1 * p * ((gradients - mean[None]) @ outer)

    np.testing.assert_allclose(found, by_hand(params, p), rtol=0, atol=1e-10)


def test_a_learned_mixture_finds_the_objective_that_serves_the_held_out_one():
    """Held-out losses of all three fall fastest towards the middle one's minimum."""
    rows = jnp.asarray(0.1 * np.random.default_rng(8).normal(size=(16, WIDTH)), jnp.float32)
    measure = methods.mixture_gradients(
        OBJECTIVES, optax.sgd(0.1), rows, jax.random.key(9), steps=2, batch=8
    )
    learner = methods.learned_mixture(3, jmeta.optim.adam(0.2))
    mg = methods.sampled_training(OBJECTIVES, learner, measure, window=2)
    params = jnp.full(WIDTH, 3.0)  # all must go down; "to -2" goes down fastest
    state, step = mg.init(params, None), jax.jit(mg.estimate)
    for at in range(12):
        _, state, _ = step(params, state, Episode(None, rows), jax.random.key(at))
    assert learner.probabilities(state).argmax() == 2
    even = methods.learned_mixture(3, jmeta.optim.adam(0.2), entropy=100.0)
    state = even.update(even.init(), jnp.zeros(3), jnp.zeros(3))
    state = even.update(state, jnp.zeros(3), jnp.array([1.0, 0.0, -1.0]))
    state = even.update(state, jnp.zeros(3), jnp.array([1.0, 0.0, -1.0]))
    free = methods.learned_mixture(3, jmeta.optim.adam(0.2))
    other = free.update(free.init(), jnp.zeros(3), jnp.zeros(3))
    for _ in range(2):
        other = free.update(other, jnp.zeros(3), jnp.array([1.0, 0.0, -1.0]))
    assert even.probabilities(state).max() < free.probabilities(other).max()


def test_mistakes_are_named(rows):
    with pytest.raises(ValueError, match="sampler draws of 2 objectives"):
        methods.sampled_training(OBJECTIVES, methods.uniform_mix(2))
    with pytest.raises(ValueError, match="each with a name of its own"):
        methods.sampled_training([OBJECTIVES[0]] * 2, methods.uniform_mix(2))
    with pytest.raises(ValueError, match="holds no step"):
        methods.sampled_training(OBJECTIVES, methods.uniform_mix(3), window=0)
    with pytest.raises(ValueError, match="there are 16"):
        methods.fresh_losses(OBJECTIVES, rows, 17)
    mg = methods.sampled_training(OBJECTIVES, methods.uniform_mix(3))
    with pytest.raises(ValueError, match="pass a key"):
        mg.estimate(jnp.ones(WIDTH), mg.init(None, None), Episode(None, rows), None)
    measure = methods.mixture_gradients(
        OBJECTIVES, optax.sgd(0.1), rows, jax.random.key(0), steps=3, batch=6
    )
    with pytest.raises(ValueError, match="need 18 rows; the training batch has 16"):
        measure(jnp.ones(WIDTH), None, jnp.ones(3) / 3, rows, jax.random.key(0))
