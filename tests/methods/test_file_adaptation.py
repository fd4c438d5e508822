"""Holes in files and adaptation to them: what is in the support, and that steps help."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quick_numbers import differences, relative_error

from jmeta.methods import first_order_tssa, learned_start, tssa
from jmeta.models import transformer
from jmeta.runtime.evaluate import adaptation_values
from jmeta.tasks import files as tasks

LM = transformer.TransformerConfig(vocab=17, width=8, layers=1, heads=2, max_len=6)


def loss(params, batch, key):
    return transformer.next_token_loss(LM, params, batch["tokens"], batch["weights"], key)


@jax.jit
def start():
    return transformer.init(LM, jax.random.key(0))


def at(tree, i):
    return jax.tree.map(lambda x: np.asarray(x[i]), tree)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=4),
    window=st.integers(2, 8), count=st.integers(0, 4), size=st.integers(1, 3),
    choose=st.sampled_from(["rare", "shared", "uniform"]), side=st.sampled_from(["before", "both"]),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_no_window_holds_a_token_of_the_hole_or_of_another_file(
    lengths, window, count, size, choose, side, seed
):
    """Every token of every file is another one, so that a token says where it is from."""
    ends = np.cumsum(lengths)
    texts = [np.arange(a, b) for a, b in zip([0, *ends], ends, strict=False)]
    source = tasks.files(texts, int(ends[-1]))
    if size >= window:
        with pytest.raises(ValueError, match="a hole has a token and some context"):
            tasks.holes(source, window=window, count=count, tasks=3, size=size)
        return
    make = functools.partial(
        tasks.holes, source, window=window, count=count, tasks=3, size=size, choose=choose,
        side=side, long_context=2 * window,
    )  # fmt: skip
    context = max(2 * window, window * (1 + (count if side == "before" else 0)))
    if max(lengths) < context + (count + 1) * window:
        with pytest.raises(ValueError, match="no file has"):
            make()
        return
    episode = make()(seed, 0)
    again = make()(seed, 0)
    for a, b in zip(jax.tree.leaves(episode), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    other = make(choose="uniform")(seed, 0)  # the same holes, with other windows
    np.testing.assert_array_equal(other.query["tokens"], episode.query["tokens"])
    for i in range(3):
        query, support = episode.query["tokens"][i], episode.support.batches["tokens"][i]
        file = episode.query["file"][i]
        first = ends[file] - lengths[file]
        hole = query[episode.query["weights"][i] == 1]
        assert len(hole) == size
        assert hole[0] == first + episode.query["at"][i]
        assert not set(support.ravel().tolist()) & set(query.tolist())
        assert len(set(support.ravel().tolist())) == support.size  # no two windows overlap
        everything = [*support.ravel(), *query]
        assert first <= min(everything)
        assert max(everything) < ends[file]
        np.testing.assert_array_equal(np.diff(query), 1)
        np.testing.assert_array_equal(np.diff(support, axis=1), 1)
        np.testing.assert_array_equal(
            episode.query["before"][i], np.arange(hole[-1] + 1 - 2 * window, hole[-1] + 1)
        )
        if side == "before" and support.size:
            assert support.max() < query.min()


def test_rare_and_shared_windows_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    text, rarity = rng.integers(0, 9, 60), rng.random(9)
    hole, window, size = 30, 5, 2
    every = [r for r in range(27 - 5, -1, -5)] + list(range(32, 56, 5))
    choose = functools.partial(
        tasks.support_windows, text, hole, rarity, size=size, window=window, side="both"
    )
    for kind in ("rare", "shared"):
        context = set(text[27:30].tolist())

        def score(a, kind=kind, context=context):
            held = set(text[a : a + 5].tolist())
            return sum(rarity[t] for t in (held & context if kind == "shared" else held))

        best = sorted(every, key=score)
        found = choose(rng=np.random.default_rng(1), count=3, choose=kind)
        np.testing.assert_allclose([score(a) for a in found], [score(a) for a in best[-3:]])
    found = choose(rng=np.random.default_rng(1), count=100, choose="uniform")
    assert sorted(found) == sorted(every)
    drawn = [choose(rng=np.random.default_rng(s), count=1, choose="uniform")[0] for s in range(400)]
    counts = np.array([drawn.count(a) for a in every])
    expected = 400 / len(every)
    assert ((counts - expected) ** 2 / expected).sum() < 30  # chi-square, 9 degrees of freedom


def test_no_step_is_the_base_and_steps_help_where_identifiers_repeat(x64):
    """A file that says the same five tokens again and again, to a model that has never seen it."""
    text = np.tile(np.array([3, 11, 5, 16, 8]), 30)
    episode = tasks.holes(tasks.files([text], 17), window=6, count=4, tasks=6)(0, 0)
    params = jax.tree.map(lambda x: np.asarray(x, float), start())
    problem = learned_start(loss, optax.sgd(0.3))

    @jax.jit
    def values(episode):
        return adaptation_values(problem, params, episode, [0, 2, 4])["loss"]

    found = np.stack([values(at(episode, i)) for i in range(6)])
    last = jax.jit(lambda tokens: jax.nn.log_softmax(transformer.logits(LM, params, tokens)[-2]))
    for i in range(6):
        query = at(episode.query, i)
        scores = np.asarray(last(query["tokens"]))
        np.testing.assert_allclose(found[i, 0], -scores[query["tokens"][-1]], rtol=1e-10)
    assert (found[:, 2] < found[:, 1]).all()
    assert (found[:, 1] < found[:, 0]).all()
    assert (found[:, 2] < 0.8 * found[:, 0]).all()


def test_gradients_are_those_of_the_loop(x64):
    text = np.random.default_rng(0).integers(0, 17, 80)
    episode = at(tasks.holes(tasks.files([text], 17), window=6, count=2, tasks=1)(0, 0), 0)
    params = jax.tree.map(lambda x: np.asarray(x, float), start())
    optimizer = optax.sgd(0.3)

    @jax.jit
    @jax.value_and_grad
    def by_hand(params, stop):
        def step(params, window):
            slope = jax.grad(lambda p: loss(p, window, None)[0])(params)
            slope = jax.tree.map(lambda g: jnp.where(stop, jax.lax.stop_gradient(g), g), slope)
            return jax.tree.map(lambda p, g: p - 0.3 * g, params, slope), None

        params, _ = jax.lax.scan(step, params, episode.support.batches)
        return loss(params, episode.query, None)[0]

    run = functools.partial(_estimate, params, episode)
    exact = run(tssa(loss, steps=2, optimizer=optimizer))
    expected, slope = by_hand(params, False)
    np.testing.assert_allclose(exact[2].loss, expected, rtol=1e-10)
    assert relative_error(exact[0], slope) < 1e-10
    part = {"scale": params["ln_f"]["scale"]}
    moved = lambda q: {**params, "ln_f": {**params["ln_f"], **q}}  # noqa: E731
    slopes = differences(lambda q: by_hand(moved(q), False)[0], part)
    assert relative_error({"scale": exact[0]["ln_f"]["scale"]}, slopes) < 1e-6
    first = run(first_order_tssa(loss, steps=2, optimizer=optimizer))
    assert relative_error(first[0], by_hand(params, True)[1]) < 1e-10


def _estimate(params, episode, mg):
    return jax.jit(lambda p: mg.estimate(p, (), episode, None))(params)


def test_what_has_no_meaning_is_refused():
    source = tasks.files([np.arange(40)], 40)
    with pytest.raises(ValueError, match="choose='best'"):
        tasks.holes(source, window=4, count=1, tasks=1, choose="best")
    with pytest.raises(ValueError, match=r"no file has 4\d\d tokens: the longest has 40"):
        tasks.holes(source, window=100, count=2, tasks=1)
    with pytest.raises(ValueError, match="there is no file"):
        tasks.files([], 3)
    with pytest.raises(ValueError, match="tokens run from 0 to 39, the vocabulary is 12"):
        tasks.files([np.arange(40)], 12)
    episode = at(tasks.holes(source, window=4, count=1, tasks=1)(0, 0), 0)
    mg = tssa(loss, steps=2, optimizer=optax.sgd(0.1))
    with pytest.raises(ValueError, match="Steps of 1 batches"):
        mg.estimate(start(), (), episode, None)
