"""Real text on every machine: the sources of the running Python's standard library.

As few-shot classification (which module is this passage from?) and as text to model.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jmeta.data.cache import cache_key, cached_arrays
from jmeta.files import cache_dir
from jmeta.tasks.bpe import NAME, SEP, SPECIAL_TOKENS, cached_bpe
from jmeta.tasks.episodes import FewShot, few_shot, partition_classes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPLITS = ("train", "validation", "test")
FRACTIONS = (0.6, 0.15, 0.25)
MOST_PASSAGES = 60
# Tests, tables, generated and vendored code, and what later Pythons no longer have.
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "lib2to3"}
_SKIPPED |= {"encodings", "turtledemo", "pydoc_data", "ensurepip", "_casefix", "__phello__"}
# Part of every cache key: raise it when the text or the cutting changes.
_VERSION = 1


def stdlib_modules(root: Path | None = None) -> dict[str, Path]:
    """The modules of the standard library and their files, sorted by name.

    Args:
        root: the folder of the library; that of the running Python by default.

    Returns:
        ``{"asyncio.events": path, ...}``.
    """
    root = Path(root or sysconfig.get_path("stdlib"))
    modules = {}
    for folder, subfolders, files in os.walk(root):
        # Cut off here, not filtered later: site-packages may hold ten thousand files.
        subfolders[:] = [f for f in subfolders if f not in _SKIPPED and f.isidentifier()]
        for file in files:
            stem, suffix = os.path.splitext(file)
            if suffix != ".py" or stem in _SKIPPED or stem.startswith("_sysconfigdata"):
                continue
            parts = Path(folder, stem).relative_to(root).parts
            if stem == "__init__" and len(parts) > 1:
                parts = parts[:-1]
            modules[".".join(parts)] = Path(folder, file)
    return dict(sorted(modules.items()))


@functools.lru_cache(maxsize=1024)
def name_pattern(module: str) -> re.Pattern[str]:
    """What of a module's text gives its name away.

    Every dotted part, whatever its case, anywhere, also inside identifiers. Parts of up to three
    letters only where they stand as a word of their own or as one word of an identifier (``os``
    in ``os.path``, ``OSError``, ``_os``, not in ``close``): masked everywhere, the holes they
    leave in common words would themselves spell the name.

    Args:
        module: a dotted name.

    Returns:
        A compiled pattern.

    Example:
        >>> name_pattern("email.message").sub("_", "class EmailMessage(MIMEPart): ...")
        'class __(MIMEPart): ...'
        >>> name_pattern("os").sub("_", "os.close(OSError)")
        '_.close(_Error)'
    """
    alternatives = []
    parts = {part.strip("_").lower() for part in module.split(".")} - {""}
    for part in sorted(parts, key=lambda part: (-len(part), part)):
        if len(part) > 3:
            alternatives.append(f"(?i:{re.escape(part)})")
        else:
            lower, title, upper = map(re.escape, (part, part.capitalize(), part.upper()))
            alternatives += [
                rf"(?<![A-Za-z]){lower}(?![a-z])",
                rf"(?<![A-Z]){title}(?![a-z])",
                rf"(?<![A-Z]){upper}(?![a-z])(?![A-Z](?![a-z]))",
            ]
    return re.compile("|".join(alternatives) or "(?!)")


def masked_text(module: str, path: Path) -> str:
    """The source of a module with its own name replaced by the token ``<|name|>``."""
    return name_pattern(module).sub(SPECIAL_TOKENS[NAME], _text(path))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _split_modules(seed: int) -> dict[str, dict[str, Path]]:
    modules = stdlib_modules()
    names = list(modules)
    parts = partition_classes(len(names), FRACTIONS, seed)
    return {
        split: {names[i]: modules[names[i]] for i in sorted(part)}
        for split, part in zip(SPLITS, parts, strict=True)
    }


def _key(**settings: object) -> str:
    python = sys.implementation.name, *sys.version_info, sysconfig.get_path("stdlib")
    return cache_key(python=python, jmeta=_VERSION, fractions=FRACTIONS, **settings)


def stdlib_tokenizer(*, vocab: int = 2048, seed: int = 0) -> Tokenizer:
    """The byte-level BPE of ``stdlib_passages`` and ``stdlib_text``, trained on training modules.

    Args:
        vocab: size of the vocabulary.
        seed: the seed of the split by module.

    Returns:
        A ``tokenizers.Tokenizer`` (``.decode(ids, skip_special_tokens=False)`` shows a passage).
    """

    def texts() -> list[str]:
        return [masked_text(name, path) for name, path in _split_modules(seed)["train"].items()]

    path = cache_dir() / f"stdlib-bpe-{_key(vocab=vocab, seed=seed)}.json"
    return cached_bpe(path, texts, vocab)


def stdlib_passages(
    *, length: int = 64, vocab: int = 2048, min_passages: int = 20, seed: int = 0
) -> dict[str, FewShot]:
    """Which module is this passage from? Few-shot text classification without a download.

    A class is a module of the standard library, with its own name masked. A passage is a window
    of ``length`` tokens; windows do not overlap and no two are equal, so that support and query
    never share text. At most 60 windows of a module are kept, drawn at random. Modules are
    split at random; the tokeniser has seen the training modules alone.

    Args:
        length: tokens per passage.
        vocab: size of the byte-level BPE vocabulary.
        min_passages: modules with fewer passages are dropped.
        seed: decides the split by module and which windows are kept.

    Returns:
        ``{"train", "validation", "test"}``, sources with disjoint classes: ``x`` int32
        ``[n, length]``; ids 0..4 are special (0 pads; the attention mask is ``x != 0``).

    Raises:
        ValueError: ``length``, ``vocab`` or ``min_passages`` leave no class.
    """
    if length < 1 or min_passages < 1:
        raise ValueError(f"length={length} and min_passages={min_passages} must be positive")
    key = _key(length=length, vocab=vocab, least=min_passages, most=MOST_PASSAGES, seed=seed)
    arrays = cached_arrays(
        cache_dir() / f"stdlib-passages-{key}.npz",
        lambda: _make_passages(length, vocab, min_passages, seed),
    )
    sources = {}
    for split in SPLITS:
        tokens, labels = arrays[f"{split}_x"].astype(np.int32), arrays[f"{split}_y"]
        if not len(labels):
            raise ValueError(
                f"no {split} module has {min_passages} passages of {length} tokens: ask for "
                "shorter passages or for fewer"
            )
        sources[split] = few_shot(tokens, labels)
    return sources


def _make_passages(length: int, vocab: int, least: int, seed: int) -> dict[str, np.ndarray]:
    tokenizer = stdlib_tokenizer(vocab=vocab, seed=seed)
    rng = np.random.default_rng([seed, length])
    seen: set[bytes] = set()
    arrays = {}
    for split, modules in _split_modules(seed).items():
        texts = [masked_text(name, path) for name, path in modules.items()]
        tokens, labels = [np.zeros((0, length), np.uint16 if vocab <= 2**16 else np.int32)], []
        for name, encoding in zip(modules, tokenizer.encode_batch_fast(texts), strict=True):
            windows = _windows(np.asarray(encoding.ids, tokens[0].dtype), length, seen)
            if len(windows) < least:
                continue
            if len(windows) > MOST_PASSAGES:
                windows = windows[np.sort(rng.permutation(len(windows))[:MOST_PASSAGES])]
            tokens.append(windows)
            labels += [name] * len(windows)
        arrays[f"{split}_x"] = np.concatenate(tokens)
        arrays[f"{split}_y"] = np.asarray(labels, dtype=np.str_)
    return arrays


def _windows(ids: np.ndarray, length: int, seen: set[bytes]) -> np.ndarray:
    """Cut into windows side by side, without those seen before (headers, repeated tables)."""
    windows = ids[: len(ids) // length * length].reshape(-1, length)
    fresh = []
    for row in windows:
        text = row.tobytes()
        fresh.append(text not in seen)
        seen.add(text)
    return windows[np.asarray(fresh, bool)]


def stdlib_text(*, vocab: int = 2048, seed: int = 0) -> dict[str, np.ndarray]:
    """The standard library as one stream of tokens per split, for language modelling.

    Whole modules follow each other, each ended by ``<|sep|>``; names are not masked. The split by
    module and the tokeniser are those of ``stdlib_passages``.

    Args:
        vocab: size of the byte-level BPE vocabulary.
        seed: decides the split by module.

    Returns:
        ``{"train", "validation", "test"}``: int32 ``[tokens]``.
    """

    def make() -> dict[str, np.ndarray]:
        tokenizer = stdlib_tokenizer(vocab=vocab, seed=seed)
        streams = {}
        for split, modules in _split_modules(seed).items():
            encodings = tokenizer.encode_batch_fast([_text(path) for path in modules.values()])
            streams[split] = np.concatenate(
                [np.asarray([*encoding.ids, SEP], np.int32) for encoding in encodings]
            )
        return streams

    return cached_arrays(cache_dir() / f"stdlib-text-{_key(vocab=vocab, seed=seed)}.npz", make)


def describe(sources: Mapping[str, FewShot]) -> str:
    """One line per split: classes, examples, and how many of each class.

    Example:
        >>> describe({"train": few_shot(np.zeros((3, 1)), ["a", "a", "b"])})
        'train: 2 classes, 3 examples (1 to 2 of each)'
    """
    lines = []
    for split, source in sources.items():
        sizes = np.bincount(source.y)
        lines.append(
            f"{split}: {len(sizes)} classes, {len(source.y):,} examples "
            f"({sizes.min()} to {sizes.max()} of each)"
        )
    return "\n".join(lines)
