"""Hidden-state optimisation against loops by hand, in float64, on the cached decoder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick_numbers import parameters

from jmeta.methods.hidden_states import hidden_states
from jmeta.models import blocks, cached, gpt2, primitives, transformer

pytestmark = pytest.mark.usefixtures("x64")

CONFIG = transformer.TransformerConfig(
    vocab=13, width=8, layers=2, heads=2, max_len=24, loop="scan"
)
LOSSES = functools.partial(cached.token_losses, CONFIG)

STILL, ADAM = optax.sgd(0.0), optax.adam(0.05)
scores_of = jax.jit(transformer.logits, static_argnums=0)
hidden = jax.jit(cached.hidden, static_argnums=0)


@pytest.fixture
def world():
    return parameters(transformer, CONFIG), np.random.default_rng(2).integers(0, 13, 21)


@functools.cache
def reader(optimizer, steps):
    """Compiled once for every shape of window and cache."""
    hso = hidden_states(LOSSES, optimizer, steps=steps)
    return hso.init, jax.jit(hso.step)


def read(optimizer, params, tokens, *, window, capacity, steps=1):
    """Losses of a whole text, and the caches after every window."""
    init, step = reader(optimizer, steps)
    cache, losses, caches = init(cached.empty(CONFIG, capacity, float)), [], []
    for low in range(0, len(tokens) - window, window):
        inputs, targets = (tokens[low + i : low + i + window] for i in (0, 1))
        found, cache = jax.tree.map(np.asarray, step(params, cache, inputs, targets))
        losses.append(found)
        caches.append(cache)
    return np.concatenate(losses), caches


def token_losses(scores, tokens):
    """Of every token but the first, from the scores of those before it."""
    scores = np.asarray(scores)
    scores = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    return -np.take_along_axis(scores, tokens[1:, None], 1)[:, 0]


@pytest.mark.parametrize("window", [1, 5, 20])
def test_windows_with_a_cache_are_the_decoder(world, window):
    params, tokens = world
    whole = token_losses(scores_of(CONFIG, params, tokens[:-1]), tokens)
    for steps in (0, 1):  # a rate of zero, and no step at all
        found, caches = read(STILL, params, tokens, window=window, capacity=20, steps=steps)
        np.testing.assert_allclose(found, whole, rtol=1e-10, atol=1e-10)
        assert caches[-1].position == 20


def test_less_room_is_sliding_attention(world):
    """Against the decoder with every attention cut to the same past, positions kept."""
    params, tokens = world
    window, capacity = 4, 6
    place = np.arange(20)
    first = place // window * window - capacity  # the oldest state a token's window may see
    band = (place[None] <= place[:, None]) & (place[None] >= first[:, None])
    band = band[None, None]

    @jax.jit
    def scores(params, tokens):
        rows = params["embed"]["tokens"][tokens] + params["embed"]["positions"][:20]
        x = rows[None]
        for i in range(CONFIG.layers):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
            x = blocks.pre_norm(CONFIG, jnp.asarray(band), x, layer, None)
        states = primitives.layer_norm(x, params["ln_f"], CONFIG.eps)[0]
        return states @ params["embed"]["tokens"].T

    whole = token_losses(scores(params, tokens[:-1]), tokens)
    found, _ = read(STILL, params, tokens, window=window, capacity=capacity)
    np.testing.assert_allclose(found, whole, rtol=1e-10, atol=1e-10)


def test_gpt2_is_read_alike():
    config = gpt2.GPT2Config(
        vocab=13, width=8, layers=2, heads=2, max_len=9, head="causal_lm", loop="scan"
    )
    params = parameters(gpt2, config)
    tokens = np.random.default_rng(2).integers(0, 13, 9)
    whole = np.asarray(jax.jit(gpt2.apply, static_argnums=0)(config, params, {"tokens": tokens}))
    past, slide = cached.none_yet(config, 9, float), jax.jit(cached.slide)
    for low in (0, 3, 6):
        states, new = hidden(config, params, past, tokens[low : low + 3])
        scores = np.asarray(states) @ params["embed"]["tokens"].T
        np.testing.assert_allclose(scores, whole[low : low + 3], rtol=1e-10, atol=1e-10)
        past = slide(past, new)
    beyond, _ = hidden(config, params, past, tokens[:3])  # positions 9 and on of 9
    assert np.isnan(np.asarray(beyond)).all()


def test_no_score_knows_a_later_token(world):
    params, tokens = world
    changed = np.concatenate([tokens[:14], (tokens[14:] + 1) % 13])
    before, after = (read(ADAM, params, t, window=4, capacity=6)[0] for t in (tokens, changed))
    np.testing.assert_array_equal(before[:13], after[:13])  # bit for bit
    assert (before[13:] != after[13:]).all()
    static = read(STILL, params, tokens, window=4, capacity=6)[0]
    np.testing.assert_array_equal(before[:4], static[:4])  # nothing was learned yet
    assert (np.abs(before[4:] - static[4:]) > 1e-6).all()


def test_a_small_step_lowers_the_same_windows_loss(world):
    params, tokens = world
    inputs, targets = tokens[8:12], tokens[9:13]
    _, caches = read(STILL, params, tokens[:9], window=4, capacity=6)

    @jax.jit
    def total(held, shift):
        whole = lambda held, shift: _total(params, held, shift, caches[-1], inputs, targets)[0]  # noqa: E731
        return jax.value_and_grad(whole, (0, 1))(held, shift)

    losses, _ = reader(optax.sgd(0.01), 1)[1](params, caches[-1], inputs, targets)
    held, zero = caches[-1].states, jax.tree.map(lambda x: np.zeros_like(x[:4]), caches[-1].states)
    before, slopes = total(held, zero)
    moved = jax.tree.map(lambda x, g: x - 0.01 * np.asarray(g), (held, zero), slopes)
    losses = np.asarray(losses)
    np.testing.assert_allclose(losses.sum(), before, rtol=1e-10)
    assert total(*moved)[0] < losses.sum() - 1e-4


def adam_by_hand(state, slope, rate):
    m, v, count = state
    m, v, count = 0.9 * m + 0.1 * slope, 0.999 * v + 0.001 * slope**2, count + 1
    move = -rate * (m / (1 - 0.9**count)) / (np.sqrt(v / (1 - 0.999**count)) + 1e-8)
    return move, (m, v, count)


@pytest.mark.parametrize("steps", [1, 2])
def test_every_state_keeps_its_own_moments_as_the_cache_slides(world, steps):
    """By hand: one Adam for each token in a dict, looked up by its place in the text."""
    params, tokens = world
    window, capacity, rate = 3, 5, 0.05
    held, history, losses = {}, {}, []
    zero = np.zeros((CONFIG.layers, 2, 4))
    for low in range(0, 18, window):
        places = list(range(low - capacity, low))
        fresh = list(range(low, low + window))
        shift = {i: {"keys": zero, "values": zero} for i in fresh}
        present = np.asarray([float(i >= 0) for i in places])
        for count in range(steps):
            nothing = {"keys": zero, "values": zero}
            old = _stack([held.get(i, nothing) for i in places])
            cache = cached.Past(old, present, np.asarray(low, np.int32))
            (_, (found, new)), (g_old, g_new) = slopes_of(
                params, old, _stack([shift[i] for i in fresh]), cache,
                tokens[low : low + window], tokens[low + 1 : low + 1 + window],
            )  # fmt: skip
            new, g_old, g_new = jax.tree.map(np.asarray, (new, g_old, g_new))
            if count == 0:
                losses.append(found)
            for at, i in enumerate(fresh):
                held[i] = {k: new[k][at] for k in new}
            for index, i in [*enumerate(places), *enumerate(fresh)]:
                if i < 0:
                    continue
                for k in ("keys", "values"):
                    slope = (g_new if i in fresh else g_old)[k][index]
                    past = history.get((i, k), (np.zeros_like(slope), np.zeros_like(slope), 0))
                    move, history[i, k] = adam_by_hand(past, slope, rate)
                    held[i] = held[i] | {k: held[i][k] + move}
                    if i in fresh:
                        shift[i] = shift[i] | {k: shift[i][k] + move}
    found, caches = read(
        optax.adam(rate), params, tokens[:19], window=window, capacity=capacity, steps=steps
    )
    np.testing.assert_allclose(found, np.concatenate(losses), rtol=1e-10, atol=1e-10)
    last, moments = caches[-1], caches[-1].opt_state[0]
    for index, i in enumerate(range(18 - capacity, 18)):
        for k in ("keys", "values"):
            m, v, count = history[i, k]
            np.testing.assert_allclose(last.states[k][index], held[i][k], rtol=1e-9, atol=1e-10)
            np.testing.assert_allclose(moments.mu[k][index], m, rtol=1e-9, atol=1e-10)
            np.testing.assert_allclose(moments.nu[k][index], v, rtol=1e-9, atol=1e-10)
            assert int(moments.count[index]) == count
    # A state that was read two windows ago has seen two steps more than the newest.
    assert np.asarray(moments.count).tolist() == [2 * steps] * 2 + [steps] * 3


def _total(params, held, shift, cache, inputs, targets):
    losses, new = LOSSES(params, cache._replace(states=held), inputs, targets, shift)
    return losses.sum(), (losses, new)


slopes_of = jax.jit(jax.value_and_grad(_total, (1, 2), has_aux=True))


def _stack(each):
    return {k: np.stack([e[k] for e in each]) for k in ("keys", "values")}


def test_texts_side_by_side_are_texts_alone(world):
    params, tokens = world
    other = (tokens * 3 + 1) % 13
    hso = hidden_states(LOSSES, ADAM)
    init, _ = reader(ADAM, 1)
    caches = _twice(init(cached.empty(CONFIG, 6, float)))
    step = jax.jit(jax.vmap(hso.step, in_axes=(None, 0, 0, 0)))
    both, found = np.stack([tokens, other]), []
    for low in (0, 4, 8):
        losses, caches = step(params, caches, both[:, low : low + 4], both[:, low + 1 : low + 5])
        found.append(losses)
    for mine, text in zip(np.concatenate(found, 1), both, strict=True):
        alone, _ = read(ADAM, params, text[:13], window=4, capacity=6)
        np.testing.assert_allclose(mine, alone, rtol=1e-10, atol=1e-10)


def _twice(tree):
    return jax.tree.map(lambda x: np.stack([x, x]), tree)


def test_what_has_no_meaning_is_refused(world):
    with pytest.raises(ValueError, match="it cannot be negative"):
        hidden_states(LOSSES, optax.sgd(0.1), steps=-1)
    params, tokens = world
    encoder = CONFIG._replace(causal=False)
    with pytest.raises(ValueError, match="an encoder reads the future"):
        cached.hidden(encoder, params, cached.none_yet(encoder, 4), tokens[:2])
