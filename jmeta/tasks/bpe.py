"""A small byte-level BPE, trained once on the training classes' text and kept in a cache folder.

The cache is a convenience: every file in it can be deleted, and a damaged one is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL_TOKENS = ("<|pad|>", "<|mask|>", "<|name|>", "<|cls|>", "<|sep|>")
PAD, MASK, NAME, CLS, SEP = range(5)
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


def cache_dir() -> Path:
    """``$JMETA_CACHE``, or ``~/.cache/jmeta``."""
    return Path(os.environ.get("JMETA_CACHE") or "~/.cache/jmeta").expanduser()


def cache_key(**settings: Any) -> str:
    """A short name for a set of settings: other settings, another file."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file whole or not at all: to a temporary file in the same folder, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            write(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def cached_arrays(path: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Read an ``.npz`` file, or make its arrays and write it where it is missing or damaged.

    Args:
        path: the file; what it is called must say everything that ``make`` depends on.
        make: makes the arrays.

    Returns:
        The arrays by name.
    """
    import zipfile
    import zlib

    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
        arrays = make()
        _try_to_keep(path, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))
        return arrays


def _try_to_keep(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    try:
        write_atomically(path, write)
    except OSError as error:  # a read-only home: slower the next time, nothing worse
        import warnings

        warnings.warn(
            f"cannot write the cache {path} ({error}); set JMETA_CACHE to a folder that can be "
            "written, or this is made again every time",
            stacklevel=4,
        )


def train_bpe(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Train a byte-level BPE: any text can be encoded, and decoding gives it back exactly.

    Args:
        texts: the training texts.
        vocab: size of the vocabulary, special tokens and the 256 bytes included.

    Returns:
        A ``tokenizers.Tokenizer``; ids 0..4 are pad, mask, name, cls and sep.

    Raises:
        ValueError: the vocabulary cannot hold the bytes.

    Reference:
        Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units".
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab < SMALLEST_VOCABULARY:
        raise ValueError(
            f"a byte-level vocabulary needs at least {SMALLEST_VOCABULARY} entries "
            f"(256 bytes and {len(SPECIAL_TOKENS)} special tokens), not {vocab}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,  # type: ignore[call-arg]
        special_tokens=list(SPECIAL_TOKENS),  # type: ignore[call-arg]
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

    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception:  # the library raises bare Exception for a damaged file
        tokenizer = train_bpe(texts(), vocab)
        _try_to_keep(path, lambda file: file.write(tokenizer.to_str().encode()))
        return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> np.ndarray:
    """Encode texts into rows of fixed length, cut or padded with 0 at the end.

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
    for row, encoding in zip(tokens, tokenizer.encode_batch_fast(list(texts)), strict=True):
        ids = encoding.ids[:length]
        row[: len(ids)] = ids
    return tokens
