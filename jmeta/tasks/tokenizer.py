"""Tokenisers from anywhere, as one thing: WordPiece, byte-level BPE, or one trained here.

Whatever cuts, pads or reads special tokens out of plain text is switched off: that is done here.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jmeta.data.sources import DataUnavailable, local_path
from jmeta.tasks.bpe import plain, train_bpe

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TASKS = 30  # [CLS0] ... [CLS29]
UNIFIED_TOKENS = ("[PAD]", "[MASK]", "[SEP]", *(f"[CLS{k}]" for k in range(TASKS)))
_ROLES = {
    "pad": ("[PAD]", "<pad>", "<|pad|>"),
    "cls": ("[CLS]", "<s>", "<|cls|>"),
    "sep": ("[SEP]", "</s>", "<|sep|>"),
    "mask": ("[MASK]", "<mask>", "<|mask|>"),
    "eos": ("<|endoftext|>", "</s>", "[SEP]", "<|sep|>"),
}
_UNKNOWN = ("[UNK]", "<unk>")


class Vocabulary(NamedTuple):
    """A tokeniser with the special tokens its model was made with.

    Attributes:
        tokenizer: a private copy that neither cuts nor pads, and takes ``"[SEP]"`` in a text for
            five characters like any other.
        size: one more than the largest id.
        pad: the id to pad with: the tokeniser's own, or else its end of text, or else 0.
        cls: ``[CLS]`` or ``<s>``; None where there is none, as in GPT-2.
        sep: ``[SEP]`` or ``</s>``, or None.
        mask: ``[MASK]`` or ``<mask>``, or None.
        eos: what ends a text, ``<|endoftext|>``, ``</s>`` or ``[SEP]``, or None.
        fingerprint: a hash of the tokeniser.
    """

    tokenizer: Tokenizer
    size: int
    pad: int
    cls: int | None
    sep: int | None
    mask: int | None
    eos: int | None
    fingerprint: str


class Unified(NamedTuple):
    """A tokeniser with the special tokens of the unified text-to-label format.

    Attributes:
        tokenizer: a private copy, as in ``Vocabulary``.
        size: one more than the largest id: a model needs as many embeddings.
        pad: ``[PAD]``, in a label: no loss here.
        mask: ``[MASK]``.
        sep: ``[SEP]``, in a label: the first class, or no answer here.
        cls: ids of ``[CLS0] ... [CLS29]``: ``cls[k]`` begins every example of task k.
        ordinary: int32 ids that are no special token.
        added: the special tokens that the tokeniser did not have; they come after its own ids.
        fingerprint: a hash of the tokeniser.
    """

    tokenizer: Tokenizer
    size: int
    pad: int
    mask: int
    sep: int
    cls: tuple[int, ...]
    ordinary: np.ndarray
    added: tuple[str, ...]
    fingerprint: str


def cache_name(words: Vocabulary | Unified) -> list[object]:
    """What of a vocabulary goes into the key of a cache: the tokeniser and the special ids."""
    skipped = ("tokenizer", "ordinary", "added")
    return [value for name, value in words._asdict().items() if name not in skipped]


class Pieces(NamedTuple):
    """A tokenised text.

    Attributes:
        ids: int32 ``[tokens]``.
        start: int32 ``[tokens]``, the character at which each token begins.
        stop: int32 ``[tokens]``, the character after each token.
    """

    ids: np.ndarray
    start: np.ndarray
    stop: np.ndarray


def load_tokenizer(path_or_name: str | os.PathLike[str]) -> Tokenizer:
    """Read a tokeniser from a local file or folder, from ``$JMETA_DATA``, or from the hub.

    Args:
        path_or_name: a ``tokenizer.json``, a WordPiece ``vocab.txt``, or a folder with one of
            them or with ``vocab.json`` and ``merges.txt``; or a name on the hub. A WordPiece
            vocabulary without capital letters lowers the case of what it reads.

    Returns:
        A ``tokenizers.Tokenizer``.

    Raises:
        DataUnavailable: there is no such tokeniser here; the message says what to do.
        ValueError: the folder holds no vocabulary.
    """
    from tokenizers import Tokenizer

    path = local_path(path_or_name)
    if path is None:
        try:
            return Tokenizer.from_pretrained(os.fspath(path_or_name))
        except Exception as error:  # no network, no such name: the libraries' many kinds
            raise DataUnavailable(
                f"the tokeniser {os.fspath(path_or_name)!r} could not be had from the Hugging Face "
                "hub: pass the folder of a local copy (tokenizer.json, or vocab.txt, or vocab.json "
                "and merges.txt), or set JMETA_DATA to the folder that holds it; where there is "
                "no network, HF_HUB_OFFLINE=1 makes this message come at once"
            ) from error
    files = [path] if path.is_file() else sorted(path.iterdir())
    named = {file.name: file for file in files}
    try:
        if path.is_file() and path.suffix == ".json" and path.name != "vocab.json":
            return Tokenizer.from_file(str(path))
        if "tokenizer.json" in named:
            return Tokenizer.from_file(str(named["tokenizer.json"]))
        if path.is_file() and path.suffix == ".txt":
            return _wordpiece(path)
        if "vocab.txt" in named:
            return _wordpiece(named["vocab.txt"])
        if "vocab.json" in named and "merges.txt" in named:
            return byte_level(named["vocab.json"], named["merges.txt"])
    except DataUnavailable:
        raise
    except Exception as error:  # the library raises bare Exception for a damaged file
        raise DataUnavailable(f"the tokeniser {path} cannot be read: {error}") from error
    raise ValueError(
        f"{path} holds no tokeniser: there is no tokenizer.json, no vocab.txt, and not both "
        "vocab.json and merges.txt"
    )


def byte_level(vocab: Path | str, merges: Path | str) -> Tokenizer:
    """A byte-level BPE of GPT-2's kind from its two files, which may lie in different folders."""
    from tokenizers.implementations.byte_level_bpe import ByteLevelBPETokenizer

    return _plain(ByteLevelBPETokenizer(str(vocab), str(merges)))


