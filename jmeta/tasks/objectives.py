"""Self-supervised objectives that run on the device: tokens and a key in, an example to learn from.

All are pure, jitted as part of a training step, and the same on every device for the same key.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmeta.core.types import Array
from jmeta.tasks.tokenizer import Unified, Vocabulary, ordinary_ids

Batch = dict[str, Array]


class Words(NamedTuple):
    """What an objective must know of a vocabulary.

    Attributes:
        pad: the id that pads rows, at their end.
        mask: the id of [MASK], or None.
        ordinary: int32 ids that are no special token: what may be hidden, deleted or drawn.
        is_ordinary: bool ``[size]``, the same as a table.
    """

    pad: int
    mask: int | None
    ordinary: np.ndarray
    is_ordinary: np.ndarray


def words_of(vocabulary: Vocabulary | Unified) -> Words:
    """What an objective must know of a vocabulary.

    Args:
        vocabulary: a model's own, or the unified one.

    Returns:
        A ``Words``.

    Raises:
        ValueError: every token is special.

    Example:
        >>> from jmeta.tasks.bpe import train_bpe
        >>> from jmeta.tasks.tokenizer import vocabulary
        >>> words = words_of(vocabulary(train_bpe(["a text"], 300)))
        >>> words.pad, words.mask, words.is_ordinary[:6].tolist()
        (0, 1, [False, False, False, False, False, True])
    """
    if isinstance(vocabulary, Unified):
        return from_ids(vocabulary.pad, vocabulary.mask, vocabulary.ordinary, vocabulary.size)
    named = (vocabulary.pad, vocabulary.cls, vocabulary.sep, vocabulary.mask, vocabulary.eos)
    ordinary = ordinary_ids(vocabulary.tokenizer, {each for each in named if each is not None})
    return from_ids(vocabulary.pad, vocabulary.mask, ordinary, vocabulary.size)


def from_ids(pad: int, mask: int | None, ordinary: np.ndarray, size: int) -> Words:
    """A ``Words`` of ids alone.

    Args:
        pad: the id that pads.
        mask: the id of [MASK], or None.
        ordinary: ids that are no special token.
        size: of the vocabulary.

    Returns:
        A ``Words``.

    Raises:
        ValueError: no token is ordinary.

    Example:
        >>> from_ids(0, 1, np.array([3, 4]), 5).is_ordinary.tolist()
        [False, False, False, True, True]
    """
    ordinary = np.asarray(ordinary, np.int32)
    if not len(ordinary):
        raise ValueError("every token of the vocabulary is special: nothing can be corrupted")
    is_ordinary = np.zeros(size, bool)
    is_ordinary[ordinary] = True
    return Words(pad, mask, ordinary, is_ordinary)


def is_ordinary(tokens: Array, words: Words) -> Array:
    """Which tokens are no special ones: bool, of the shape of ``tokens``."""
    return jnp.take(jnp.asarray(words.is_ordinary), tokens, mode="clip")


def present(tokens: Array, words: Words) -> Array:
    """Which positions hold a token and no padding: float32, of the shape of ``tokens``."""
    return (tokens != words.pad).astype(jnp.float32)


def draw_ordinary(key: Array, shape: tuple[int, ...], words: Words) -> Array:
    """Ordinary tokens, each as likely as any: int32 of a shape."""
    table = jnp.asarray(words.ordinary)
    return table[jax.random.randint(key, shape, 0, len(words.ordinary))]


def choose(eligible: Array, share: float, key: Array) -> Array:
    r"""A share of the eligible positions of each row, without replacement, exact in the mean.

    .. math:: n_{chosen} = \lfloor s n + U \rfloor, \qquad U \sim \mathrm{Uniform}[0, 1),
        \qquad E[n_{chosen}] = s n

    Args:
        eligible: bool ``[..., positions]``.
        share: :math:`s`, in [0, 1].
        key: a random key.

    Returns:
        bool, like ``eligible``.

    Example:
        >>> chosen = choose(jnp.ones((1000, 5), bool), 0.5, jax.random.key(0)).sum(-1)
        >>> sorted(set(chosen.tolist()))
        [2, 3]
    """
    order_key, round_key = jax.random.split(key)
    count = eligible.sum(-1, keepdims=True).astype(jnp.float32)
    wanted = jnp.floor(share * count + jax.random.uniform(round_key, count.shape))
    places = jnp.where(eligible, jax.random.uniform(order_key, eligible.shape), 2.0)
    rank = jnp.argsort(jnp.argsort(places, -1), -1)
    return eligible & (rank.astype(jnp.float32) < wanted)


def mlm(
    tokens: Array,
    key: Array,
    words: Words,
    *,
    select: float = 0.15,
    keep: float = 0.1,
    random: float = 0.1,
) -> Batch:
    """Masked language modelling: hide a share of the ordinary tokens of each row and ask for them.

    Of n ordinary tokens, ``floor(select * n + U)`` with U uniform in [0, 1) are selected. Of
    these, some stay as they are, some become an ordinary token at random, the others [MASK].

    Args:
        tokens: int32 ``[..., positions]``, padded at the end.
        key: a random key.
        words: what is special.
        select: the share selected.
        keep: of these, the share left as it is.
        random: of these, the share replaced at random.

    Returns:
        ``tokens`` int32, corrupted; ``mask`` float32, 1 for tokens and 0 for padding; ``labels``
        int32, the original tokens; ``weights`` float32, 1 where one is asked for. All
        ``[..., positions]``.

    Raises:
        ValueError: the shares are none, or the vocabulary has no [MASK].

    Example:
        >>> words = from_ids(0, 1, np.arange(3, 9), 9)
        >>> batch = mlm(jnp.array([[2, 5, 6, 7, 8, 2, 0]]), jax.random.key(0), words, select=0.5)
        >>> batch["weights"].sum(), batch["weights"][0, jnp.array([0, 5, 6])].sum()
        (Array(2., dtype=float32), Array(0., dtype=float32))

    Source: Devlin et al., "BERT" (2019), section 3.1.
    """
    return _hidden(tokens, is_ordinary(tokens, words), key, words, select, keep, random)


def guided_mlm(
    tokens: Array,
    guide: Array,
    key: Array,
    words: Words,
    *,
    select: float = 0.5,
    keep: float = 0.1,
    random: float = 0.1,
) -> Batch:
    """Guided masked language modelling: hide only tokens that a guide points at.

    Args:
        tokens: as in ``mlm``.
        guide: bool ``[..., positions]``: entities, rare words, emphasis (``tasks.guides``).
        key: a random key.
        words: what is special; special tokens are never hidden, whatever the guide says.
        select: the share of the tokens pointed at that is selected.
        keep: as in ``mlm``.
        random: as in ``mlm``.

    Returns:
        As ``mlm``. A row without a token pointed at has no label.

    Raises:
        ValueError: the shares are none, or the vocabulary has no [MASK].

    Example:
        >>> words = from_ids(0, 1, np.arange(3, 9), 9)
        >>> tokens, guide = jnp.array([[2, 5, 6, 7, 2]]), jnp.array([[1, 0, 1, 0, 0]], bool)
        >>> guided_mlm(tokens, guide, jax.random.key(0), words, select=1.0)["weights"].tolist()
        [[0.0, 0.0, 1.0, 0.0, 0.0]]

    Source: Wu et al., "Adaptive Sampling over Pre-training Objectives" (2022), "emlm".
    """
    return _hidden(tokens, guide & is_ordinary(tokens, words), key, words, select, keep, random)


def causal_lm(tokens: Array, key: Array, words: Words) -> Batch:
    """Causal language modelling: the text as it is; every token but the first is asked for.

    Args:
        tokens: as in ``mlm``.
        key: not used: nothing here is random.
        words: what pads.

    Returns:
        ``tokens``, ``mask`` and ``weights`` (at the token that is predicted) for a decoder.

    Example:
        >>> words = from_ids(0, None, np.arange(3, 9), 9)
        >>> causal_lm(jnp.array([[5, 6, 7, 0]]), None, words)["weights"].tolist()
        [[0.0, 1.0, 1.0, 0.0]]
    """
    del key
    mask = present(tokens, words)
    first = jnp.arange(tokens.shape[-1]) == 0
    weights = jnp.where(jnp.broadcast_to(first, tokens.shape), 0.0, mask)
    return {"tokens": tokens, "mask": mask, "weights": weights}


def _hidden(
    tokens: Array, eligible: Array, key: Array, words: Words, select: float, keep: float,
    random: float,
) -> Batch:  # fmt: skip
    if not (0 <= select <= 1 and keep >= 0 and random >= 0 and keep + random <= 1):
        raise ValueError(f"select={select}, keep={keep} and random={random} are no shares")
    if words.mask is None:
        raise ValueError("the vocabulary has no [MASK]: this objective needs one")
    choice, fate_key, noise_key = jax.random.split(key, 3)
    chosen = choose(eligible, select, choice)
    fate = jax.random.uniform(fate_key, tokens.shape)
    noise = draw_ordinary(noise_key, tokens.shape, words)
    changed = jnp.where(fate < keep + random, noise, jnp.full_like(noise, words.mask))
    inputs = jnp.where(chosen & (fate >= keep), changed, tokens)
    return {
        "tokens": inputs,
        "mask": present(tokens, words),
        "labels": tokens,
        "weights": chosen.astype(jnp.float32),
    }
