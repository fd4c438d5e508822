"""Masked language modelling as a teacher's own task, so that what it writes stays language."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jmeta.core.types import Array, Episode, Key, PyTree, Steps
from jmeta.methods.relaxations import at_outcomes
from jmeta.methods.rewriting import Batch, Network
from jmeta.methods.teacher import Auxiliary

Supervised = Callable[[PyTree, Batch, Key], tuple[Array, PyTree]]


def two_head_loss(teacher: Network) -> Supervised:
    r"""A teacher's cross-entropy to given tokens and labels, one mean for each head.

    .. math:: L = -\frac{\sum_i m_i \log T_x(\hat x_i)}{\sum_i m_i}
        - \frac{\sum_i w_i \log T_y(\hat y_i)}{\sum_i w_i}

    Args:
        teacher: ``(meta, batch, key) -> {"inputs", "labels"}``, scores ``[examples, time, vocab]``.

    Returns:
        ``(meta, batch, key) -> (loss, {"inputs", "labels"})`` of a batch ``{"tokens", "mask",
        "inputs", "labels", "weights"}``: what the teacher reads, what it should write, and which
        labels count.

    Example:
        >>> uniform = lambda meta, batch, key: {"inputs": meta, "labels": meta}
        >>> ones = jnp.ones((1, 2))
        >>> batch = dict.fromkeys(("tokens", "inputs", "labels"), jnp.array([[1, 2]]))
        >>> batch |= {"mask": ones, "weights": ones}
        >>> round(float(two_head_loss(uniform)(jnp.zeros((1, 2, 4)), batch, None)[0]), 3)  # 2 log 4
        2.773
    """

    def loss(meta: PyTree, batch: Batch, key: Key) -> tuple[Array, PyTree]:
        scores = teacher(meta, {"tokens": batch["tokens"], "mask": batch["mask"]}, key)
        parts = {
            "inputs": _mean_loss(scores["inputs"], batch["inputs"], batch["mask"]),
            "labels": _mean_loss(scores["labels"], batch["labels"], batch["weights"]),
        }
        return parts["inputs"] + parts["labels"], parts

    return loss


def mlm_auxiliary(supervised: Supervised) -> Auxiliary:
    r"""Two losses of a teacher: write an MLM example of a text, and answer one.

    With a text :math:`x`, its corruption :math:`x_m` and the labels :math:`y_m` of the hidden
    tokens: (a) from :math:`x` write :math:`(x_m, x)`; (b) from :math:`x_m` write
    :math:`(x_m, y_m)`, the labels only where a token is hidden. Each weighs 1.

    Args:
        supervised: ``two_head_loss(teacher)``, or a loss of the same kind that forms no scores of
            the whole vocabulary.

    Returns:
        ``(meta, episode, key) -> (loss, {"written", "answered"})``. The unlabelled batch of the
        episode has ``masked``: ``{"tokens" [examples, time], "labels", "weights"}``, as
        ``tasks.corruption.unlabelled`` makes it; :math:`x` is read off it, with the task token
        that :math:`x_m` begins with.

    Example:
        >>> supervised = lambda meta, batch, key: (batch["tokens"].sum(), {})
        >>> tokens, ones = jnp.array([[7, 8]]), jnp.array([[1.0, 1.0]])
        >>> pair = {"tokens": jnp.array([[7, 1]]), "labels": jnp.array([[0, 8]])}
        >>> pair["weights"] = jnp.array([[0.0, 1.0]])
        >>> batch = {"tokens": tokens, "mask": ones, "masked": pair}
        >>> _, parts = mlm_auxiliary(supervised)(None, Episode(batch), None)
        >>> int(parts["written"]), int(parts["answered"])  # reads 7 8, then 7 [MASK]
        (15, 8)

    Source: Shen (2021), section 3.3.
    """

    def of_batch(meta: PyTree, batch: Batch, key: Key) -> tuple[Array, PyTree]:
        if "masked" not in batch:
            raise ValueError(
                "auxiliary MLM losses need the unlabelled batch's own corruption: its entry "
                f"'masked' is missing among {sorted(batch)}"
            )
        corrupted, mask = batch["masked"], batch["mask"]
        hidden = corrupted["weights"] != 0
        text = jnp.where(hidden, corrupted["labels"], corrupted["tokens"])
        first, second = (None, None) if key is None else jax.random.split(key)
        target = {"mask": mask, "inputs": corrupted["tokens"]}
        write = {**target, "tokens": text, "labels": text, "weights": mask}
        answer = {**target, **corrupted}
        written, _ = supervised(meta, write, first)
        answered, _ = supervised(meta, answer, second)
        return written + answered, {"written": written, "answered": answered}

    def auxiliary(meta: PyTree, episode: Episode, key: Key) -> tuple[Array, PyTree]:
        if not isinstance(episode.support, Steps):
            return of_batch(meta, episode.support, key)
        losses, parts = jax.vmap(lambda batch: of_batch(meta, batch, key))(episode.support.batches)
        return jnp.mean(losses), jax.tree.map(jnp.mean, parts)

    return auxiliary


def _mean_loss(scores: Array, labels: Array, weights: Array) -> Array:
    losses = jax.nn.logsumexp(scores, axis=-1) - at_outcomes(scores, labels)
    counts = weights.astype(losses.dtype)
    total = counts.sum()
    return jnp.where(counts != 0, losses * counts, 0).sum() / jnp.where(total == 0, 1, total)
