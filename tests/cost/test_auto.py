"""``jmeta.auto``: exact whatever it chooses, within the memory, kept on disk, or an error."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta
from jmeta import cost
from jmeta.cost import choosing
from jmeta.cost import race as racing
from jmeta.cost.variants import KEEPING, REVERSE, WITH_REMAT, WRITTEN_OUT, variants
from jmeta.testing import quadratic


def network(width=16, rate=0.1):
    """A small network of which an inner step keeps more than its weights."""

    def loss(params, meta, batch, key):
        hidden = jnp.tanh(batch @ params["w"])
        return jnp.mean((hidden @ params["v"]) ** 2), {}

    problem = jmeta.Problem(loss, loss, lambda meta: optax.sgd(rate))
    rng = np.random.default_rng(0)
    shapes = {"w": (4, width), "v": (width, 1), "x": (64, 4)}
    made = {name: jnp.asarray(rng.normal(size=n), jnp.float32) for name, n in shapes.items()}
    episode = jmeta.Episode(made.pop("x"), np.ones((64, 4), np.float32))
    return problem, made, episode


@pytest.fixture(scope="module")
def q():
    return quadratic()


def many(q, scales):
    """An episode of the quadratic at each scale."""
    return jax.tree.map(lambda x: np.stack([scale * np.asarray(x) for scale in scales]), q.episode)


def planned(mg, meta, episode):
    """What XLA plans for one estimate, read here once more."""
    program = jax.jit(mg.estimate).lower(meta, mg.init(meta, None), episode, None).compile()
    memory = program.memory_analysis()
    return memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes


def test_the_gradient_is_exact_whatever_is_chosen(q, tmp_path):
    mg = jmeta.auto(q.problem, 3, memory="1MiB", folder=tmp_path)
    grads, state, info = mg.estimate(q.meta, mg.init(q.meta, None), q.episode, None)
    np.testing.assert_allclose(grads, q.exact(3), atol=1e-5)
    assert state == ()
    assert info.inner_losses.shape == (3,)


def test_a_choice_is_made_inside_jit_vmap_and_grad(q, tmp_path):
    chosen = []
    mg = jmeta.auto(q.problem, 1, folder=tmp_path, report=chosen.append)

    def one(meta, key):
        return mg.estimate(meta, (), q.episode, key)[0]

    key, start, exact = jax.random.key(1), np.asarray(q.meta), np.asarray(q.exact(1))
    at = jax.jit(one)
    np.testing.assert_allclose(at(start, key), exact, atol=1e-5)
    several = jax.jit(jax.vmap(one, (0, None)))(np.stack([start, start]), key)
    np.testing.assert_allclose(several, np.stack([exact] * 2), atol=1e-5)
    # The gradient of a quadratic is linear in meta, so that its Jacobian says the same: by reverse
    # mode, which every variant has, whichever was the fastest.
    step = np.asarray(jax.jit(jax.jacrev(one))(start, key)) @ np.ones(5, np.float32)
    np.testing.assert_allclose(
        step, np.asarray(at(start + 1.0, key)) - np.asarray(at(start, key)), rtol=1e-3, atol=1e-4
    )
    assert len(chosen) == 1  # one shape, one choice


def test_tasks_and_a_persistent_state(q, tmp_path):
    # Two steps, which are tried written out too, and four tasks, which are tried two at a time.
    tasks = many(q, (1, 1, 2, 1))
    mg = jmeta.auto(q.problem, 2, tasks=4, persistent=True, folder=tmp_path)
    plain = jmeta.over_tasks(jmeta.unrolled(q.problem, 2, persistent=True), 4)
    chosen, reverse = (jax.jit(each.estimate) for each in (mg, plain))
    state, expected_state = mg.init(q.meta, None), plain.init(q.meta, None)
    for _ in range(2):
        grads, state, _ = chosen(q.meta, state, tasks, None)
        expected, expected_state, _ = reverse(q.meta, expected_state, tasks, None)
        np.testing.assert_allclose(grads, expected, atol=1e-5)
    assert state.step.tolist() == [4] * 4


def test_it_trains_in_a_compiled_outer_step(q, tmp_path):
    init, step = jmeta.meta_trainer(
        jmeta.auto(q.problem, 1, tasks=2, folder=tmp_path), optax.sgd(0.1)
    )
    state, _ = jax.jit(step)(init(q.meta, jax.random.key(0)), many(q, (1, 1)))
    np.testing.assert_allclose(
        state.meta, np.asarray(q.meta) - 0.1 * np.asarray(q.exact(1)), atol=1e-5
    )


def test_few_steps_are_tried_written_out_and_many_are_not():
    names = {steps: {v.estimator for v in variants(steps)} for steps in (0, 1, 2, 8, 9)}
    for steps, found in names.items():
        assert found == WITH_REMAT.keys() | KEEPING.keys() | (
            WRITTEN_OUT.keys() if steps in (2, 8) else set()
        )
    assert all(v.remat == "none" for v in variants(8) if v.estimator not in WITH_REMAT)


@pytest.mark.slow
def test_the_memory_is_kept_to(tmp_path):
    problem, meta, episode = network()
    free = cost.fastest(problem, 16, meta, episode, memory="1GiB", folder=tmp_path)
    sizes = {trial.variant: trial.bytes for trial in free.trials}
    assert {v.estimator for v in sizes} == WITH_REMAT.keys() | KEEPING.keys()
    assert all(v.remat != "nested" for v in sizes)  # more work than need be
    reverse, mixed = (sizes[cost.Variant(name, "none")] for name in ("unrolled", "mixed_mode"))
    [keeping] = (cost.Variant(name, "none") for name in KEEPING)
    assert mixed < sizes[keeping] < reverse
    tight = cost.fastest(problem, 16, meta, episode, memory=mixed, folder=tmp_path)
    assert planned(tight.mg, meta, episode) <= mixed < planned_of(tight, "unrolled", "none")
    assert not tight_trial(tight, "unrolled", "none").seconds  # never run
    least = min(tight_trial(tight, name, "step").bytes for name in ("mixed_mode", "unrolled"))
    nested = cost.fastest(problem, 16, meta, episode, memory=least - 1, folder=tmp_path)
    assert nested.variant.remat == "nested"
    assert planned(nested.mg, meta, episode) < least


def tight_trial(choice, estimator, remat):
    return next(t for t in choice.trials if t.variant[:2] == (estimator, remat))


def planned_of(choice, estimator, remat):
    return tight_trial(choice, estimator, remat).bytes


@pytest.mark.slow
def test_fewer_tasks_together_where_all_do_not_fit(tmp_path):
    problem, meta, episode = network()
    tasks = jax.tree.map(lambda x: jnp.stack([x] * 4), episode)
    one = planned(jmeta.over_tasks(jmeta.mixed_mode(problem, 2), 4, microbatch=1), meta, tasks)
    choice = cost.fastest(problem, 2, meta, tasks, tasks=4, memory=one, folder=tmp_path)
    assert choice.variant.microbatch < 4
    assert planned(choice.mg, meta, tasks) <= one
    expected = jmeta.unrolled(problem, 2).estimate(meta, (), episode, None)[0]
    got = choice.mg.estimate(meta, (), tasks, None)[0]
    assert cost.gradient_error(got, expected) < 1e-5
    assert "| together |" in cost.explain(choice)


def test_a_choice_is_kept_and_read_again(tmp_path, monkeypatch):
    problem, meta, episode = network()
    first = cost.fastest(problem, 1, meta, episode, memory="1GiB", folder=tmp_path)
    assert not first.remembered
    assert [f.name for f in tmp_path.iterdir()] == [first.file.name]

    def nothing(*arguments):
        raise AssertionError("it was measured again")

    with monkeypatch.context() as patched:
        patched.setattr(choosing, "compiled", nothing)
        again = cost.fastest(problem, 1, meta, episode, memory="1GiB", folder=tmp_path)
        assert again.remembered
        assert again._replace(mg=None) == first._replace(mg=None, remembered=True)
        for other in (
            lambda: cost.fastest(problem, 3, meta, episode, memory="1GiB", folder=tmp_path),
            lambda: cost.fastest(problem, 1, meta, episode, memory="2GiB", folder=tmp_path),
            lambda: cost.fastest(
                network(rate=0.2)[0], 1, meta, episode, memory="1GiB", folder=tmp_path
            ),
        ):
            with pytest.raises(AssertionError, match="measured again"):
                other()
        card = types.SimpleNamespace(platform="gpu", device_kind="another")
        for name, value in (("__version__", "0.0.1"), ("devices", lambda: [card])):
            with monkeypatch.context() as elsewhere:
                elsewhere.setattr(jax, name, value)
                with pytest.raises(AssertionError, match="measured again"):
                    cost.fastest(problem, 1, meta, episode, memory="1GiB", folder=tmp_path)
    assert "read from" in cost.explain(again)


def test_every_shape_has_a_choice_of_its_own(tmp_path):
    problem, meta, large = network(width=4)
    small, chosen = jax.tree.map(lambda x: x[:8], large), []
    mg = jmeta.auto(problem, 0, memory="1MiB", folder=tmp_path, report=chosen.append)
    own = jax.jit(jax.grad(lambda m, query: problem.outer_loss(m, m, query, None)[0]))
    for episode in (large, small, large, small):  # no inner step: the query's own gradient
        estimate = jax.jit(lambda *given: mg.estimate(*given))  # traced anew, to choose anew
        grads = estimate(meta, (), episode, None)[0]
        assert cost.gradient_error(grads, own(meta, episode.query)) < 1e-5
    assert [choice.remembered for choice in chosen] == [False, False]
    assert len({choice.file for choice in chosen}) == 2


@pytest.mark.parametrize("damage", ["{}", "cut"])
def test_a_file_that_is_no_choice_is_measured_again(q, tmp_path, damage):
    first = cost.fastest(q.problem, 0, q.meta, q.episode, memory="1MiB", folder=tmp_path)
    whole = first.file.read_text()
    first.file.write_text(whole[:-40] if damage == "cut" else damage)
    second = cost.fastest(q.problem, 0, q.meta, q.episode, memory="1MiB", folder=tmp_path)
    assert not second.remembered
    assert json.loads(second.file.read_text())["setting"] == first.setting


def test_nothing_fits_is_one_sentence_and_leaves_no_file(tmp_path):
    problem, meta, episode = network()
    mg = jmeta.auto(problem, 8, memory=1000, folder=tmp_path)
    with pytest.raises(cost.DoesNotFitError, match=r"no exact meta-gradient fits 1\.0 KiB: the "):
        mg.estimate(meta, (), episode, None)
    with pytest.raises(cost.DoesNotFitError, match=r"remat='nested' with .* KiB .*memory="):
        jax.jit(mg.estimate)(meta, (), episode, None)
    assert not list(tmp_path.iterdir())


def test_a_custom_derivative_that_is_none_is_left_to_reverse_mode(tmp_path):
    @jax.custom_vjp
    def twisted(x):
        return jnp.sum(x**3)

    # Its gradient is a rotation of the weights: no Hessian, so forward over reverse is another.
    twisted.defvjp(lambda x: (jnp.sum(x**3), x), lambda x, g: (g * jnp.roll(x, 1),))

    def inner(fast, meta, batch, key):
        return twisted(fast), {}

    def outer(fast, meta, batch, key):
        return jnp.sum((fast - batch) ** 2), {}

    problem = jmeta.Problem(inner, outer, lambda meta: optax.sgd(0.1))
    none = np.zeros(4, np.float32)
    meta, episode = np.arange(1, 5, dtype=np.float32), jmeta.Episode(none, none)
    exact = jax.jit(jmeta.unrolled(problem, 2).estimate)(meta, (), episode, None)[0]
    other = jax.jit(jmeta.mixed_mode(problem, 2).estimate)(meta, (), episode, None)[0]
    assert cost.gradient_error(other, exact) > 1e-2
    choice = cost.fastest(problem, 2, meta, episode, folder=tmp_path)
    assert choice.variant.estimator in REVERSE
    for trial in choice.trials:
        assert bool(trial.note) == (trial.variant.estimator not in REVERSE), trial.variant
    assert "inexact here" in cost.explain(choice)
    found = jax.jit(choice.mg.estimate)(meta, (), episode, None)[0]
    assert cost.gradient_error(found, exact) < 1e-6


def test_several_devices_cannot_each_choose(q, tmp_path):
    mg = jmeta.auto(q.problem, 2, folder=tmp_path)
    with jax.set_mesh(jax.make_mesh((2,), ("tasks",))):
        with pytest.raises(
            ValueError, match=r"this is a mesh of 2 devices: call jmeta\.cost\.fastest"
        ):
            mg.estimate(q.meta, (), q.episode, None)


def test_what_makes_no_sense_is_refused_when_it_is_built(q):
    with pytest.raises(ValueError, match="no size of memory"):
        jmeta.auto(q.problem, 2, memory="much")
    with pytest.raises(ValueError, match="tasks is 0; it must be at least 1"):
        jmeta.auto(q.problem, 2, tasks=0)
    with pytest.raises(ValueError, match="steps is -1"):
        jmeta.auto(q.problem, -1)


def test_no_inner_step_at_all(q, tmp_path):
    choice = cost.fastest(q.problem, 0, q.meta, q.episode, folder=tmp_path)
    grads = choice.mg.estimate(q.meta, (), q.episode, None)[0]
    np.testing.assert_allclose(grads, q.exact(0), atol=1e-5)


def test_the_hopeless_leave_a_race_early(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(racing.time, "perf_counter", lambda: clock[0])
    runs = []

    def program(name, seconds):
        def run():
            runs.append(name)
            clock[0] += seconds

        return run

    seen = []
    found = racing.race(
        {name: program(name, s) for name, s in
         {"best": 1.0, "near": 1.05, "far": 1.4, "hopeless": 3.0}.items()},
        repeats=5,
        seen=lambda name, answer: seen.append(name),
    )  # fmt: skip
    assert seen == ["best", "near", "far", "hopeless"]
    assert {name: len(seconds) for name, seconds in found.items()} == {
        "best": 5, "near": 5, "far": 2, "hopeless": 1,
    }  # fmt: skip
    assert runs[4:8] == ["hopeless", *racing.turn(["best", "near", "far"], 1)]  # in turns
    assert runs[8:11] == racing.turn(["best", "near", "far"], 2)
    assert racing.fastest_of(found, {"best": 9, "near": 1, "far": 1, "hopeless": 1}) == "best"
    short = racing.race({"a": program("a", 0.001), "b": program("b", 0.0011)}, repeats=5)
    assert len(short["a"]) == len(short["b"]) == racing.LONGEST


def test_microbatches_are_divisors():
    from jmeta.cost.variants import microbatches

    for tasks in range(1, 130):
        found = microbatches(tasks)
        assert found[0] == tasks
        assert found[-1] == 1
        assert all(tasks % size == 0 for size in found)
        assert len(found) <= 4
