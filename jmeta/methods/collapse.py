"""Whether a teacher has collapsed: entropies, what it copies and masks, and panels of its text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmeta.core.types import Array
from jmeta.methods.relaxations import Outcomes
from jmeta.methods.rewriting import Batch


def monitors(
    scores: Outcomes,
    batch: Batch,
    *,
    mask_token: int,
    label_tokens: Sequence[int] = (),
) -> dict[str, Array]:
    r"""How far a teacher's output is from language, as means over all that it writes.

    A healthy teacher has entropies between 0 and :math:`\log V`, copies some tokens and not all,
    and writes the labels of tasks (such as [CLSk]) rarely. One that writes the same everywhere has
    an ``inputs_variety`` of one over the number of different tokens that it read.

    Args:
        scores: ``rewriting.scores(meta, batch, None)``: ``inputs`` and, as far as there,
            ``labels``, both ``[examples, time, vocab]``; or ``masked`` ``[examples, time, 2]``.
        batch: ``tokens`` int and ``mask``, ``[examples, time]``; of ``masks_only`` also
            ``ordinary``.
        mask_token: the id of [MASK].
        label_tokens: the ids that stand for classes of the labelled tasks.

    Returns:
        Scalars. For each of the two heads ``<head>_entropy``, the mean entropy in nats;
        ``<head>_confidence``, the mean probability of the likeliest token; ``<head>_variety``, how
        many different tokens are the likeliest somewhere, over how many different ones were read:
        1 for a copier, and at most 1, since one that writes more kinds than it read lacks none;
        and the mean probability that a position is ``<head>_copied``, is [MASK]
        (``<head>_masked``) or is a label token (``<head>_label_tokens``). For the head ``masked``:
        ``masked_entropy`` and ``mask_rate``.

    Example:
        >>> batch = {"tokens": jnp.array([[3, 4]]), "mask": jnp.ones((1, 2))}
        >>> copies = {"inputs": 60 * jax.nn.one_hot(batch["tokens"], 6)}
        >>> found = monitors(copies, batch, mask_token=1)
        >>> float(found["inputs_copied"]), float(found["inputs_variety"])
        (1.0, 1.0)
    """
    found: dict[str, Array] = {}
    for name, each in scores.items():
        counts = batch.get("ordinary", batch["mask"]) if name == "masked" else batch["mask"]
        share = counts.astype(each.dtype) / jnp.maximum(counts.sum(), 1).astype(each.dtype)
        log_p = jax.nn.log_softmax(each, axis=-1)
        p = jnp.exp(log_p)

        def mean(values: Array, share: Array = share) -> Array:
            return jnp.where(share > 0, share * values, 0).sum()

        found[f"{name}_entropy"] = mean(-jnp.where(p > 0, p * log_p, 0).sum(-1))
        if name == "masked":
            found["mask_rate"] = mean(p[..., 1])
            continue
        kinds = _kinds(each.argmax(-1), counts, each.shape[-1]).astype(each.dtype)
        read = _kinds(batch["tokens"], counts, each.shape[-1]).astype(each.dtype)
        found[f"{name}_variety"] = jnp.minimum(kinds / jnp.maximum(read, 1), 1)
        found[f"{name}_confidence"] = mean(p.max(-1))
        copied = jnp.take_along_axis(p, batch["tokens"][..., None], axis=-1)[..., 0]
        found[f"{name}_copied"] = mean(copied)
        found[f"{name}_masked"] = mean(p[..., mask_token])
        if label_tokens:
            found[f"{name}_label_tokens"] = mean(p[..., jnp.asarray(label_tokens)].sum(-1))
    return found


def _kinds(tokens: Array, counts: Array, vocab: int) -> Array:
    """How many different tokens there are at the places that count."""
    kept = jnp.where(counts != 0, tokens, vocab).ravel()  # others: out of range
    return jnp.zeros(vocab, jnp.int32).at[kept].set(1, mode="drop").sum()


def has_collapsed(found: dict[str, Any], *, variety: float = 0.25, copied: float = 0.99) -> str:
    """Says in words what is wrong with a teacher, or nothing.

    Args:
        found: of ``monitors``.
        variety: the least variety that is no collapse: by default a teacher that writes fewer than
            a quarter as many different tokens as it read has collapsed, as has one that writes the
            same everywhere where it read five different ones or more.
        copied: the largest share of copied tokens that is no collapse.

    Returns:
        ``""``, or one sentence for each head that writes a few tokens everywhere or only copies.

    Example:
        >>> has_collapsed({"inputs_variety": 0.01, "inputs_copied": 0.0})
        'inputs: the same few tokens are written everywhere'
    """
    said = []
    for head in ("inputs", "labels"):
        if found.get(f"{head}_variety", 1.0) < variety:
            said.append(f"{head}: the same few tokens are written everywhere")
    if found.get("inputs_copied", 0.0) > copied:
        said.append("inputs: the text is copied as it is")
    rate = found.get("mask_rate")
    if rate is not None and not 0.01 <= rate <= 0.99:
        said.append("masks: nearly nothing is masked" if rate < 0.5 else "masks: all is masked")
    return "; ".join(said)


def panels(
    batch: Batch,
    pseudo: Batch,
    decode: Callable[[list[int]], str],
    *,
    examples: int = 4,
) -> str:
    """Texts side by side: what the teacher read, what it wrote, and how it labelled it.

    Args:
        batch: ``tokens`` and ``mask``, ``[examples, time]``.
        pseudo: what ``rewriting.write`` made of draws, or of distributions, of which the likeliest
            token is shown; labels that do not count are shown as ``.``.
        decode: ids to text, such as ``tokenizer.decode`` without skipping special tokens.
        examples: how many to show.

    Returns:
        Three lines for each example, for a log or a report.

    Example:
        >>> batch = {"tokens": jnp.array([[3, 4, 0]]), "mask": jnp.array([[1, 1, 0]])}
        >>> pseudo = {**batch, "labels": jnp.array([[5, 6, 0]]), "weights": jnp.array([[0, 1, 0]])}
        >>> print(panels(batch, pseudo, lambda ids: " ".join(map(str, ids))))
        x      3 4
        wrote  3 4
        labels . 6
    """
    read, mask = np.asarray(batch["tokens"]), np.asarray(batch["mask"]) != 0
    wrote, labels = _likeliest(pseudo["tokens"]), _likeliest(pseudo["labels"])
    counts = np.asarray(pseudo["weights"]) > 0
    lines = []
    for row in range(min(examples, len(read))):
        real = mask[row]
        named = [
            decode([int(token)]).strip() if count else "."
            for token, count in zip(labels[row][real], counts[row][real], strict=True)
        ]
        lines += [
            f"x      {decode(read[row][real].tolist())}",
            f"wrote  {decode(wrote[row][real].tolist())}",
            f"labels {' '.join(named)}",
        ]
    return "\n".join(lines)


def _likeliest(tokens: Any) -> np.ndarray:
    if isinstance(tokens, dict):
        best = np.asarray(tokens["shares"]).argmax(-1)
        return np.take_along_axis(np.asarray(tokens["ids"]), best[..., None], -1)[..., 0]
    tokens = np.asarray(tokens)
    return tokens if np.issubdtype(tokens.dtype, np.integer) else tokens.argmax(-1)
