"""What a teacher may write: how what it scores becomes examples for a student.

How scores become something to write, distributions or draws, is for ``relaxations`` to say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jmeta.core.types import Array, Key, PyTree
from jmeta.methods.mask_budget import within_budget
from jmeta.methods.relaxations import Outcomes, at_outcomes, one_hot

Batch: TypeAlias = dict[str, Any]
Network: TypeAlias = Callable[[PyTree, Batch, Key], Any]

_NEVER = -1e30  # a score that softmax sends to exactly zero, finite so that no derivative is NaN


class Rewriting(NamedTuple):
    r"""What a teacher writes.

    Its distribution factorises over heads and positions,
    :math:`T(z \mid x) = \prod_h \prod_i \mathrm{softmax}(s_{hi})_{z_{hi}}`.

    Attributes:
        scores: ``(meta, batch, key) -> {head: [examples, ..., outcomes]}``.
        write: ``({head: outcomes}, batch) -> batch`` for the student; outcomes are distributions
            ``[examples, ..., outcomes]`` (float) or draws ``[examples, ...]`` (int).
        counts: ``batch -> [examples, ...]``, 1 at the places that are the teacher's to write.
    """

    scores: Callable[[PyTree, Batch, Key], Outcomes]
    write: Callable[[Outcomes, Batch], Batch]
    counts: Callable[[Batch], Array]


def inputs_and_labels(teacher: Network) -> Rewriting:
    """The teacher writes the whole pseudo-example: every token of it, and every label.

    Args:
        teacher: ``(meta, batch, key) -> {"inputs", "labels"}``, scores ``[examples, time, vocab]``,
            of a batch ``{"tokens" int, "mask"}``, both ``[examples, time]``.

    Returns:
        A ``Rewriting``; pads stay pads, and their labels do not count.

    Example:
        >>> batch = {"tokens": jnp.array([[1, 2]]), "mask": jnp.array([[1.0, 1.0]])}
        >>> network = lambda meta, batch, key: {"inputs": meta, "labels": -meta}
        >>> teacher = inputs_and_labels(network)
        >>> scores = teacher.scores(jnp.ones((1, 2, 3)), batch, None)
        >>> teacher.write(jax.tree.map(jax.nn.softmax, scores), batch)["labels"].shape
        (1, 2, 3)

    Source: Shen, "Meta-Learned Language Modelling Objective" (2021).
    """
    return Rewriting(
        lambda meta, batch, key: _only(teacher(meta, batch, key), "inputs", "labels"),
        lambda made, batch: {
            "tokens": made["inputs"],
            "mask": batch["mask"],
            "labels": made["labels"],
            "weights": batch["mask"],
        },
        lambda batch: batch["mask"],
    )


def inputs_only(teacher: Network) -> Rewriting:
    """The teacher writes the tokens; the labels are the original tokens, at every position.

    Args:
        teacher: as ``inputs_and_labels`` takes it; ``labels`` may be missing, and are not used.

    Returns:
        A ``Rewriting``: denoising, of a noise that is learned.

    Example:
        >>> batch = {"tokens": jnp.array([[1, 2]]), "mask": jnp.array([[1.0, 1.0]])}
        >>> teacher = inputs_only(lambda meta, batch, key: {"inputs": meta})
        >>> pseudo = teacher.write({"inputs": jnp.array([[0, 2]])}, batch)
        >>> pseudo["tokens"].tolist(), pseudo["labels"].tolist()
        ([[0, 2]], [[1, 2]])

    Source: Shen (2021), the variant "fixed y".
    """
    return Rewriting(
        lambda meta, batch, key: _only(teacher(meta, batch, key), "inputs"),
        lambda made, batch: {
            "tokens": made["inputs"],
            "mask": batch["mask"],
            "labels": batch["tokens"],
            "weights": batch["mask"],
        },
        lambda batch: batch["mask"],
    )


def masks_only(teacher: Network, mask_token: int, *, share: float | None = None) -> Rewriting:
    """The teacher chooses which positions to mask; the student finds the masked tokens again.

    In expectation an input is the mean of the token and [MASK], weighted by the probability, which
    is also how much the label counts. Such an input still shows the token: a student learns to copy
    it. ``soft_teacher(relax=straight_through)`` draws the masks.

    Args:
        teacher: ``(meta, batch, key) -> [examples, time]``: the log-odds of masking.
        mask_token: the id of [MASK].
        share: the mean probability of masking over the positions of each example, which leaves the
            teacher to choose the places (``within_budget``); None: it chooses how many, too.

    Returns:
        A ``Rewriting`` with the head ``masked``, whose two outcomes are to leave and to mask. Where
        the batch has ``ordinary`` ``[examples, time]``, only its positions can be masked.

    Raises:
        ValueError: when traced, if ``share`` is not between 0 and 1.

    Example:
        >>> batch = {"tokens": jnp.array([[5, 6]]), "mask": jnp.array([[1.0, 1.0]])}
        >>> teacher = masks_only(lambda meta, batch, key: meta, mask_token=1)
        >>> pseudo = teacher.write({"masked": jnp.array([[0, 1]])}, batch)
        >>> pseudo["tokens"].tolist(), pseudo["labels"].tolist(), pseudo["weights"].tolist()
        ([[5, 1]], [[5, 6]], [[0.0, 1.0]])
    """

    def scores(meta: PyTree, batch: Batch, key: Key) -> Outcomes:
        odds = teacher(meta, batch, key)
        if share is not None:
            odds = within_budget(odds, counts(batch), share)
        return {"masked": jnp.stack([jnp.zeros_like(odds), odds], axis=-1)}

    def write(made: Outcomes, batch: Batch) -> Batch:
        tokens, may = batch["tokens"], counts(batch)
        masks = jnp.full_like(tokens, mask_token)
        if jnp.issubdtype(made["masked"].dtype, jnp.integer):
            chosen = (made["masked"] == 1) & (may != 0)
            inputs, weights = jnp.where(chosen, masks, tokens), chosen.astype(may.dtype)
        else:
            weights = made["masked"][..., 1] * may.astype(made["masked"].dtype)
            shares = jnp.stack([1 - weights, weights], axis=-1)
            inputs = {"ids": jnp.stack([tokens, masks], axis=-1), "shares": shares}
        return {"tokens": inputs, "mask": batch["mask"], "labels": tokens, "weights": weights}

    def counts(batch: Batch) -> Array:
        return batch.get("ordinary", batch["mask"])

    return Rewriting(scores, write, counts)


def replacements(teacher: Network, *, share: float | None = None) -> Rewriting:
    r"""The teacher writes other tokens in place of some; the student finds those again.

    As ``inputs_only``, but a label counts only where the teacher changed the token:

    .. math:: w_i = 1 - z_{i, x_i}

    for what is written, :math:`z_i`. A student that is asked for every token learns to copy the
    nine of ten that stand as they were; so it does from a mean, which shows the token:
    ``soft_teacher(relax=straight_through)`` draws what is written.

    Args:
        teacher: as ``inputs_and_labels`` takes it; ``labels`` may be missing, and are not used.
        share: the mean probability of a change over the positions of each example, which leaves
            the teacher to choose where, and what for (``within_budget``); None: it chooses how
            many, too.

    Returns:
        A ``Rewriting``. Where the batch has ``ordinary`` ``[examples, time]``, only its positions
        can be changed: of others the distribution is the token itself.

    Raises:
        ValueError: when traced, if ``share`` is not between 0 and 1.

    Example:
        >>> batch = {"tokens": jnp.array([[1, 2]]), "mask": jnp.array([[1.0, 1.0]])}
        >>> teacher = replacements(lambda meta, batch, key: {"inputs": meta})
        >>> pseudo = teacher.write({"inputs": jnp.array([[0, 2]])}, batch)
        >>> pseudo["tokens"].tolist(), pseudo["labels"].tolist(), pseudo["weights"].tolist()
        ([[0, 2]], [[1, 2]], [[1.0, 0.0]])

    Source: the generator of Clark et al., "ELECTRA" (2020), whose student here restores tokens.
    """

    def scores(meta: PyTree, batch: Batch, key: Key) -> Outcomes:
        found = _only(teacher(meta, batch, key), "inputs")["inputs"]
        stays = one_hot(batch["tokens"], found.shape[-1])
        if share is not None:
            kept = at_outcomes(found, batch["tokens"])
            others = jax.nn.logsumexp(jnp.where(stays, _NEVER, found), axis=-1)
            shifted = within_budget(others - kept, counts(batch), share)
            found = jnp.where(stays, (others - shifted)[..., None], found)
        fixed = jnp.where(stays, 0, _NEVER).astype(found.dtype)
        return {"inputs": jnp.where(counts(batch)[..., None] != 0, found, fixed)}

    def write(made: Outcomes, batch: Batch) -> Batch:
        written, tokens, may = made["inputs"], batch["tokens"], counts(batch)
        if jnp.issubdtype(written.dtype, jnp.integer):
            changed = (written != tokens).astype(may.dtype)
        else:
            # Not one less what stays: of a draw that leaves the token this is exactly zero.
            changed = jnp.where(one_hot(tokens, written.shape[-1]), 0, written).sum(-1)
        weights = changed * may.astype(changed.dtype)
        return {"tokens": written, "mask": batch["mask"], "labels": tokens, "weights": weights}

    def counts(batch: Batch) -> Array:
        return batch.get("ordinary", batch["mask"])

    return Rewriting(scores, write, counts)


def class_labels(teacher: Network) -> Rewriting:
    """The teacher labels an example with one class; the example stays as it is.

    Args:
        teacher: ``(meta, batch, key) -> [examples, classes]``.

    Returns:
        A ``Rewriting`` of any batch (a dict of arrays with a leading axis of examples): it gets
        ``labels``, and ``weights`` of one for each example.

    Example:
        >>> teacher = class_labels(lambda meta, batch, key: batch["x"] @ meta)
        >>> pseudo = teacher.write({"labels": jnp.array([1])}, {"x": jnp.ones((1, 3))})
        >>> sorted(pseudo)
        ['labels', 'weights', 'x']

    Source: Pham et al., "Meta Pseudo Labels" (2021).
    """

    def counts(batch: Batch) -> Array:
        first = jax.tree.leaves(batch)[0]
        return jnp.ones(first.shape[:1])

    return Rewriting(
        lambda meta, batch, key: {"labels": teacher(meta, batch, key)},
        lambda made, batch: {**batch, "labels": made["labels"], "weights": counts(batch)},
        counts,
    )


def without(teacher: Network, ids: Sequence[int]) -> Network:
    """A teacher that never writes some tokens, such as [PAD], which is not a class.

    Args:
        teacher: a network whose scores end with an axis of the vocabulary.
        ids: the tokens, an ``int`` each.

    Returns:
        The network with their probability at exactly zero, in every head.

    Example:
        >>> teacher = without(lambda meta, batch, key: {"inputs": jnp.zeros((1, 2, 3))}, [0])
        >>> jax.nn.softmax(teacher(None, None, None)["inputs"])[0, 0].tolist()
        [0.0, 0.5, 0.5]
    """

    def restricted(meta: PyTree, batch: Batch, key: Key) -> Any:
        def forbid(scores: Array) -> Array:
            vocab = scores.shape[-1]
            if not all(0 <= i < vocab for i in ids):
                raise ValueError(f"the tokens {list(ids)} are not all in a vocabulary of {vocab}")
            never = jnp.zeros(vocab, bool).at[jnp.asarray(ids)].set(True)
            return jnp.where(never.reshape((1,) * (scores.ndim - 1) + (-1,)), _NEVER, scores)

        return jax.tree.map(forbid, teacher(meta, batch, key))

    return restricted


def _only(scores: Any, *names: str) -> Outcomes:
    missing = [name for name in names if name not in scores]
    if missing:
        raise ValueError(f"the teacher returned {sorted(scores)}; {missing} is missing")
    return {name: scores[name] for name in names}
