"""What the programs are made of: matmuls, memory, collectives. Nothing here measures time."""
# ruff: noqa: E731

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jmeta
from jmeta import Episode, Problem
from jmeta.cost import compile_estimate, fast_bytes, flops
from jmeta.models import transformer
from jmeta.testing import equations, relative_error


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def network(width=32, batch=128, layers=2):
    """A deep enough network whose activations outweigh its weights."""

    def loss(fast, meta, batch, key):
        x = batch["x"]
        for layer in fast["layers"]:
            x = jnp.tanh(x @ layer)
        return jnp.mean((x - batch["y"]) ** 2), {}

    rng = np.random.default_rng(0)
    meta = {"layers": [normal(rng, width, width) * np.float32(width**-0.5) for _ in range(layers)]}
    data = {"x": normal(rng, batch, width), "y": normal(rng, batch, width)}
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
    # Second moments of 1e-10 are nothing in half precision, and a step would divide by them. Every
    # gradient is far from zero, where Adam would amplify the rounding of the weights themselves.
    def pulled(fast, meta, batch, key):
        return 1e-5 * jnp.sum((jnp.tanh(fast) - batch) ** 2), {}

    def scored(fast, meta, batch, key):
        return jnp.sum((fast - batch) ** 2), {}

    meta = np.random.default_rng(0).uniform(-0.5, 0.5, 64).astype(np.float32)
    problem = Problem(pulled, scored, lambda meta: jmeta.optim.adam(1e-2))
    episode = Episode(np.full_like(meta, 2.0), np.zeros_like(meta))

    def run(**options):
        mg = jmeta.mixed_mode(problem, 6, **options)
        return jax.jit(lambda m: mg.estimate(m, (), episode, None)[0])(meta)

    assert relative_error(run(remat="rounded"), run()) < 1e-6


@pytest.mark.parametrize("name", ["mixed_mode", "unrolled"])
def test_an_offloaded_trajectory_is_on_the_host_and_another_is_not(name):
    problem, meta, episode = network(width=4, batch=3)
    steps, host = 5, jax.memory.Space.Host

    def kept_on_the_host(remat):
        mg = getattr(jmeta, name)(problem, steps, remat=remat)
        jaxpr = jax.make_jaxpr(lambda m: mg.estimate(m, (), episode, None)[0])(meta)
        outs = [v.aval for eqn in equations(jaxpr) if eqn.primitive.name == "scan"
                for v in eqn.outvars]  # fmt: skip
        return [aval.shape for aval in outs if getattr(aval, "memory_space", None) == host]

    assert kept_on_the_host("step") == []
    # A set of weights for every step: the two layers, and nothing else of a step.
    assert kept_on_the_host("offload") == [(steps, 4, 4)] * 2


def floors(layers, steps):
    """``{estimator: FLOPs}`` over those of a forward pass, for a deep network."""
    problem, meta, episode = network(width=8, batch=16, layers=layers)
    forward = layers * 2 * 16 * 8 * 8
    made = {
        "first_order": jmeta.first_order(problem, steps),
        "unrolled": jmeta.unrolled(problem, steps),
        "mixed_mode": jmeta.mixed_mode(problem, steps, remat="step"),
    }
    return {
        name: flops(jax.make_jaxpr(lambda m, mg=mg: mg.estimate(m, (), episode, None)[0])(meta))
        / forward
        for name, mg in made.items()
    }


def test_the_work_is_three_nine_and_twelve_forward_passes_a_step():
    # And three for the query. A first layer's input has no cotangent, nor has its tangent one.
    steps = 4
    for name, work in floors(layers=12, steps=steps).items():
        passes = {"first_order": 3, "unrolled": 9, "mixed_mode": 12}[name]
        assert work == pytest.approx(passes * steps + 3, rel=0.12), name


def scanned_decoder(blocks, make, **options):
    """Temporaries of two inner steps; long texts outweigh the weights of a narrow decoder."""
    size = transformer.TransformerConfig(
        vocab=8, width=8, layers=4, heads=1, max_len=64, loop="scan", remat=blocks
    )
    loss = lambda fast, meta, batch, key: transformer.next_token_loss(size, fast, batch, key=key)
    # The temporaries are those of the inner steps, so the query's loss need not be the decoder's.
    outer = lambda fast, *_: (sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(fast)), {})
    problem = Problem(loss, outer, lambda meta: optax.sgd(0.1))
    meta = jax.eval_shape(lambda key: transformer.init(size, key), jax.random.key(0))
    text = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    return temp(make(problem, 2, **options), meta, Episode(text, text))


def test_rematerialised_blocks_need_less_memory():
    plain, full = (scanned_decoder(b, jmeta.mixed_mode, remat="step") for b in ("none", "full"))
    assert full < 0.3 * plain


@pytest.mark.slow
def test_blocks_that_keep_their_products_lie_between_and_all_below_reverse_mode():
    plain, dots, full = (
        scanned_decoder(blocks, jmeta.mixed_mode, remat="step")
        for blocks in ("none", "dots", "full")
    )
    reverse = scanned_decoder("none", jmeta.unrolled)
    assert full < dots < 0.5 * plain
    assert plain < 0.3 * reverse
    assert full < 0.08 * reverse


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
    episodes = jax.tree.map(lambda x: np.stack([x] * 8), episode)
    mg = jmeta.mixed_mode(problem, 4)
    everything = temp(jmeta.over_tasks(mg), meta, episodes)
    two = temp(jmeta.over_tasks(mg, microbatch=2), meta, episodes)
    four = temp(jmeta.over_tasks(mg, microbatch=4), meta, episodes)
    assert two < four < everything
    assert two < 0.4 * everything


@pytest.mark.parametrize("name", ["mixed_mode", "first_order"])
def test_eight_devices_equal_one_and_reduce_once(name):
    problem, meta, _ = network(width=8, batch=4)
    rng = np.random.default_rng(3)
    draw = lambda: {"x": normal(rng, 8, 4, 8), "y": normal(rng, 8, 4, 8)}
    episodes = Episode(draw(), draw())
    mg = jmeta.over_tasks(getattr(jmeta, name)(problem, 3))
    init, step = map(jax.jit, jmeta.meta_trainer(mg, optax.sgd(0.5)))
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
    data = normal(np.random.default_rng(3), 8, 4, 8)
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
