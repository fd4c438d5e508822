"""A small byte-level BPE, trained once on the training classes' text and kept in a cache folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jmeta.data.cache import cached_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL_TOKENS = ("<|pad|>", "<|mask|>", "<|name|>", "<|cls|>", "<|sep|>")
PAD, MASK, NAME, CLS, SEP = range(5)


def train_bpe(
    texts: Iterable[str],
    vocab: int,
    *,
    special: Sequence[str] = SPECIAL_TOKENS,
    prefix_space: bool = False,
) -> Tokenizer:
    """Train a byte-level BPE: any text can be encoded, and decoding gives it back exactly.

    Args:
        texts: the training texts.
        vocab: size of the vocabulary, special tokens and the 256 bytes included.
        special: the special tokens, whose ids are 0, 1, ...
        prefix_space: read every text as if a space stood before it.

    Returns:
        A ``tokenizers.Tokenizer``; by default ids 0..4 are pad, mask, name, cls and sep.

    Raises:
        ValueError: the vocabulary cannot hold the bytes.

    Reference:
        Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units".
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    smallest = 256 + len(special)
    if vocab < smallest:
        raise ValueError(
            f"a byte-level vocabulary needs at least {smallest} entries "
            f"(256 bytes and {len(special)} special tokens), not {vocab}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,  # type: ignore[call-arg]
        special_tokens=list(special),  # type: ignore[call-arg]
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # type: ignore[call-arg]
        show_progress=False,  # type: ignore[call-arg]
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def cached_bpe(path: Path, texts: Callable[[], Iterable[str]], vocab: int) -> Tokenizer:
    """Read a tokeniser, or train and write it where it is missing or damaged.

    Args:
        path: the JSON file; its name must say everything the training depends on.
        texts: gives the training texts.
        vocab: size of the vocabulary.

    Returns:
        The tokeniser.
    """
    from tokenizers import Tokenizer

    return cached_text(path, Tokenizer.from_str, lambda: train_bpe(texts(), vocab).to_str())


def plain(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that does nothing but tokenise: no cutting, no padding, no token by its name.

    A saved tokeniser may well cut at 128 tokens; and a text that spells out ``<|pad|>`` holds those
    seven characters, not the end of the row.

    Args:
        tokenizer: any tokeniser of the ``tokenizers`` library; it is left as it is.

    Returns:
        The copy.

    Example:
        >>> words = train_bpe(["ab ab ab"], 261)
        >>> words.encode("<|mask|>").ids, len(plain(words).encode("<|mask|>").ids)
        ([1], 8)
    """
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy


def encode(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> np.ndarray:
    """Encode texts into rows of fixed length, cut or padded with 0 at the end.

    The name of a special token in a text is text like any other: no text holds a 0.

    Args:
        tokenizer: a tokeniser made here.
        texts: n texts.
        length: tokens per row.

    Returns:
        int32 ``[n, length]``; the attention mask is ``tokens != 0``.

    Example:
        >>> encode(train_bpe(["ab ab ab"], 261), ["ab"], 4).shape
        (1, 4)
    """
    tokens = np.zeros((len(texts), length), np.int32)
    encodings = plain(tokenizer).encode_batch_fast(list(texts))
    for row, encoding in zip(tokens, encodings, strict=True):
        ids = encoding.ids[:length]
        row[: len(ids)] = ids
    return tokens
