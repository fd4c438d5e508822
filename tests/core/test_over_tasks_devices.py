"""Tasks over devices: one reduction per outer step, and the shard_map trap, shown and refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jmeta
from benchmarks.tpu_reductions import ESTIMATORS, EXAMPLES, STEPS, WIDTH, loss
from jmeta import Episode, Problem
from jmeta.cost import collectives, compile_estimate
from jmeta.testing import relative_error

TASKS, RATE = 16, 0.1


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def meta():
    rng = np.random.default_rng(0)
    return {"up": normal(rng, WIDTH, 7), "down": normal(rng, 7)}


@pytest.fixture(scope="module")
def episodes():
    def data(seed):
        x = normal(np.random.default_rng(seed), TASKS, EXAMPLES, WIDTH)
        return {"x": x, "y": jnp.asarray(np.sin(3 * np.asarray(x)).sum(-1))}

    return Episode(data(1), data(2))


@pytest.fixture(scope="module")
def right(meta, episodes):
    """The meta-gradient of plain JAX on one device."""
    return jax.jit(jax.grad(by_hand))(meta, episodes)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("tasks", "fsdp"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("microbatch", [pytest.param(None, marks=pytest.mark.slow), 1])
@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_gradients_are_reduced_once_and_nothing_inside_a_loop(
    name, microbatch, meta, episodes, mesh
):
    mg = jmeta.over_tasks(ESTIMATORS[name](), tasks=TASKS, microbatch=microbatch)
    key = jax.random.key(3)
    state = jax.jit(mg.init)(meta, key)
    split = NamedSharding(mesh, PartitionSpec(("tasks", "fsdp")))
    everywhere = NamedSharding(mesh, PartitionSpec())
    placed = (
        jax.device_put(meta, everywhere),
        jax.device_put(state, split),
        jax.device_put(episodes, split),
        jax.device_put(key, everywhere),
    )
    with jax.set_mesh(mesh):
        program = jax.jit(mg.estimate, out_shardings=(everywhere, split, everywhere))
        compiled = program.lower(*placed).compile()
    if microbatch == 1:
        single = jax.jit(mg.estimate)(meta, state, episodes, key)
        for one, eight in zip(
            jax.tree.leaves(single), jax.tree.leaves(compiled(*placed)), strict=True
        ):
            np.testing.assert_allclose(eight, one, rtol=3e-5, atol=1e-6)
    found = collectives(compiled.as_text())
    assert not [each for each in found if each.looped], found
    assert {each.kind for each in found} == {"all-reduce"}, found
    arrays = [shape for each in found for shape in each.shapes if not shape.endswith("[]")]
    gradients = sorted(f"f32[{','.join(map(str, m.shape))}]" for m in jax.tree.leaves(meta))
    assert sorted(arrays) == sorted([*gradients, f"f32[{STEPS}]"]), arrays  # and the inner losses


def test_every_device_accumulates_only_its_own_tasks(meta, episodes, mesh):
    mg = jmeta.over_tasks(ESTIMATORS["mixed_mode"](), microbatch=1)
    split = jax.device_put(episodes, NamedSharding(mesh, PartitionSpec(("tasks", "fsdp"))))
    with jax.set_mesh(mesh):
        text = jax.jit(mg.estimate).lower(meta, (), split, None).compile().as_text()
    assert f'"n":"{TASKS // 8}"' in text  # the loop over a device's own tasks
    assert f'"n":"{TASKS}"' not in text


def test_tasks_that_the_mesh_does_not_divide_are_an_error(meta, episodes, mesh):
    mg = jmeta.over_tasks(ESTIMATORS["first_order"](), microbatch=2)
    some = jax.tree.map(lambda x: np.asarray(x)[:12], episodes)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"12 episodes .* over 8 devices"):
        jax.jit(mg.estimate)(meta, (), some, None)
    three = jmeta.over_tasks(ESTIMATORS["first_order"](), microbatch=3)
    many = jax.tree.map(lambda x: np.concatenate([x, x]), episodes)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="divide the 4 episodes of each of 8"):
        jax.jit(three.estimate)(meta, (), many, None)


def test_a_microbatch_of_one_needs_less_memory_than_one_of_two():
    # With a mapped axis of length one XLA laid all episodes out anew, at twice the memory of two.
    def deep(fast, meta, batch, key):
        x = batch["x"]
        for layer in fast:
            x = jnp.tanh(x @ layer)
        return jnp.mean((x - batch["y"]) ** 2), {}

    problem = Problem(deep, deep, lambda meta: optax.sgd(0.1))
    data = normal(np.random.default_rng(0), 8, 128, 32)
    batched = Episode({"x": data, "y": data}, {"x": data, "y": data})
    layers = [np.eye(32, dtype=np.float32)] * 2

    def temp(microbatch):
        mg = jmeta.over_tasks(jmeta.mixed_mode(problem, 4), microbatch=microbatch)
        return compile_estimate(mg, layers, batched).temp_bytes

    assert temp(1) < 0.6 * temp(2)


# --- the trap: shard_map sums the gradients of replicated weights, the inner ones too ------------


def by_hand(meta, episodes):
    """MAML without jmeta: the mean outer loss over a batch of tasks."""

    def one(support, query):
        def step(fast, _):
            grads = jax.grad(lambda f: loss(f, {}, support, None)[0])(fast)
            return jax.tree.map(lambda f, g: f - RATE * g, fast, grads), None

        fast, _ = jax.lax.scan(step, meta, length=STEPS)
        return loss(fast, {}, query, None)[0]

    return jnp.mean(jax.vmap(one)(episodes.support, episodes.query))


def estimated(meta, episodes):
    """The meta-gradient of jmeta, of the tasks at hand."""
    problem = Problem(
        lambda fast, meta, batch, key: loss(fast, {}, batch, key),
        lambda fast, meta, batch, key: loss(fast, {}, batch, key),
        lambda meta: optax.sgd(RATE),
    )
    return jmeta.over_tasks(jmeta.mixed_mode(problem, STEPS), microbatch=1).estimate(
        meta, (), episodes, None
    )[0]


@pytest.fixture(scope="module")
def line():
    return jax.make_mesh((8,), ("tasks",), axis_types=(AxisType.Auto,))


def shard_map(function, mesh, **options):
    specs = (PartitionSpec(), PartitionSpec("tasks"))
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), **options)
    )


def mean(tree):
    return jax.lax.pmean(tree, "tasks")


def varying(tree):
    return jax.lax.pcast(tree, "tasks", to="varying")


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_plain_jax_inside_shard_map_is_silently_wrong(meta, episodes, line, right):
    right = flat(right)
    wrong = {
        "B": shard_map(lambda m, e: mean(jax.grad(by_hand)(m, e)), line),
        "C": shard_map(lambda m, e: jax.tree.map(lambda g: g / 8, jax.grad(by_hand)(m, e)), line),
        "F": jax.grad(shard_map(lambda m, e: mean(by_hand(m, e)), line)),
    }
    for name, function in wrong.items():
        grads = flat(jax.jit(function)(meta, episodes))
        lengths = np.linalg.norm(grads), np.linalg.norm(right)
        cosine = grads @ right / (lengths[0] * lengths[1])
        assert lengths[0] > 13 * lengths[1], name
        assert cosine < 0.5, name


def test_the_right_forms_are_right_in_plain_jax(meta, episodes, line, right):
    forms = {
        "A": jax.jit(jax.grad(by_hand)),
        "D": shard_map(lambda m, e: mean(jax.grad(by_hand)(varying(m), e)), line),
        "E": shard_map(lambda m, e: mean(jax.grad(by_hand)(m, e)), line, check_vma=False),
        "G": jax.jit(jax.grad(shard_map(lambda m, e: mean(by_hand(varying(m), e)), line))),
    }
    split = jax.device_put(episodes, NamedSharding(line, PartitionSpec("tasks")))
    for name, function in forms.items():
        assert relative_error(function(meta, split), right) < 1e-5, name


def test_jmeta_refuses_the_wrong_form_and_gives_the_right_ones(meta, episodes, line, right):
    with pytest.raises(ValueError, match=r"pcast\(meta, 'tasks', to='varying'\).*NamedSharding"):
        shard_map(lambda m, e: mean(estimated(m, e)), line)(meta, episodes)
    forms = {
        "D": shard_map(lambda m, e: mean(estimated(varying(m), e)), line),
        "E": shard_map(lambda m, e: mean(estimated(m, e)), line, check_vma=False),
    }
    split = jax.device_put(episodes, NamedSharding(line, PartitionSpec("tasks")))
    for name, function in forms.items():
        assert relative_error(function(meta, split), right) < 1e-5, name


@pytest.mark.parametrize("remat", ["none", "step", "nested"])
def test_the_right_form_is_right_however_steps_are_kept(remat, meta, episodes, line):
    # The momentum after the last step is not read: its cotangent is a zero that jax makes up.
    problem = Problem(loss, loss, lambda meta: optax.sgd(RATE, momentum=0.9))
    mg = jmeta.over_tasks(jmeta.mixed_mode(problem, STEPS, remat=remat), microbatch=1)
    grads = lambda m, e: mg.estimate(m, (), e, None)[0]  # noqa: E731
    found = shard_map(lambda m, e: mean(grads(varying(m), e)), line)(meta, episodes)
    assert relative_error(found, jax.jit(grads)(meta, episodes)) < 1e-5


def test_keys_that_differ_between_devices_are_data(meta, episodes, line):
    def noisy(fast, meta, batch, key):
        return loss(fast, meta, batch | {"y": jax.random.normal(key, (EXAMPLES,))}, None)

    mg = jmeta.mixed_mode(Problem(noisy, noisy, lambda meta: optax.sgd(RATE)), STEPS)
    episode = jax.tree.map(lambda x: np.asarray(x)[0], episodes)
    estimate = lambda m, keys: mean(mg.estimate(m, (), episode, keys[0])[0])  # noqa: E731
    with pytest.raises(ValueError, match="sum the gradient of every inner step"):
        jax.eval_shape(shard_map(estimate, line), meta, jax.random.split(jax.random.key(0), 8))


def test_pmap_gives_the_right_gradient(meta, episodes, right):
    shaped = jax.tree.map(lambda x: np.asarray(x).reshape(8, TASKS // 8, *x.shape[1:]), episodes)
    parallel = jax.pmap(
        lambda m, e: mean(estimated(m, e)), axis_name="tasks", in_axes=(None, 0), out_axes=None
    )
    assert relative_error(parallel(meta, shaped), right) < 1e-5


@pytest.mark.parametrize("name", [n for n in ESTIMATORS if n != "persistent"])
def test_every_estimator_refuses_replicated_weights(name, meta, episodes, line):
    mg = jmeta.over_tasks(ESTIMATORS[name]())
    estimate = lambda m, e: mean(mg.estimate(m, (), e, jax.random.key(0))[0])  # noqa: E731
    with pytest.raises(ValueError, match="sum the gradient of every inner step"):
        jax.eval_shape(shard_map(estimate, line), meta, episodes)
