"""Self-supervised objectives: rows of tokens in, an example to learn from out.

Each is a function ``(tokens, rng, vocabulary, **options) -> batch``, so that one can stand for
another wherever text is corrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from jmeta.tasks.tokenizer import Unified

Batch: TypeAlias = dict[str, np.ndarray]
Objective: TypeAlias = Callable[..., Batch]


def ordinary_tokens(tokens: np.ndarray, vocabulary: Unified) -> np.ndarray:
    """Which tokens are no special ones, bool of the shape of ``tokens``."""
    is_ordinary = np.zeros(vocabulary.size, bool)
    is_ordinary[vocabulary.ordinary] = True
    return is_ordinary[tokens]


def choose(eligible: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    r"""A share of the eligible positions of each row, without replacement, exact in the mean.

    .. math:: n_{chosen} = \lfloor s n + U \rfloor, \qquad U \sim \mathrm{Uniform}[0, 1),
        \qquad E[n_{chosen}] = s n

    Args:
        eligible: bool ``[..., positions]``.
        share: :math:`s`, in [0, 1].
        rng: the generator.

    Returns:
        bool, like ``eligible``.

    Example:
        >>> chosen = choose(np.ones((1000, 5), bool), 0.5, np.random.default_rng(0)).sum(-1)
        >>> sorted(set(chosen.tolist()))
        [2, 3]
    """
    wanted = np.floor(share * eligible.sum(-1) + rng.random(eligible.shape[:-1]))
    keys = np.where(eligible, rng.random(eligible.shape), 2)
    return keys.argsort(-1).argsort(-1) < wanted[..., None]


def masked_lm(
    tokens: np.ndarray,
    rng: np.random.Generator,
    vocabulary: Unified,
    *,
    select: float = 0.15,
    keep: float = 0.1,
    random: float = 0.1,
) -> Batch:
    """Masked language modelling: hide some of the ordinary tokens of each row, and ask for them.

    Of the n ordinary tokens of a row, ``floor(select * n + U)`` with U uniform in [0, 1) are
    selected without replacement. Of these, some stay, some become an ordinary token or [SEP] at
    random, and the others [MASK]. Special tokens are never touched.

    Args:
        tokens: int ``[..., positions]``, padded with [PAD].
        rng: the generator.
        vocabulary: says what is special.
        select: the share selected.
        keep: of these, the share left as it is.
        random: of these, the share replaced at random.

    Returns:
        ``tokens`` int32, corrupted; ``labels`` int32, [PAD] where nothing was selected; ``weights``
        float32, 1 where something was; ``mask`` float32, 1 for tokens and 0 for padding. All
        ``[..., positions]``.

    Raises:
        ValueError: the shares are none, or a token is not in the vocabulary.

    Source:
        Devlin et al. 2019, "BERT", section 3.1.
    """
    tokens = _checked(tokens, vocabulary, select, keep, random)
    chosen = choose(ordinary_tokens(tokens, vocabulary), select, rng)
    inputs = np.where(chosen, _noise(tokens, rng, vocabulary, keep, random), tokens)
    return {
        "tokens": inputs.astype(np.int32),
        "mask": (tokens != vocabulary.pad).astype(np.float32),
        "labels": np.where(chosen, tokens, vocabulary.pad).astype(np.int32),
        "weights": chosen.astype(np.float32),
    }


def denoising(
    tokens: np.ndarray,
    rng: np.random.Generator,
    vocabulary: Unified,
    *,
    select: float = 0.15,
    keep: float = 0.1,
    random: float = 0.1,
) -> Batch:
    """Denoising: the same corruption, but every token is asked for, not the hidden ones alone.

    Args:
        tokens: as in ``masked_lm``.
        rng: the generator.
        vocabulary: says what is special.
        select: as in ``masked_lm``.
        keep: as in ``masked_lm``.
        random: as in ``masked_lm``.

    Returns:
        As ``masked_lm``; ``labels`` are the original tokens and ``weights`` the mask.

    Raises:
        ValueError: the shares are none, or a token is not in the vocabulary.
    """
    batch = masked_lm(tokens, rng, vocabulary, select=select, keep=keep, random=random)
    return {**batch, "labels": np.asarray(tokens, np.int32), "weights": batch["mask"]}


def unlabelled(batch: Batch, vocabulary: Unified) -> dict[str, Any]:
    """What a teacher reads: the text itself, with [CLS0] in front, and its corruption beside it.

    Args:
        batch: of ``masked_lm`` or ``denoising``, whose labels are the tokens that were there; its
            rows begin with a task token.
        vocabulary: the vocabulary.

    Returns:
        ``tokens`` int32, the text again; ``mask`` float32; ``ordinary`` float32, 1 where a token
        is no special one; and ``masked``, a batch of the corrupted ``tokens``, ``labels`` and
        ``weights``, with the task token they came with. All ``[..., positions]``.
    """
    text = np.where(batch["weights"] != 0, batch["labels"], batch["tokens"])
    text[..., 0] = vocabulary.cls[0]
    return {
        "tokens": text,
        "mask": batch["mask"],
        "ordinary": ordinary_tokens(text, vocabulary).astype(np.float32),
        "masked": {name: batch[name] for name in ("tokens", "labels", "weights")},
    }


def _checked(
    tokens: np.ndarray, vocabulary: Unified, select: float, keep: float, random: float
) -> np.ndarray:
    if not (0 <= select <= 1 and keep >= 0 and random >= 0 and keep + random <= 1):
        raise ValueError(f"select={select}, keep={keep} and random={random} are no shares")
    tokens = np.asarray(tokens, np.int32)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocabulary.size:
        raise ValueError(
            f"the tokens are {tokens.min()} to {tokens.max()}, the vocabulary has "
            f"{vocabulary.size} entries"
        )
    return tokens


def _noise(
    tokens: np.ndarray, rng: np.random.Generator, vocabulary: Unified, keep: float, random: float
) -> np.ndarray:
    """What stands in place of each token, should it be selected."""
    fate, replacements = rng.random(tokens.shape), np.append(vocabulary.ordinary, vocabulary.sep)
    drawn = replacements[rng.integers(len(replacements), size=tokens.shape)]
    return np.where(fate < keep, tokens, np.where(fate < keep + random, drawn, vocabulary.mask))