def _wordpiece(vocab: Path) -> Tokenizer:
    from tokenizers.implementations.bert_wordpiece import BertWordPieceTokenizer

    entries = vocab.read_text(encoding="utf-8").split("\n")
    words = [word.rstrip("\r") for word in entries if not re.fullmatch(r"\[.*\]\r?", word)]
    lowercase = all(word == word.lower() for word in words if word.isascii())
    return _plain(BertWordPieceTokenizer(str(vocab), lowercase=lowercase))


def train_unified(texts: Iterable[str], vocab: int, *, prefix_space: bool = False) -> Tokenizer:
    """Train a byte-level BPE for the unified format: [PAD] 0, [MASK] 1, [SEP] 2, [CLSk] 3 + k.

    Args:
        texts: the training texts.
        vocab: size of the vocabulary, special tokens and the 256 bytes included.
        prefix_space: read every text as if a space stood before it, so that its first word is the
            same token as everywhere else.

    Returns:
        A ``tokenizers.Tokenizer``.

    Example:
        >>> unified(train_unified(["one text", "another"], 300)).cls[:3]
        (3, 4, 5)
    """
    return train_bpe(texts, vocab, special=UNIFIED_TOKENS, prefix_space=prefix_space)


def vocabulary(tokenizer: Any) -> Vocabulary:
    """A tokeniser with its own special tokens, for a model's own format.

    Args:
        tokenizer: a ``tokenizers.Tokenizer`` (``load_tokenizer``, ``train_bpe``), or a fast
            tokeniser of transformers.

    Returns:
        The vocabulary; the tokeniser passed is not changed.

    Raises:
        TypeError: it is no such tokeniser.

    Example:
        >>> words = vocabulary(train_bpe(["a text"], 300))
        >>> words.pad, words.cls, words.sep, words.eos
        (0, 3, 4, 4)
    """
    copy = _plain(tokenizer)
    ids = {role: _first(copy, names) for role, names in _ROLES.items()}
    return Vocabulary(
        tokenizer=copy,
        size=_size(copy),
        pad=ids["pad"] if ids["pad"] is not None else ids["eos"] or 0,
        cls=ids["cls"],
        sep=ids["sep"],
        mask=ids["mask"],
        eos=ids["eos"],
        fingerprint=_fingerprint(copy),
    )


def unified(tokenizer: Any) -> Unified:
    """A tokeniser with the special tokens of the unified text-to-label format.

    ``[PAD]``, ``[MASK]`` and ``[SEP]`` are the tokeniser's own where it has them; ``[CLSk]`` is
    BERT's ``[unusedk]`` where that is there. What is missing is added after the last id, and
    ``size`` says how many embeddings a model then needs.

    Args:
        tokenizer: as for ``vocabulary``.

    Returns:
        The unified vocabulary; the tokeniser passed is not changed.

    Example:
        >>> unified(train_bpe(["a text"], 300)).added[:2]
        ('[CLS0]', '[CLS1]')
    """
    from tokenizers import AddedToken

    copy = _plain(tokenizer)
    candidates = {
        "[PAD]": _ROLES["pad"],
        "[MASK]": _ROLES["mask"],
        "[SEP]": _ROLES["sep"],
        **{f"[CLS{k}]": (f"[CLS{k}]", f"[unused{k}]") for k in range(TASKS)},
    }
    added = tuple(name for name, names in candidates.items() if _first(copy, names) is None)
    copy.add_special_tokens([AddedToken(name, special=True) for name in added])
    found = {name: _first(copy, (*names, name)) for name, names in candidates.items()}
    ids = {name: identity for name, identity in found.items() if identity is not None}
    return Unified(
        tokenizer=copy,
        size=_size(copy),
        pad=ids["[PAD]"],
        mask=ids["[MASK]"],
        sep=ids["[SEP]"],
        cls=tuple(ids[f"[CLS{k}]"] for k in range(TASKS)),
        ordinary=ordinary_ids(copy, set(ids.values())),
        added=added,
        fingerprint=_fingerprint(copy),
    )


