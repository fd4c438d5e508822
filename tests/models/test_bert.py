"""BERT's own rules: masks, positions, heads, dropout, and derivatives where they are delicate.

That its numbers are those of transformers is the business of tests/parity.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_numbers import log_softmax
from random_params import quick_jit, random_params

from jmeta.models import attention, bert, heads, primitives

hidden, apply, loss, embed = (
    quick_jit(f, static_argnums=0) for f in (bert.hidden, bert.apply, bert.loss, bert.embed)
)

CONFIG = bert.BertConfig(
    vocab=13, width=8, layers=2, heads=2, max_len=6, ff=10, loop="scan", head="masked_lm", labels=3
)


def draw(config):
    return random_params(bert, config)


BATCH = {
    "tokens": np.array([[3, 4, 5, 6], [7, 8, 9, 10]]),
    "mask": np.ones((2, 4), np.float32),
    "segments": np.array([[0, 0, 1, 1], [0, 1, 1, 1]]),
    "labels": np.array([[3, -100, 5, -100], [7, -100, -100, 2]]),
    "y": np.array([2, 0]),
    "start": np.array([1, 0]),
    "end": np.array([2, 3]),
}
ROUTES = {"tokens": 11, "mask": 0, "segments": 1, "labels": 4}  # what pads may hold


def batch(**changes):
    return jax.tree.map(jnp.asarray, {**BATCH, **changes})


def padded(left):
    side = (2, 0) if left else (0, 2)
    moved = {
        name: np.pad(BATCH[name], ((0, 0), side), constant_values=value)
        for name, value in ROUTES.items()
    }
    shift = {"start": BATCH["start"] + 2 * left, "end": BATCH["end"] + 2 * left}
    return batch(**moved, **shift)


def close(a, b, tolerance=1e-10):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b
    )


@pytest.mark.parametrize(
    ("kind", "head", "left"),
    [
        ("bert", "masked_lm", False),
        ("bert", "spans", False),
        ("roberta", "spans", True),
        pytest.param("roberta", "masked_lm", False, marks=pytest.mark.slow),
        ("distilbert", "classify", False),
    ],
)
def test_padding_changes_neither_loss_nor_gradient(x64, kind, head, left):
    types = 0 if kind == "distilbert" else 2
    config = CONFIG._replace(kind=kind, head=head, types=types)
    # Two blocks, where a second one reads states above padding, once on each side; else one.
    if (kind, head, left) not in {("bert", "masked_lm", False), ("roberta", "spans", True)}:
        config = config._replace(layers=1, loop="unroll")
    params = draw(config)
    run = quick_jit(jax.value_and_grad(lambda p, b: bert.loss(config, p, b)[0]))
    close(run(params, batch()), run(params, padded(left)))


def test_a_row_of_padding_alone_counts_nothing(x64):
    config = CONFIG._replace(head="classify")
    params = draw(config)
    run = quick_jit(jax.value_and_grad(lambda p, b: bert.loss(config, p, b)[0]))
    more = {
        "tokens": np.pad(BATCH["tokens"], ((0, 1), (0, 0))),
        "segments": np.pad(BATCH["segments"], ((0, 1), (0, 0))),
        "mask": np.pad(BATCH["mask"], ((0, 1), (0, 0))),
        "y": np.append(BATCH["y"], 1),
    }
    close(run(params, batch()), run(params, batch(**more)))
    vectors = np.asarray(embed(config, params, batch(**more)))
    assert (vectors[2] == 0).all()
    close(np.linalg.norm(vectors[:2], axis=-1), np.ones(2))


def test_roberta_counts_positions_from_the_padding_index(x64):
    config = CONFIG._replace(kind="roberta", pad_id=1, types=1, head=None)
    params = draw(config)
    tokens = jnp.array([[1, 1, 5, 6], [7, 8, 1, 1]])
    no_mask = hidden(config, params, {"tokens": tokens})
    given = hidden(
        config, params, {"tokens": tokens, "positions": jnp.array([[1, 1, 2, 3], [2, 3, 1, 1]])}
    )
    close(no_mask, given)
    assert params["embed"]["positions"].shape == (6 + 2, 8)


def test_loops_remats_and_attention_agree(x64):
    """Values and gradients, dropout included."""
    config = CONFIG._replace(dropout=0.2, attention_dropout=0.1, head=None)
    params = draw(config)

    @functools.partial(quick_jit, static_argnums=0)
    def run(config, params):
        key = jax.random.key(5)
        cubes = lambda p: (bert.hidden(config, p, batch(), key) ** 3).sum()  # noqa: E731
        return jax.value_and_grad(cubes)(params)

    reference = run(config, params)
    for loop, remat in (("scan", "full"), ("unroll", "hidden")):
        close(reference, run(config._replace(loop=loop, remat=remat), params))


def test_dropout_follows_the_key():
    params = draw(CONFIG)
    for rates in ({"dropout": 0.5}, {"attention_dropout": 0.5}):
        config = CONFIG._replace(head=None, **rates)
        run = lambda key, config=config: np.asarray(  # noqa: E731
            hidden(config, params, batch(), key)
        )
        assert (run(None) == np.asarray(hidden(CONFIG, params, batch()))).all()
        one, same, other = (run(jax.random.key(seed)) for seed in (1, 1, 2))
        assert (one == same).all()
        assert np.abs(one - other).max() > 0.01
    config = CONFIG._replace(head="classify", head_dropout=0.5)
    run = lambda key: np.asarray(apply(config, draw(config), batch(), key))  # noqa: E731
    assert np.abs(run(jax.random.key(1)) - run(jax.random.key(2))).max() > 0.001


def test_leading_axes_are_batches(x64):
    params = draw(CONFIG)
    folded = batch(**{k: v.reshape(2, 1, *v.shape[1:]) for k, v in BATCH.items()})
    close(
        np.asarray(apply(CONFIG, params, folded))[:, 0],
        apply(CONFIG, params, batch()),
    )
    close(loss(CONFIG, params, folded), loss(CONFIG, params, batch()))


def test_losses_are_the_naive_formulas(x64):
    params = draw(CONFIG)
    scores = log_softmax(apply(CONFIG, params, batch()))
    labels = BATCH["labels"]
    picked = [-scores[i, t, labels[i, t]] for i, t in zip(*np.nonzero(labels >= 0), strict=True)]
    value, aux = loss(CONFIG, params, batch())
    close(value, np.mean(picked))
    assert aux["tokens"] == 4
    weights = np.array([[2.0, 9, 0, 0], [1, 9, 9, 0]])
    value, _ = loss(CONFIG, params, batch(weights=weights))
    close(value, (2 * picked[0] + picked[2]) / 3)
    short = np.array([[1, 1, 1, 1], [1, 1, 1, 0]])  # of integers, as tokenizers give it
    last = batch(mask=short, weights=np.full((2, 4), 5.0))
    assert (
        loss(CONFIG, params, last)[1]["tokens"] == 15
    )  # a pad weighs nothing, whatever it is given
    config = CONFIG._replace(head="spans")
    params = draw(config)
    scores = log_softmax(apply(config, params, batch()), 1)
    starts = -(scores[0, 1, 0] + scores[1, 0, 0]) / 2
    ends = -(scores[0, 2, 1] + scores[1, 3, 1]) / 2
    close(loss(config, params, batch())[0], (starts + ends) / 2)
    outside = batch(start=np.array([1, -1]), end=np.array([9, 3]))
    close(loss(config, params, outside)[0], -(scores[0, 1, 0] + scores[1, 3, 1]) / 2)


def second_order(f, x):
    """The largest entry of a Hessian-vector product, forward over reverse and reverse twice."""

    @quick_jit
    def products(x):
        v = jax.tree.map(jnp.ones_like, x)

        def along(x):
            both = zip(jax.tree.leaves(jax.grad(f)(x)), jax.tree.leaves(v), strict=True)
            return sum((g * u).sum() for g, u in both)

        return jax.jvp(jax.grad(f), (x,), (v,))[1], jax.grad(along)(x)

    both = jax.tree.leaves(products(x))
    assert all(np.isfinite(leaf).all() for leaf in both)
    return max(float(np.abs(leaf).max()) for leaf in both)


@pytest.mark.parametrize("kind", ["tanh", "exact"])
def test_gelu_has_a_second_derivative_everywhere(kind):
    x = jnp.array([-30.0, -3.0, -0.0, 0.0, 1e-30, 3.0, 30.0])
    assert second_order(lambda x: (primitives.gelu(x, kind) ** 2).sum(), x) < 10
    exact = quick_jit(jax.grad(jax.grad(lambda x: primitives.gelu(x, kind))))(0.0)
    close(exact, np.asarray((2 / np.pi) ** 0.5 if kind == "tanh" else 2 * 0.3989423), 1e-5)


def test_rows_that_see_nothing_have_finite_derivatives():
    scores = jnp.linspace(-3.0, 3.0, 8).reshape(1, 1, 2, 4)
    allowed = jnp.array([[True, True, False, True], [False] * 4])[None, None]
    value = np.asarray(quick_jit(attention.masked_softmax)(scores, allowed))
    assert value[0, 0, 0, 2] == 0
    close(value[0, 0, 1], np.full(4, 0.25), 1e-6)
    second_order(lambda s: (attention.masked_softmax(s, allowed) ** 3).sum(), scores)


@pytest.mark.parametrize("eps", [1e-12, 1e-5])
def test_normalisation_at_zero_variance_has_finite_derivatives(eps):
    weights = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
    x = jnp.full((1, 4), 3.0)
    assert (np.asarray(quick_jit(primitives.layer_norm)(x, weights, eps)) == 0).all()
    second_order(lambda x: (primitives.layer_norm(x, weights, eps) ** 3).sum(), x)


def test_unit_vectors_at_zero_have_finite_derivatives():
    x = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    second_order(lambda x: (heads.unit(x) ** 3).sum(), x)
    close(np.asarray(quick_jit(heads.unit)(x))[1], np.array([0.6, 0.8]), 1e-6)


def test_a_batch_with_a_row_of_padding_has_a_finite_second_order():
    config = CONFIG._replace(head=None, layers=1, loop="unroll")
    mask = jnp.array([[1.0, 1, 0, 0], [0, 0, 0, 0]])
    f = lambda p: (bert.embed(config, p, batch(mask=mask)) ** 3).sum()  # noqa: E731
    assert second_order(f, draw(config)) > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 3}, "multiple of heads"),
        ({"kind": "albert"}, "kind='albert'"),
        ({"head": "tagging"}, "head='tagging'"),
        ({"attention_dropout": 1.0}, "attention_dropout=1.0"),
        ({"attention": "fused", "attention_dropout": 0.1}, "no dropout inside"),
    ],
)
def test_meaningless_configs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        bert.init(CONFIG._replace(**change), jax.random.key(0))


def test_wrong_arguments_are_refused():
    params = draw(CONFIG)
    with pytest.raises(ValueError, match="max_len=6"):
        hidden(CONFIG, params, {"tokens": jnp.zeros((2, 7), int)})
    with pytest.raises(ValueError, match="mask has shape"):
        hidden(CONFIG, params, batch(mask=np.ones((2, 5))))
    with pytest.raises(ValueError, match="no head"):
        loss(CONFIG._replace(head=None), params, batch())
    with pytest.raises(ValueError, match="hold \\[2\\] layers, the config says 3"):
        hidden(CONFIG._replace(layers=3), params, batch())


def test_fused_attention_is_the_same_function():
    params = draw(CONFIG)
    for mask in (np.ones((2, 4)), np.array([[1, 1, 0, 0], [1, 1, 1, 1]])):
        plain, fused = (
            embed(CONFIG._replace(attention=a), params, batch(mask=mask)) for a in ("xla", "fused")
        )
        close(plain, fused, 2e-5)
