"""What pre-trains on Two Moons: networks, corruptions, teachers, and what settings make of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import _teacher_shared as shared
from experiments import _two_moons_data as data_of
from experiments import _two_moons_methods as methods_of
from experiments import two_moons
from jmeta.models import masked_lm, teacher_lm


@pytest.fixture(scope="module")
def data():
    return data_of.load(20, 1000)


def test_the_networks_have_the_published_size(data):
    shape = methods_of.network(two_moons.PRESETS["paper"], data)
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(
            lambda key, init=init: init(shape._replace(vocab=512), key), jax.random.key(0))))
        for init in (masked_lm.init, teacher_lm.init_teacher)
    ]  # fmt: skip
    assert [round(size, -2) for size in sizes] == [6700, 15500]


def test_denoising_reads_what_masked_language_modelling_reads_and_asks_for_all_of_it(data):
    smoke = two_moons.PRESETS["smoke"]
    mlm, all_of_it = (
        methods_of.build(smoke, data, name).chunk(1, 3).query for name in ("mlm", "denoising")
    )
    np.testing.assert_array_equal(mlm["tokens"], all_of_it["tokens"])
    hidden = mlm["weights"] == 1
    np.testing.assert_array_equal(mlm["labels"][hidden], all_of_it["labels"][hidden])
    kept = ~hidden
    np.testing.assert_array_equal(all_of_it["tokens"][kept], all_of_it["labels"][kept])
    assert 0 < hidden.mean() < 0.3
    assert (all_of_it["weights"] == 1).all()


def test_random_tokens_stand_where_masks_would(data):
    smoke = two_moons.PRESETS["smoke"]
    batch, denoised = (
        methods_of.build(smoke, data, name).chunk(1, 3).query
        for name in ("random tokens", "denoising")
    )
    original, hidden = denoised["labels"], batch["weights"] == 1
    np.testing.assert_array_equal(batch["labels"][hidden], original[hidden])
    np.testing.assert_array_equal(batch["tokens"][~hidden], original[~hidden])
    assert not (batch["tokens"] == data.words.mask).any()
    # A draw of hundreds of ordinary tokens and [SEP] is seldom the token itself.
    assert (batch["tokens"] != original)[hidden].mean() > 0.9
    assert 0 < hidden.mean() < 0.3


def test_random_masks_are_masks_and_nothing_else(data):
    smoke = two_moons.PRESETS["smoke"]
    batch, denoised = (
        methods_of.build(smoke, data, name).chunk(1, 3).query
        for name in ("random masks", "denoising")
    )
    hidden = batch["weights"] == 1
    np.testing.assert_array_equal(batch["tokens"] == data.words.mask, hidden)
    np.testing.assert_array_equal(batch["labels"][hidden], denoised["labels"][hidden])
    np.testing.assert_array_equal(batch["tokens"][~hidden], denoised["labels"][~hidden])


@pytest.mark.parametrize("share", [0.05, 0.9])
def test_the_share_that_is_hidden_is_the_one_asked_for(data, share):
    smoke = dataclasses.replace(two_moons.PRESETS["smoke"], masked=share)
    for name in ("mlm", "random masks"):
        batch = methods_of.build(smoke, data, name).chunk(1, 3).query
        # Of 32 numbers a row, rounded down or up: whole in the mean.
        assert set(np.unique(batch["weights"].sum(-1))) <= {
            np.floor(32 * share), np.ceil(32 * share)
        }  # fmt: skip
    read = data_of.unlabelled(data.held_out, data.words)
    read = {k: jnp.asarray(read[k][:3]) for k in ("tokens", "mask", "ordinary")}
    for name in shared.MASKS:
        method = methods_of.build(smoke, data, name)
        meta = jax.jit(method.start)(jax.random.key(0))
        assert jax.jit(method.monitor)(meta, read)["mask_rate"] == pytest.approx(share, rel=0.1)


def test_a_teacher_of_replacements_reads_where_it_may_write_and_what_it_learns_mlm_from(data):
    smoke = two_moons.PRESETS["smoke"]
    method = methods_of.build(smoke, data, shared.REPLACEMENTS)
    episodes = method.chunk(0, 0)
    assert set(episodes.support) == {"tokens", "mask", "ordinary", "masked"}
    read = jax.tree.map(lambda leaf: leaf[0, 0], episodes.support)
    write = jax.jit(lambda start, key: method.panel(method.start(start), read, key))
    pseudo = write(jax.random.key(0), jax.random.key(1))
    written, weights = np.asarray(pseudo["tokens"]), np.asarray(pseudo["weights"])
    np.testing.assert_array_equal(weights == 1, written != read["tokens"])
    assert (weights[read["ordinary"] == 0] == 0).all()
    assert 0 < weights.mean() < 0.4


def test_both_heads_of_a_teacher_are_watched_whatever_it_writes(data):
    smoke = two_moons.PRESETS["smoke"]
    read = data_of.unlabelled(data.held_out, data.words)
    read = {k: jnp.asarray(read[k][:3]) for k in ("tokens", "mask", "ordinary")}
    for name in methods_of.METHODS:
        method = methods_of.build(smoke, data, name)
        if name in shared.CORRUPTIONS:
            assert method.panel is None
            continue
        meta = jax.eval_shape(method.start, jax.random.key(0))
        watched = jax.eval_shape(method.monitor, meta, read)
        heads = ("inputs",) if name == shared.REPLACEMENTS else ("inputs", "labels")
        of_heads = ("entropy", "confidence", "variety", "copied", "masked", "label_tokens")
        expected = {f"{head}_{what}" for head in heads for what in of_heads}
        assert watched.keys() == (
            {"mask_rate", "masked_entropy"} if name in shared.MASKS else expected
        )
    # By hand: no padding in a sequence, and [PAD] is never written.
    shape = methods_of.network(smoke, data)

    @jax.jit
    def both(key):
        meta = teacher_lm.init_teacher(shape, key)
        monitor = methods_of.build(smoke, data, "input-only soft").monitor
        return monitor(meta, read), teacher_lm.write(shape, meta, read, None)

    found, written = both(jax.random.key(0))
    for head in ("inputs", "labels"):
        scores = np.delete(np.asarray(written[head], np.float64), data.words.pad, -1)
        p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        np.testing.assert_allclose(found[f"{head}_entropy"], -(p * np.log(p)).sum(-1).mean(), 1e-5)


def test_a_teacher_does_not_move_where_its_gradient_is_too_large_or_no_number(data):
    config = dataclasses.replace(
        two_moons.PRESETS["smoke"], methods=("mask-budget",), largest_gradient=0.02
    )
    moves = methods_of.build(config, data, "mask-budget").optimizer  # 100 * 0.02 at most
    plain = methods_of.optimizer(config.rate, config.warmup)
    params, small = jnp.ones(3), jnp.asarray([1.0, -1.0, 0.5])

    def run(optimizer, gradients):
        state, at = optimizer.init(params), params
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, at)
            at = optax.apply_updates(at, updates)
        return np.asarray(at), state

    large, none = jnp.asarray([2.0, 0.1, 0.0]), jnp.asarray([jnp.nan, 0.0, 0.0])
    over = jnp.asarray([3e30, 0.0, 0.0])  # its square is no float32
    expected, _ = run(plain, [small, small])  # as if there had been no others, warm-up included
    assert (expected != 1).all()
    found, state = run(moves, [small, large, none, over, small])
    np.testing.assert_array_equal(found, expected)
    assert state.skipped == 3


def test_settings_reach_the_estimator(data, monkeypatch):
    made = []
    for name in ("soft_teacher", "hard_teacher"):
        keep = lambda student, _, name=name, **given: made.append((name, student, given))  # noqa: E731
        monkeypatch.setattr(methods_of.methods, name, keep)
    for name in ("leave_one_out", "moving_average", "no_baseline"):
        monkeypatch.setattr(methods_of.methods, name, lambda *given, name=name: (name, *given))

    def built(name, among=None, **changed):
        asked = among or (name,)
        config = dataclasses.replace(two_moons.PRESETS["smoke"], methods=asked, **changed)
        methods_of.build(config, data, name)
        return made.pop()

    weights = {
        "among": methods_of.METHODS,
        "soft_weight": 3.0,
        "input_weight": 5.0,
        "hard_weight": 7.0,
    }
    for name, weight in (
        ("soft", 3.0), ("input-only soft", 5.0), ("mask-only", 3.0), ("mask-budget", 3.0),
        (shared.REPLACEMENTS, 5.0), ("hard", 7.0), ("input-only hard", 7.0),
    ):  # fmt: skip
        estimator, student, given = built(name, inner_rate=0.25, support_steps=4, **weights)
        assert estimator == ("hard_teacher" if name in shared.HARD else "soft_teacher")
        assert given["meta_weight"] == weight
        assert student.support_steps == 4
        slope = jnp.asarray([0.5, -2.0])
        moves, _ = student.support_optimizer.update(slope, student.support_optimizer.init(slope))
        np.testing.assert_array_equal(moves, -0.25 * slope)
    for baseline, chosen in (
        ("leave_one_out", ("leave_one_out",)), ("moving_average", ("moving_average", 0.01)),
        ("none", ("no_baseline",)),
    ):  # fmt: skip
        assert built("hard", baseline=baseline)[2]["baseline"] == chosen
    for worth in ("exact", "first_order", "cosine", "loss_difference", "negative_loss"):
        assert built("input-only hard", coefficient=worth)[2]["coefficient"] == worth
    for weighting in ("sum", "mean"):
        assert built("hard", weighting=weighting)[2]["weighting"] == weighting
    assert "grad" not in built("soft")[2]
    first = built("soft", soft_gradient="first_order", inner_steps=2, samples=64)[2]
    assert (first["grad"], first["steps"]) == (methods_of.methods.direct_grad, 2)
