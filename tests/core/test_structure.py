"""What the programs are made of: matmuls, memory, collectives. Nothing here measures time."""
# ruff: noqa: E731

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jmeta
from jmeta import Episode, Problem
from jmeta.cost import compile_estimate, fast_bytes, flops
from jmeta.testing import relative_error


def network(width=32, batch=128, layers=2):
    """A deep enough network whose activations outweigh its weights."""

    def loss(fast, meta, batch, key):
        x = batch["x"]
        for layer in fast["layers"]:
            x = jnp.tanh(x @ layer)
        return jnp.mean((x - batch["y"]) ** 2), {}

    keys = jax.random.split(jax.random.key(0), layers + 2)
    scale = width**-0.5
    meta = {"layers": [scale * jax.random.normal(k, (width, width)) for k in keys[:layers]]}
    data = {
        "x": jax.random.normal(keys[-2], (batch, width)),
        "y": jax.random.normal(keys[-1], (batch, width)),
    }
    return Problem(loss, loss, lambda meta: optax.sgd(0.1)), meta, Episode(data, data)


def temp(mg, meta, episode):
    return compile_estimate(mg, meta, episode).temp_bytes


@pytest.mark.parametrize("steps", [1, 5])
def test_first_order_costs_fine_tuning_and_one_query_gradient(steps):
    problem, meta, episode = network()

    def fine_tuning(meta, episode):
        loss = lambda fast, batch: problem.inner_loss(fast, None, batch, None)[0]
        step = lambda fast, _: (
            jax.tree.map(lambda f, g: f - 0.1 * g, fast, jax.grad(loss)(fast, episode.support)),
            None,
        )
        fast, _ = jax.lax.scan(step, meta, length=steps)
        return jax.grad(loss)(fast, episode.query)

    mg = jmeta.first_order(problem, steps)
    first = jax.make_jaxpr(lambda m, e: mg.estimate(m, (), e, None)[0])(meta, episode)
    plain = jax.make_jaxpr(fine_tuning)(meta, episode)
    assert flops(plain) > 0
    assert flops(first) <= flops(plain)


def test_mixed_mode_multiplies_little_more_than_reverse():
    problem, meta, episode = network()
    cost = {
        name: flops(jax.make_jaxpr(lambda m, mg=mg: mg.estimate(m, (), episode, None)[0])(meta))
        for name, mg in {
            "mixed": jmeta.mixed_mode(problem, 8),
            "reverse": jmeta.unrolled(problem, 8),
            "step": jmeta.unrolled(problem, 8, remat="step"),
        }.items()
    }
    assert cost["mixed"] <= 1.15 * cost["step"]
    assert cost["mixed"] <= 1.4 * cost["reverse"]


def test_mixed_mode_needs_less_memory_than_reverse():
    problem, meta, episode = network()
    mixed = temp(jmeta.mixed_mode(problem, 8), meta, episode)
    reverse = temp(jmeta.unrolled(problem, 8), meta, episode)
    stepwise = temp(jmeta.unrolled(problem, 8, remat="step"), meta, episode)
    assert mixed < 0.35 * reverse
    assert mixed < stepwise


def test_kept_products_are_not_multiplied_again():
    # Of the eleven products of a weight in a step (three of them forwards, eight backwards) two
    # are repetitions: the activations and their cotangents. Kept, they cost what they weigh.
    problem, meta, episode = network(width=32, batch=128)
    steps, layers = 8, 2
    plain = jmeta.mixed_mode(problem, steps)
    kept = jmeta.mixed_mode(problem, steps, keep=jmeta.keep_products())
    work = {
        mg: flops(jax.make_jaxpr(lambda m, mg=mg: mg.estimate(m, (), episode, None)[0])(meta))
        for mg in (plain, kept)
    }
    product = 2 * 128 * 32 * 32
    # The cotangent of the input is never computed: of two layers one goes backwards.
    saved = steps * product * (layers + layers - 1)
    assert work[plain] - work[kept] == pytest.approx(saved, rel=0.1)
    held = steps * (layers + layers - 1) * 128 * 32 * 4
    assert temp(kept, meta, episode) - temp(plain, meta, episode) <= 1.3 * held


def test_mixed_mode_memory_grows_by_the_fast_weights_and_nested_by_less():
    problem, meta, episode = network()
    size = fast_bytes(problem, meta)
    short = temp(jmeta.mixed_mode(problem, 16), meta, episode)
    long = temp(jmeta.mixed_mode(problem, 64), meta, episode)
    assert (long - short) / 48 <= 1.1 * size
    nested = temp(jmeta.mixed_mode(problem, 64, remat="nested"), meta, episode)
    assert nested <= 0.4 * long


@pytest.mark.parametrize(("steps", "again"), [(8, 3), (16, 9), (13, 8)])
def test_nested_runs_again_what_is_neither_last_in_its_block_nor_in_the_last_block(steps, again):
    problem, meta, episode = network(width=32, batch=128)

    def work(mg):
        return flops(jax.make_jaxpr(lambda m: mg.estimate(m, (), episode, None)[0])(meta))

    whole, nested = (work(jmeta.mixed_mode(problem, steps, remat=r)) for r in ("step", "nested"))
    one = work(jmeta.first_order(problem, 2)) - work(jmeta.first_order(problem, 1))
    assert nested - whole == pytest.approx(again * one, rel=0.02)


def test_a_rounded_trajectory_grows_by_half_the_fast_weights():
    problem, meta, episode = network()
    size = fast_bytes(problem, meta)
    short, long = (
        temp(jmeta.mixed_mode(problem, steps, remat="rounded"), meta, episode) for steps in (16, 64)
    )
    assert (long - short) / 48 <= 0.55 * size


