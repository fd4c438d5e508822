"""CaMeLS: learn how much each token of a document should weigh when a model is fine-tuned on it.

The weights are the meta-parameters' answer to a document; questions about it are the outer loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jmeta.core.autodiff import GradTransform, mixed_mode_grad
from jmeta.core.inner import encode_episode, final, inner_loop, keys, start
from jmeta.core.types import Array, Episode, Key, Problem, PyTree, Steps, no_encoding

Batch: TypeAlias = dict[str, Any]
Scores: TypeAlias = Callable[[PyTree, Batch, Key], Array]
Weigh: TypeAlias = Callable[[PyTree, Batch, Key], Array]

FIRST_WEIGHT = 0.23104906018664842  # log(2) / 3, of every token while the head is new


def init_weight_head(width: int, key: Array, hidden: int = 128) -> PyTree:
    """Draws the head that turns a body's states into weights; its output layer is zero.

    Args:
        width: of the states.
        key: a PRNG key.
        hidden: width of the hidden layer.

    Returns:
        ``{"up", "down"}``, each ``{"kernel" [in, out], "bias" [out]}``.

    Example:
        >>> head = init_weight_head(4, jax.random.key(0))
        >>> first, pad = weight_head(head, jnp.ones((2, 4)), jnp.array([1, 0]))
        >>> print(f"{first:.4f} {pad:.4f}")
        0.2310 0.0000
    """
    kernel = jax.random.normal(key, (width, hidden)) / width**0.5
    return {
        "up": {"kernel": kernel, "bias": jnp.zeros(hidden)},
        "down": {"kernel": jnp.zeros((hidden, 1)), "bias": jnp.zeros(1)},
    }


def weight_head(params: PyTree, states: Array, mask: Array, *, normalise: bool = False) -> Array:
    r"""Weights of tokens from a causal body's states; real tokens have positive ones, pads none.

    .. math:: w_t = m_t \, \tfrac{1}{3} \log(1 + e^{3 z_t}), \qquad
        z_t = b_2 + W_2 \, \mathrm{GELU}(b_1 + W_1 h_t)

    Args:
        params: what ``init_weight_head`` returned.
        states: ``[..., time, width]``. The state of a token has read the text up to and including
            it, so its weight does not depend on what follows.
        mask: ``[..., time]``, 1 for tokens, 0 for padding.
        normalise: divide by the mean weight of each sequence's tokens, so that a document decides
            which tokens matter and not how much it does as a whole. A weight then does depend on
            what follows.

    Returns:
        ``[..., time]``.

    Raises:
        ValueError: a mask of another shape.

    Example:
        >>> head = init_weight_head(4, jax.random.key(0))
        >>> mask = jnp.array([[1, 1, 0]])
        >>> weight_head(head, jnp.ones((1, 3, 4)), mask, normalise=True).round(3).tolist()
        [[1.0, 1.0, 0.0]]
    """
    if mask.shape != states.shape[:-1]:
        raise ValueError(f"mask has shape {mask.shape}, states {states.shape}")
    flat = states.reshape(-1, states.shape[-1])
    up, down = params["up"], params["down"]
    z = jax.nn.gelu(flat @ up["kernel"] + up["bias"][None])
    z = (z @ down["kernel"] + down["bias"][None]).reshape(mask.shape)
    weights = jnp.where(mask != 0, jax.nn.softplus(3 * z) / 3, 0)
    if not normalise:
        return weights
    count = (mask != 0).sum(-1, keepdims=True).astype(weights.dtype)
    mean = weights.sum(-1, keepdims=True) / jnp.maximum(count, 1)
    return weights / jnp.where(count == 0, 1, mean)


def token_losses(scores: Array, tokens: Array) -> Array:
    """The negative log-likelihood of every token given those before it.

    Args:
        scores: ``[..., time, vocab]``, of the next token at every position.
        tokens: ``[..., time]`` int.

    Returns:
        ``[..., time]``, at the place of the token that is predicted; 0 for the first.

    Example:
        >>> print(token_losses(jnp.zeros((3, 4)), jnp.arange(3)).round(4))  # log 4
        [0.     1.3863 1.3863]
    """
    before, targets = scores[..., :-1, :], tokens[..., 1:]
    picked = jnp.take_along_axis(before, targets[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(before, axis=-1) - picked
    return jnp.concatenate([jnp.zeros_like(losses[..., :1]), losses], axis=-1)


def predicted(mask: Array) -> Array:
    """Which tokens are predicted, from real ones.

    Args:
        mask: ``[..., time]``, 1 for tokens, 0 for padding.

    Returns:
        ``[..., time]`` bool; never the first token of a sequence.

    Example:
        >>> predicted(jnp.array([0, 1, 1, 1, 0])).tolist()
        [False, False, True, True, False]
    """
    real = mask != 0
    later = real[..., 1:] & real[..., :-1]
    return jnp.concatenate([jnp.zeros_like(real[..., :1]), later], axis=-1)


def weighted_loss(losses: Array, weights: Array, counted: Array) -> Array:
    r"""Weighted losses of tokens over the number of those that count.

    .. math:: \frac{\sum_{bt} m_{bt} w_{bt} \ell_{bt}}{\sum_{bt} m_{bt}}

    The normaliser does not hold the weights: a document that weighs nothing moves nothing. Nor
    does it hold padding, with which short documents would take shorter steps.

    Args:
        losses: ``[..., time]``, as of ``token_losses``.
        weights: ``[..., time]``.
        counted: ``[..., time]``, which tokens count, as ``predicted`` says.

    Returns:
        A scalar; 0 where no token counts.

    Example:
        >>> losses, counted = jnp.array([0.0, 2.0, 4.0, 9.0]), predicted(jnp.array([1, 1, 1, 0]))
        >>> print(weighted_loss(losses, jnp.array([1.0, 1.0, 0.5, 1.0]), counted))
        2.0
    """
    counted = counted.astype(bool)
    total = counted.sum().astype(losses.dtype)
    # where: what stands at a pad may be anything.
    kept = jnp.where(counted, losses * weights.astype(losses.dtype), 0)
    return kept.sum() / jnp.where(total == 0, 1, total)


def divergence(before: Array, after: Array, mask: Array) -> Array:
    r"""How far the predictions of real tokens moved.

    .. math:: \frac{\sum_t m_t \, KL(p_{before,t} \,\|\, p_{after,t})}{\sum_t m_t}

    Args:
        before: scores ``[..., time, vocab]``.
        after: scores of that shape.
        mask: ``[..., time]``, 1 for tokens, 0 for padding.

    Returns:
        A scalar, not negative; exactly 0 where nothing moved.

    Example:
        >>> scores = jnp.array([[0.0, 1.0]])
        >>> print(divergence(scores, scores, jnp.ones(1)), divergence(scores, -scores, jnp.ones(1)))
        0.0 0.46211717
    """
    old, new = jax.nn.log_softmax(before), jax.nn.log_softmax(after)
    each = jnp.where(mask != 0, (jnp.exp(old) * (old - new)).sum(-1), 0)
    count = (mask != 0).sum().astype(each.dtype)
    return each.sum() / jnp.where(count == 0, 1, count)


def uniform(meta: PyTree, batch: Batch, key: Key) -> Array:
    """Every token weighs 1: ordinary fine-tuning, the baseline.

    Args:
        meta: not read.
        batch: with ``mask``.
        key: not read.

    Returns:
        ``[..., time]``.

    Example:
        >>> uniform((), {"mask": jnp.array([1, 1, 0])}, None).tolist()
        [1.0, 1.0, 0.0]
    """
    del meta, key
    return (batch["mask"] != 0).astype(jnp.float32)


def given(meta: PyTree, batch: Batch, key: Key) -> Array:
    """The weights that came with the documents: TF-IDF, salient spans, anything.

    Args:
        meta: not read.
        batch: with ``given`` ``[..., time]``.
        key: not read.

    Returns:
        ``[..., time]``.

    Example:
        >>> given((), {"given": jnp.array([0.0, 2.0])}, None).tolist()
        [0.0, 2.0]
    """
    del meta, key
    return batch["given"]


def token_weights(
    scores: Scores,
    weigh: Weigh,
    base: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    locality: float = 0.1,
) -> Problem:
    r"""The problem of CaMeLS: weights such that reading documents answers questions about them.

    .. math::
        \min_\phi \; CE(answers; \theta_T)
            + c_{kl} \, KL(p_{\theta_{base}} \,\|\, p_{\theta_T}), \qquad
        \theta_{t+1} = \theta_t - \alpha \nabla_\theta \frac{1}{N_t}
            \sum_i w_\phi(x_t)_i \, \ell_i(\theta_t; x_t), \qquad \theta_0 = \theta_{base}

    Give the documents as ``Steps``: one inner step on each in turn. The weights of all of them
    are computed at once, before the first step. The divergence is from the base that is passed,
    not from weights that have drifted. A base that is carried from one batch of documents to the
    next is ``persistent=True`` of the estimator, and ``restarting`` says when it begins anew.

    Args:
        scores: ``(params, batch, key) -> [..., time, vocab]``, a causal language model that reads
            ``tokens`` and ``mask``. Let it be deterministic: with dropout the divergence is not
            zero where nothing moved.
        weigh: ``(meta, batch, key) -> [..., time]``, the weight of each token: a body and
            ``weight_head``, or ``uniform`` or ``given``.
        base: the language model's parameters, where every inner loop starts.
        optimizer: of the inner loop, such as ``optax.sgd(5e-4)``.
        locality: :math:`c_{kl}`.

    Returns:
        A ``Problem`` for meta = what ``weigh`` reads. A support batch holds ``tokens`` and
        ``mask``; the query is ``{"questions": {"tokens", "mask", "answers"}, "locality":
        {"tokens", "mask"}}``, where ``answers`` ``[..., time]`` is 1 at the tokens of an answer;
        ``"locality"`` may be missing. ``aux`` is ``{"answers": CE, "divergence": KL}``.

    Raises:
        ValueError: a negative locality.

    Example:
        >>> import jmeta
        >>> batch = {"tokens": jnp.array([[0, 1, 2, 1]]), "mask": jnp.ones((1, 4))}
        >>> asked = {**batch, "answers": jnp.array([[0, 0, 1, 0]])}  # after 1 comes 2
        >>> problem = token_weights(
        ...     lambda params, batch, key: params[batch["tokens"]],  # a bigram model
        ...     lambda meta, batch, key: meta[batch["tokens"]],  # a weight for each word
        ...     jnp.zeros((3, 3)), optax.sgd(0.3), locality=0.0)
        >>> mg = jmeta.mixed_mode(problem, 1)
        >>> episode = jmeta.Episode(batch, {"questions": asked})
        >>> slope = jax.jit(mg.estimate)(jnp.ones(3), (), episode, None)[0]
        >>> print([f"{each:.4f}" for each in slope])  # 2 should weigh more
        ['0.0000', '0.0000', '-0.0644']

    Source: Hu et al., "Meta-Learning Online Adaptation of Language Models" (2023), section 3.
    """
    if locality < 0:
        raise ValueError(f"locality={locality} would reward what moves other predictions")

    def encode(meta: PyTree, batch: Batch, key: Key) -> Batch:
        if "questions" in batch:
            return batch
        return {**batch, "weights": weigh(meta, batch, key)}

    def inner(fast: PyTree, meta: PyTree, batch: Batch, key: Key) -> tuple[Array, PyTree]:
        losses = token_losses(scores(fast, batch, key), batch["tokens"])
        return weighted_loss(losses, batch["weights"], predicted(batch["mask"])), {}

    def outer(fast: PyTree, meta: PyTree, query: Batch, key: Key) -> tuple[Array, PyTree]:
        asked = query["questions"]
        losses = token_losses(scores(fast, asked, key), asked["tokens"])
        counted = predicted(asked["mask"]) & (asked["answers"] != 0)
        answers = weighted_loss(losses, jnp.ones_like(losses), counted)
        if "locality" not in query:
            return answers, {"answers": answers}
        other = query["locality"]
        before, after = (scores(params, other, key) for params in (base, fast))
        moved = divergence(before, after, other["mask"])
        return answers + locality * moved, {"answers": answers, "divergence": moved}

    return Problem(inner, outer, lambda meta: optimizer, lambda meta, key: base, encode)


def weight_slopes(
    problem: Problem,
    steps: int,
    meta: PyTree,
    episode: Episode,
    key: Key = None,
    *,
    grad: GradTransform = mixed_mode_grad,
) -> Array:
    r"""What a little more weight on each token does to the outer loss: a diagnostic to log.

    .. math:: \frac{\partial L_{out}}{\partial w_i} = -\frac{\alpha}{N}
        \langle \nabla L_{out}(\theta_1), \nabla \ell_i(\theta_0) \rangle

    That is its form after one step of SGD: a token should weigh more where its gradient points
    the way of the answers'. After more steps the same is differentiated exactly.

    Args:
        problem: of ``token_weights``.
        steps: inner steps.
        meta: the meta-parameters.
        episode: documents and questions.
        key: a PRNG key, or None.
        grad: how inner gradients are differentiated.

    Returns:
        The shape of the documents' tokens; 0 at tokens that are not predicted.

    Raises:
        ValueError: a problem whose documents have no weights.

    Example:
        >>> batch = {"tokens": jnp.array([[0, 1, 2, 1]]), "mask": jnp.ones((1, 4))}
        >>> asked = {**batch, "answers": jnp.array([[0, 0, 1, 0]])}
        >>> problem = token_weights(
        ...     lambda params, batch, key: params[batch["tokens"]], uniform, jnp.zeros((3, 3)),
        ...     optax.sgd(0.3))
        >>> episode = Episode(batch, {"questions": asked})
        >>> slopes_of = jax.jit(lambda episode: weight_slopes(problem, 1, (), episode))
        >>> slopes = slopes_of(episode)[0]  # the answer's helps, if read more
        >>> int(slopes.argmin()), f"{slopes[2]:.4f}"
        (2, '-0.0644')
    """
    first_key, encode_key, run_key = keys(key, 3)
    state = start(problem, meta, first_key)
    encoded = encode_episode(problem, meta, episode, encode_key)
    run = inner_loop(problem._replace(encode=no_encoding), steps, objective=final, grad=grad)
    marked = isinstance(encoded.support, Steps)
    batches = encoded.support.batches if isinstance(encoded.support, Steps) else encoded.support
    if "weights" not in batches:
        raise ValueError("the documents have no weights: this problem is not of token_weights")

    def loss(weights: Array) -> Array:
        changed = {**batches, "weights": weights}
        support = Steps(changed) if marked else changed
        return run(meta, state, Episode(support, encoded.query), run_key)[0]

    return jax.grad(loss)(batches["weights"])