def ordinary_ids(tokenizer: Tokenizer, special: Collection[int]) -> np.ndarray:
    """The ids of a tokeniser that are no special token, int32, sorted.

    Args:
        tokenizer: any tokeniser of the ``tokenizers`` library.
        special: ids that are special, beside those that the tokeniser itself says are, what has
            the name of a special token, and BERT's ``[unusedk]``.

    Returns:
        The ids.

    Example:
        >>> len(ordinary_ids(train_bpe(["a"], 261), [])), ordinary_ids(train_bpe(["a"], 261), [])[0]
        (256, np.int32(5))
    """
    named = [*_UNKNOWN, *(name for names in _ROLES.values() for name in names)]
    skipped = {
        *special,
        *(at for at, token in tokenizer.get_added_tokens_decoder().items() if token.special),
        *(tokenizer.token_to_id(name) for name in named),
    }
    ordinary = [
        identity
        for token, identity in tokenizer.get_vocab().items()
        if identity not in skipped and not re.fullmatch(r"\[unused\d+\]", token)
    ]
    return np.sort(np.asarray(ordinary, np.int32))


def token_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each text, int32; a text that comes several times is tokenised once.

    Raises:
        ValueError: a text holds half of a surrogate pair, which is no character.

    Example:
        >>> [ids.tolist() for ids in token_ids(train_bpe(["aa"], 261), ["a", "", "a"])]
        [[69], [], [69]]
    """
    place = _places(texts)
    encodings = tokenizer.encode_batch_fast(list(place), add_special_tokens=False)
    ids = [np.asarray(encoding.ids, np.int32) for encoding in encodings]
    return [ids[place[text]] for text in texts]


def token_pieces(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Pieces]:
    """Token ids and character offsets of each text; a text that comes twice is tokenised once.

    Offsets count Python's characters (code points) of the text as it was given.

    Raises:
        ValueError: a text holds half of a surrogate pair, which is no character.
    """
    place = _places(texts)
    encodings = tokenizer.encode_batch(list(place), add_special_tokens=False)
    pieces = []
    for encoding in encodings:
        offsets = np.asarray(encoding.offsets, np.int32).reshape(-1, 2)
        pieces.append(Pieces(np.asarray(encoding.ids, np.int32), offsets[:, 0], offsets[:, 1]))
    return [pieces[place[text]] for text in texts]


def whole_characters(value: Any, where: str) -> str:
    """A value that must be text of whole characters, as every tokeniser needs it.

    Args:
        value: anything.
        where: what the error calls it.

    Returns:
        The text.

    Raises:
        ValueError: it is no text, or holds half of a surrogate pair, which is no character.

    Example:
        >>> whole_characters(7, "row 3")
        Traceback (most recent call last):
        ValueError: row 3: 7 is no text
    """
    if not isinstance(value, str):
        raise ValueError(f"{where}: {value!r} is no text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: character {error.start} is half of a surrogate pair "
            f"({value[error.start : error.end]!a}), so the file was decoded wrongly"
        ) from error
    return value


def _places(texts: Sequence[str]) -> dict[str, int]:
    """The place of each distinct text among the distinct texts."""
    for i, text in enumerate(texts):
        whole_characters(text, f"text {i} cannot be tokenised")
    return {text: i for i, text in enumerate(dict.fromkeys(texts))}


def _plain(tokenizer: Any) -> Tokenizer:
    inner = getattr(tokenizer, "backend_tokenizer", tokenizer)  # transformers' fast tokenisers
    if not hasattr(inner, "to_str"):
        raise TypeError(
            f"{type(tokenizer).__name__} is no tokeniser of the tokenizers library nor a fast "
            "one of transformers: read one with load_tokenizer(path)"
        )
    return plain(inner)


def _first(tokenizer: Tokenizer, names: Iterable[str]) -> int | None:
    ids = (tokenizer.token_to_id(name) for name in names)
    return next((identity for identity in ids if identity is not None), None)


def _size(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def _fingerprint(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]