def test_a_rounded_trajectory_keeps_the_moments_whole():
    # Second moments of 1e-10 are nothing in half precision, and a step would divide by them.
    problem, meta, episode = network()
    adam = problem._replace(optimizer=lambda meta: jmeta.optim.adam(1e-2))
    run = lambda mg: jax.jit(lambda m: mg.estimate(m, (), episode, None)[0])(meta)
    exact = run(jmeta.mixed_mode(adam, 6))
    assert relative_error(run(jmeta.mixed_mode(adam, 6, remat="rounded")), exact) < 2e-4


def test_mixed_mode_stores_no_data_for_its_steps():
    # Meta-parameters that the inner loss never reads and a large batch: neither is kept per step.
    problem, meta, episode = network(width=16, batch=512)
    wide = problem._replace(
        init=lambda meta, key: meta["net"],
        outer_loss=lambda fast, meta, batch, key: (
            problem.outer_loss(fast, None, batch, key)[0] + jnp.sum(meta["unread"] ** 2),
            {},
        ),
    )
    meta = {"net": meta, "unread": jnp.ones(100_000)}
    short = temp(jmeta.mixed_mode(wide, 8), meta, episode)
    long = temp(jmeta.mixed_mode(wide, 40), meta, episode)
    assert (long - short) / 32 <= 1.1 * fast_bytes(wide, meta)


def test_first_order_memory_does_not_grow_with_the_steps():
    problem, meta, episode = network()
    short = temp(jmeta.first_order(problem, 8), meta, episode)
    long = temp(jmeta.first_order(problem, 64), meta, episode)
    assert long - short <= 64 * 56  # a few scalars per step: the losses


def test_forward_mode_memory_does_not_grow_with_the_steps():
    problem, net, episode = network(width=8, batch=16)
    rate = problem._replace(
        optimizer=lambda meta: optax.sgd(meta["rate"]), init=lambda meta, key: net
    )
    meta = {"rate": jnp.asarray(0.1)}
    short = temp(jmeta.forward(rate, 10), meta, episode)
    long = temp(jmeta.forward(rate, 1000), meta, episode)
    assert long - short <= 990 * 2 * 4  # the inner losses that Info reports


def test_a_microbatch_needs_less_memory_than_all_tasks_at_once():
    problem, meta, episode = network()
    episodes = jax.tree.map(lambda x: jnp.stack([x] * 8), episode)
    mg = jmeta.mixed_mode(problem, 4)
    everything = temp(jmeta.over_tasks(mg), meta, episodes)
    two = temp(jmeta.over_tasks(mg, microbatch=2), meta, episodes)
    four = temp(jmeta.over_tasks(mg, microbatch=4), meta, episodes)
    assert two < four < everything
    assert two < 0.4 * everything


@pytest.mark.parametrize("name", ["mixed_mode", "first_order"])
def test_eight_devices_equal_one_and_reduce_once(name):
    problem, meta, _ = network(width=8, batch=4)
    keys = jax.random.split(jax.random.key(3), 4)
    draw = lambda k: jax.random.normal(k, (8, 4, 8))
    episodes = Episode(
        {"x": draw(keys[0]), "y": draw(keys[1])}, {"x": draw(keys[2]), "y": draw(keys[3])}
    )
    mg = jmeta.over_tasks(getattr(jmeta, name)(problem, 3))
    init, step = jmeta.meta_trainer(mg, optax.sgd(0.5))
    single = step(init(meta, jax.random.key(0)), episodes)[0].meta

    mesh = jax.make_mesh((8,), ("tasks",), axis_types=(AxisType.Auto,))
    state = init(meta, jax.random.key(0))
    everywhere = NamedSharding(mesh, PartitionSpec())
    state = jax.tree.map(lambda x: jax.device_put(x, everywhere), state)
    spread = jax.device_put(episodes, NamedSharding(mesh, PartitionSpec("tasks")))
    grads = jax.jit(lambda m, e: mg.estimate(m, (), e, None)[0])
    text = grads.lower(state.meta, spread).compile().as_text()
    eight = step(state, spread)[0].meta
    assert relative_error(eight, jax.device_put(single, everywhere)) < 1e-6
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(eight))

    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"^.* = .*\b({kinds})(?:-start)?\(", text, re.M)
    # One reduction for the outer step, however many leaves meta has and steps the loop makes;
    # a backend may still split it by leaf, but nothing is communicated inside the inner loop.
    assert set(found) == {"all-reduce"}, found
    assert len(found) <= len(jax.tree.leaves(meta)), found


def test_communication_does_not_grow_with_the_inner_steps():
    problem, meta, _ = network(width=8, batch=4)
    data = jax.random.normal(jax.random.key(3), (8, 4, 8))
    episodes = Episode({"x": data, "y": data}, {"x": data, "y": data})
    mesh = jax.make_mesh((8,), ("tasks",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(episodes, NamedSharding(mesh, PartitionSpec("tasks")))
    counts = []
    for steps in (1, 6):
        mg = jmeta.over_tasks(jmeta.mixed_mode(problem, steps))
        run = jax.jit(lambda m, e, mg=mg: mg.estimate(m, (), e, None)[0])
        text = run.lower(meta, spread).compile().as_text()
        # Inside a loop body a collective would stand in another computation than ENTRY.
        entry = text[text.index("ENTRY") :]
        counts.append(text.count(" all-reduce("))
        assert counts[-1] == entry.count(" all-reduce(")
    assert counts[0] == counts[1] > 0
