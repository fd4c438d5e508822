"""Meshes and rules, states that lie as their parameters, and one device equal to eight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from quick_numbers import relative_error

import jmeta
from jmeta import Episode, Problem
from jmeta.core.tree import names
from jmeta.cost import collectives
from jmeta.models import bert, conv, gpt2, lora, masked_lm, mlp, teacher_lm, transformer
from jmeta.runtime import checkpoint, parallel
from jmeta.runtime.config import RunConfig, parse
from jmeta.runtime.fit import fit, from_function
from jmeta.runtime.parallel import MeshConfig, make_mesh, shardings

TASKS, WIDTH = 16, 8


def loss(fast, meta, batch, key):
    """A regression with input noise from the key, so that a key that moves is seen."""
    x = batch["x"]
    if key is not None:
        x = x + 0.1 * jax.random.normal(key, x.shape, x.dtype)
    error = mlp.apply(fast, x, jnp.tanh) - batch["y"]
    return jnp.mean(error**2), {"error": jnp.mean(jnp.abs(error))}


PROBLEM = Problem(loss, loss, lambda meta: optax.sgd(0.1))
SIZES = (4, WIDTH, WIDTH, 1)


def draw(step):
    """A batch of tasks as a host makes it: a pure function of the step."""
    rng = np.random.default_rng(step)

    def data():
        x = rng.normal(size=(TASKS, 6, 4))
        return {"x": x, "y": np.sin(x.sum(-1, keepdims=True))}

    return as_default(Episode(data(), data()))


def as_default(tree):
    kind = np.float64 if jax.config.jax_enable_x64 else np.float32
    return jax.tree.map(lambda leaf: leaf.astype(kind), tree)


def random_like(tree, spread):
    """Values for the shapes of a model: scales around one, all else around zero."""
    rng = np.random.default_rng(1)

    def draw_leaf(path, leaf):
        return (path[-1].key == "scale") + spread(leaf) * rng.normal(size=leaf.shape)

    return as_default(jax.tree_util.tree_map_with_path(draw_leaf, tree))


def start():
    he = lambda leaf: (2 / leaf.shape[0]) ** 0.5 if leaf.ndim > 1 else 0.0  # noqa: E731
    return random_like(MODELS["mlp"][0], he)


def initial(mg, outer):
    """The state of a trainer, from one program."""
    return jax.jit(jmeta.meta_trainer(mg, outer).init)(start(), jax.random.key(0))


def run(config, outer, devices=8, microbatch=1, steps=20, mg=None, **options):
    mg = mg or jmeta.over_tasks(jmeta.mixed_mode(PROBLEM, 3), microbatch=microbatch)
    if config is not None:
        options |= {"mesh": make_mesh(config, jax.devices()[:devices]), "rules": parallel.mlp(3)}
    return fit(
        mg, outer, start(), from_function(draw), steps=steps, log_every=1, progress=False, **options
    )


def losses(result):
    return np.asarray([row["loss"] for row in result.history])


def on_host(tree):
    return jax.tree.map(np.asarray, tree)


# --- meshes ---------------------------------------------------------------------------------------


def test_a_mesh_takes_what_is_left():
    mesh = make_mesh(MeshConfig(fsdp=2))
    assert dict(mesh.shape) == {"tasks": 4, "fsdp": 2, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert make_mesh(MeshConfig(tasks=1, tensor=-1)).shape["tensor"] == 8
    assert make_mesh(MeshConfig(), jax.devices()[:2]).devices.size == 2


def test_devices_that_tasks_cannot_be_split_over_repeat_their_work():
    assert make_mesh(MeshConfig()) == parallel.mesh_for(TASKS)
    with pytest.warns(UserWarning, match="12 tasks .* over 8 devices: only 4 work.*multiple of 8"):
        mesh = parallel.mesh_for(12)
    assert dict(mesh.shape) == {"tasks": 4, "fsdp": 1, "tensor": 2}
    x = parallel.shard_episodes(mesh, np.arange(12))
    assert [shard.data.tolist() for shard in x.addressable_shards[:3]] == [
        [0, 1, 2],
        [0, 1, 2],
        [3, 4, 5],
    ]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MeshConfig(tasks=3), "tasks=3 x fsdp=1 x tensor=1 needs 3 devices, and there are 8"),
        (MeshConfig(fsdp=3), "needs a multiple of 3 devices, and there are 8"),
        (MeshConfig(fsdp=16), "needs a multiple of 16 devices"),
        (MeshConfig(fsdp=-1), "one may be -1; got tasks=-1 x fsdp=-1"),
        (MeshConfig(tasks=0), "positive"),
    ],
)
def test_sizes_that_do_not_make_a_mesh(config, words):
    with pytest.raises(ValueError, match=words):
        make_mesh(config)


def test_a_mesh_is_configured_from_the_command_line():
    @dataclasses.dataclass(frozen=True)
    class Config(RunConfig):
        mesh: MeshConfig = MeshConfig()  # noqa: RUF009  (frozen)

    config = parse(Config, ["--mesh.fsdp", "4", "--mesh.tensor", "2"])
    assert dict(make_mesh(config.mesh).shape) == {"tasks": 1, "fsdp": 4, "tensor": 2}


# --- rules ----------------------------------------------------------------------------------------


def shapes(init, *args):
    return jax.eval_shape(lambda key: init(*args, key), jax.random.key(0))


SHAPE = {"vocab": 12, "width": 8, "layers": 3, "heads": 2, "max_len": 5}
ENCODER = masked_lm.config(**SHAPE)
MODELS = {
    "transformer": (shapes(transformer.init, transformer.TransformerConfig(**SHAPE)), None),
    **{
        f"gpt2 {head}": (shapes(gpt2.init, gpt2.GPT2Config(**SHAPE, head=head)), None)
        for head in ("causal_lm", "classify", "spans")
    },
    **{
        f"bert {head}": (shapes(bert.init, bert.BertConfig(**SHAPE, head=head)), None)
        for head in ("masked_lm", "classify", "spans")
    },
    "lora": (shapes(lambda key: lora.init(bert.init(bert.BertConfig(**SHAPE), key), key, 4)), None),
    "masked_lm": (shapes(masked_lm.init, ENCODER), None),
    "teacher": (shapes(teacher_lm.init_teacher, ENCODER), None),
    "scorer": (shapes(teacher_lm.init_scorer, ENCODER), None),
    "conv": (shapes(lambda key: conv.init(key, classes=5, filters=8)), parallel.CONV),
    "mlp": (shapes(lambda key: mlp.init(key, SIZES)), parallel.mlp(3)),
    "mlp of one": (shapes(lambda key: mlp.init(key, (3, 5))), parallel.mlp(1)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_rules_of_a_model_place_every_leaf(name):
    tree, rules = MODELS[name]
    rules = rules or parallel.TRANSFORMER
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    layout = shardings(mesh, {"net": tree}, rules)  # wherever in meta the network is
    whole = split = 0
    for leaf, place, path in zip(
        jax.tree.leaves(tree), jax.tree.leaves(layout), names(tree), strict=True
    ):
        if path.startswith("blocks.") and place.spec:
            assert place.spec[0] is None, path  # the loop over layers slices this axis
        assert "tasks" not in str(place.spec), path
        if leaf.ndim > 1:
            whole += leaf.size
            split += np.prod(place.shard_shape(leaf.shape))
    assert split <= whole * (1 if name == "mlp of one" else 0.5)


def test_tensor_rules_split_columns_and_then_rows():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    blocks = shardings(mesh, MODELS["bert masked_lm"][0], parallel.TRANSFORMER)["blocks"]
    for first, second in (("attn.query", "attn.out"), ("mlp.up", "mlp.down")):
        columns, rows = ({"b": blocks}, {"b": blocks})
        for part in ("b", *first.split(".")):
            columns = columns[part]
        for part in ("b", *second.split(".")):
            rows = rows[part]
        assert columns["kernel"].spec == P(None, "fsdp", "tensor")
        assert columns["bias"].spec == P(None, "tensor")
        assert rows["kernel"].spec == P(None, "tensor", "fsdp")
        assert rows["bias"].spec == P()


def test_the_first_rule_that_matches_counts_and_scalars_need_none():
    tree = {"head": {"kernel": jnp.ones((4, 6))}, "rate": jnp.ones(())}
    rules = [("head.*", P("fsdp")), ("**.kernel", P(None, "fsdp"))]
    layout = shardings(make_mesh(MeshConfig(fsdp=2)), tree, rules)
    assert layout["head"]["kernel"].spec == P("fsdp")
    assert layout["rate"].spec == P()


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ([("other", P())], r"no rule .* 'body\.w' of shape \(6, 8\).*\('body\.w', PartitionSpec"),
        ([("**", P("fsdp"))], r"dimension 0 .* 'body\.w' of shape \(6, 8\).*evenly over fsdp=4"),
        ([("**", P(None, ("fsdp", "tensor")))], None),
        ([("**", P(("tasks", "fsdp")))], r"evenly over tasks=1 x fsdp=4"),
        ([("**", P("model"))], r"names the mesh axis 'model'; there are tasks, fsdp, tensor"),
        ([("**", P(None, None, "fsdp"))], r"'body\.w' .* shape \(6, 8\)"),
    ],
)
def test_rules_that_do_not_fit_name_leaf_dimension_and_axis(rules, words):
    mesh, tree = make_mesh(MeshConfig(tasks=1, fsdp=4, tensor=2)), {"body": {"w": np.ones((6, 8))}}
    if words is None:
        assert shardings(mesh, tree, rules)["body"]["w"].shard_shape((6, 8)) == (6, 1)
        return
    with pytest.raises(ValueError, match=words):
        shardings(mesh, tree, rules)


def test_states_lie_as_their_parameters_do():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    outer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(optax.adam(0.1), {f"layer{i}": True for i in range(3)}),
        optax.adafactor(0.1, min_dim_size_to_factor=4),
    )
    mg = jmeta.over_tasks(
        jmeta.mixed_mode(PROBLEM._replace(optimizer=lambda m: optax.adam(0.1)), 2, persistent=True),
        tasks=TASKS,
    )
    state = initial(mg, outer)
    layout = parallel.state_shardings(mesh, state, parallel.mlp(3))
    by_name = dict(zip(names(state), jax.tree.leaves(layout), strict=True))
    sizes = dict(zip(names(state), jax.tree.leaves(state), strict=True))
    hidden = P("tensor", "fsdp")
    assert by_name["meta.layer1.kernel"].spec == hidden
    moments = [n for n in by_name if n.startswith("opt_state") and n.endswith("layer1.kernel")]
    for name in moments:
        whole = sizes[name].shape == (WIDTH, WIDTH)
        assert by_name[name].spec == (hidden if whole else P()), name
    assert len([n for n in moments if ".mu." in n or ".nu." in n]) == 2
    assert by_name["step"].spec == by_name["key"].spec == P()
    students = {n: s for n, s in by_name.items() if n.startswith("estimator_state")}
    assert all(s.spec[0] == ("tasks", "fsdp") for s in students.values())
    # A task's own weights are whole along fsdp, which its tasks use, and split along tensor.
    assert by_name["estimator_state.fast.layer1.kernel"].spec == P(
        ("tasks", "fsdp"), "tensor", None
    )
    parallel.shard_state(mesh, state, parallel.mlp(3))


# --- the step -------------------------------------------------------------------------------------


def test_gradients_leave_the_step_sharded_and_the_state_is_donated():
    mesh = make_mesh(MeshConfig(fsdp=4))
    outer = optax.adam(0.01)
    mg = jmeta.over_tasks(jmeta.first_order(PROBLEM, 3), microbatch=1)
    state = initial(mg, outer)
    step = parallel.sharded_step(mg, outer, mesh, state, parallel.mlp(3))
    layout = parallel.state_shardings(mesh, state, parallel.mlp(3))
    shaped = (
        parallel.abstract(state, layout),
        parallel.abstract(draw(0), parallel.task_sharding(mesh)),
    )
    compiled = step.lower(*shaped).compile()
    found = collectives(compiled.as_text())
    assert not any(each.looped for each in found), found

    gradients = parallel.sharded(mg, mesh, parallel.mlp(3)).estimate
    grads = jax.jit(lambda m, e: gradients(m, (), e, None)[0])(state.meta, draw(0))
    kernel = grads["layer1"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (WIDTH, WIDTH // 4)

    before = parallel.shard_state(mesh, state, parallel.mlp(3))
    after, info = step(before, parallel.shard_episodes(mesh, draw(0)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert all(
        leaf.sharding.is_equivalent_to(place, leaf.ndim)
        for leaf, place in zip(jax.tree.leaves(after), jax.tree.leaves(layout), strict=True)
    )
    assert info.loss.sharding.is_fully_replicated
    expected = jax.jit(jmeta.meta_trainer(mg, outer).step)(state, draw(0))[0]
    assert relative_error(on_host(after.meta), on_host(expected.meta)) < 1e-5


def test_a_transformer_split_four_ways_takes_the_same_step():
    config = transformer.TransformerConfig(**SHAPE | {"layers": 2}, loop="scan")
    language = lambda fast, meta, batch, key: transformer.next_token_loss(config, fast, batch)  # noqa: E731
    mg = jmeta.over_tasks(
        jmeta.mixed_mode(Problem(language, language, lambda m: optax.sgd(0.5)), 2), microbatch=1
    )
    meta = random_like(shapes(transformer.init, config), lambda leaf: 0.2)
    tokens = np.random.default_rng(1).integers(0, 12, (4, 2, 5)).astype(np.int32)
    episodes, outer = Episode(tokens, tokens), optax.sgd(1.0)
    state = jax.jit(jmeta.meta_trainer(mg, outer).init)(meta, jax.random.key(0))
    expected = jax.jit(jmeta.meta_trainer(mg, outer).step)(state, episodes)[0].meta
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    step = parallel.sharded_step(mg, outer, mesh, state, parallel.TRANSFORMER)
    placed = parallel.shard_state(mesh, state, parallel.TRANSFORMER)
    got = step(placed, parallel.shard_episodes(mesh, episodes))[0].meta
    expected = on_host(expected)
    assert distance(on_host(got), expected) < 1e-5 * distance(expected, meta)


def distance(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return np.sqrt(sum(np.square(x - y).sum() for x, y in pairs))


def test_host_data_become_global_arrays():
    mesh = make_mesh(MeshConfig(tasks=2, fsdp=2, tensor=2))
    episodes = draw(0)
    placed = parallel.shard_episodes(mesh, episodes)
    x = placed.support["x"]
    assert x.sharding == NamedSharding(mesh, P(("tasks", "fsdp")))
    assert x.addressable_shards[0].data.shape == (TASKS // 4, 6, 4)
    np.testing.assert_array_equal(x, episodes.support["x"])
    assert parallel.shard_episodes(mesh, placed).support["x"] is x
    other = make_mesh(MeshConfig(), jax.devices()[3:4])
    moved = parallel.shard_episodes(other, jax.tree.map(jnp.asarray, episodes)).support["x"]
    assert moved.devices() == {jax.devices()[3]}
    with pytest.raises(ValueError, match=r"leaf is a single number: .* leading task axis"):
        parallel.shard_episodes(mesh, {"x": np.ones(8), "rate": 0.1})
    with pytest.raises(ValueError, match=r"batch of 6 tasks .* tasks=2 x fsdp=2"):
        parallel.shard_episodes(mesh, jax.tree.map(lambda a: a[:6], episodes))


# --- one device equals eight ----------------------------------------------------------------------

ONE = MeshConfig(tasks=1)
MESHES = {
    "data parallel": MeshConfig(),
    "fsdp": MeshConfig(tasks=2, fsdp=4),
    "all three": MeshConfig(tasks=2, fsdp=2, tensor=2),
}


@pytest.fixture(scope="module")
def single():
    return run(None, optax.sgd(0.1))


@pytest.mark.parametrize(
    "name",  # fsdp is a part of the run that goes on with fewer devices
    [
        pytest.param("data parallel", marks=pytest.mark.slow),
        "all three",
        pytest.param("fsdp", marks=pytest.mark.slow),
    ],
)
def test_one_device_equals_eight_in_float32(name, single):
    eight = run(MESHES[name], optax.sgd(0.1))
    np.testing.assert_allclose(losses(eight), losses(single), rtol=1e-5)
    assert losses(single)[-1] < 0.9 * losses(single)[0]
    assert relative_error(on_host(eight.meta), on_host(single.meta)) < 1e-5


def test_one_device_equals_eight_in_float64_with_adam(x64):
    one = run(None, optax.adam(0.01))
    eight = run(MESHES["fsdp"], optax.adam(0.01))
    np.testing.assert_allclose(losses(eight), losses(one), rtol=1e-10)
    assert relative_error(on_host(eight.meta), on_host(one.meta)) < 1e-10


def test_persistent_students_stay_on_their_devices():
    mg = jmeta.over_tasks(jmeta.first_order(PROBLEM, 2, persistent=True), tasks=TASKS, microbatch=1)
    one = run(None, optax.sgd(0.1), mg=mg, steps=4)
    eight = run(MESHES["data parallel"], optax.sgd(0.1), mg=mg, steps=4)
    np.testing.assert_allclose(losses(eight), losses(one), rtol=1e-5)
    students = eight.state.estimator_state
    assert all(len(x.addressable_shards[0].data) == 2 for x in jax.tree.leaves(students))
    fast = on_host(students.fast), on_host(one.state.estimator_state.fast)
    assert relative_error(*fast) < 1e-5
    assert students.step.tolist() == [8] * TASKS


def test_draws_do_not_depend_on_the_devices():
    # A sharded draw equals a whole one, and needs no communication to be made.
    mesh = make_mesh()
    draws = jax.jit(
        lambda key: jax.random.normal(key, (16, 8)), out_shardings=parallel.task_sharding(mesh)
    )
    key = jax.random.key(7)
    np.testing.assert_array_equal(draws(key), jax.random.normal(key, (16, 8)))
    everywhere = jax.device_put(key, NamedSharding(mesh, P()))
    assert collectives(draws.lower(everywhere).compile().as_text()) == []


# --- fewer devices on the way ---------------------------------------------------------------------


EIGHT, FOUR, LAST = (MESHES["fsdp"], 8, 8), (MeshConfig(fsdp=2), 4, 14), (ONE, 1, 20)


@pytest.mark.parametrize(
    "plan", [pytest.param((EIGHT, LAST), marks=pytest.mark.slow), (EIGHT, FOUR, LAST)]
)
def test_a_run_goes_on_with_fewer_devices(plan, tmp_path, single):
    for config, devices, steps in plan:
        result = run(config, optax.sgd(0.1), devices, steps=steps, out=tmp_path, resume=steps > 8)
        mesh = make_mesh(config, jax.devices()[:devices])
        assert result.meta["layer1"]["kernel"].sharding.device_set == set(mesh.devices.flat)
    np.testing.assert_allclose(losses(result), losses(single), rtol=1e-5)
    assert relative_error(on_host(result.meta), on_host(single.meta)) < 1e-5


def test_a_checkpoint_is_the_same_bits_on_any_mesh(tmp_path):
    outer, rules = optax.adam(0.1), parallel.mlp(3)
    mg = jmeta.over_tasks(jmeta.first_order(PROBLEM, 2, persistent=True), tasks=TASKS)
    state = initial(mg, outer)
    meshes = [
        make_mesh(config, jax.devices()[:devices])
        for config, devices in ((MESHES["all three"], 8), (MeshConfig(fsdp=2), 4), (ONE, 1))
    ]
    bits = lambda tree: [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]  # noqa: E731
    now = parallel.shard_state(meshes[0], state, rules)
    for step, mesh in enumerate(meshes[1:]):
        with checkpoint.open_checkpoints(tmp_path / str(step)) as manager:
            checkpoint.save(manager, step, now, extra={})
            checkpoint.wait(manager)
            now = checkpoint.restore(manager, parallel.shard_state(mesh, state, rules)).tree
        assert bits(now._replace(key=())) == bits(state._replace(key=()))
        layout = parallel.state_shardings(mesh, state, rules)
        for leaf, place in zip(jax.tree.leaves(now), jax.tree.leaves(layout), strict=True):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


def test_rules_without_a_mesh_are_an_error():
    with pytest.raises(ValueError, match="rules needs a mesh"):
        run(None, optax.sgd(0.1), rules=parallel.CONV)
