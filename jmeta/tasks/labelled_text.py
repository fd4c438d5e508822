"""Few-shot text classification from labelled data sets: intents, headlines, or your own file.

The known names read local copies under ``$JMETA_DATA`` with the published class splits, or the
Hugging Face hub where that is not set.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jmeta.data.cache import cache_key
from jmeta.data.sources import Columns, DataUnavailable, from_datasets
from jmeta.files import cache_dir
from jmeta.tasks import rows
from jmeta.tasks.bpe import cached_bpe, encode
from jmeta.tasks.corpora import FRACTIONS, SPLITS
from jmeta.tasks.episodes import FewShot, few_shot, partition_classes

Classes = Mapping[str, Sequence[str]]


class Known(NamedTuple):
    """Where a known data set is found.

    Attributes:
        file: its path under ``$JMETA_DATA``.
        text: the column of texts there.
        label: the column of class names there.
        splits: its key in ``fewshot/class_splits.json``.
        hub: name, configuration, split, text column and label column on the hub.
        dropped: classes that are none (out of scope).
    """

    file: str
    text: str
    label: str
    splits: str
    hub: tuple[str, str | None, str, str, str]
    dropped: tuple[str, ...] = ()


KNOWN = {
    "clinc150": Known(
        "intent/clinc150.parquet",
        "text",
        "intent",
        "CLINC150",
        ("clinc/clinc_oos", "plus", "train+validation+test", "text", "intent_name"),
        dropped=("oos",),
    ),
    "banking77": Known(
        "intent/banking77.parquet",
        "text",
        "intent",
        "BANKING77",
        ("mteb/banking77", None, "train+test", "text", "label_text"),
    ),
    "hwu64": Known(
        "intent/hwu64.parquet",
        "text",
        "intent",
        "HWU64",
        ("DeepPavlov/hwu_intent_classification", None, "train+test", "text", "label"),
    ),
    "huffpost": Known(
        "fewshot/huffpost41.parquet",
        "text",
        "class_name",
        "HuffPost41",
        ("heegyu/news-category-dataset", None, "train", "headline", "category"),
    ),
}


def labelled_text(
    path_or_name: str | os.PathLike[str],
    *,
    text_column: str = "text",
    label_column: str = "label",
    classes: Classes | None = None,
    config: str | None = None,
    split: str | None = None,
    length: int = 32,
    vocab: int = 2048,
    seed: int = 0,
) -> dict[str, FewShot]:
    """Few-shot sources, split by class, from a labelled text data set.

    Equal texts of one class (up to case and outer blanks) are kept once, so that support and query
    never share one. The byte-level BPE is trained on the training classes' texts alone.

    Args:
        path_or_name: ``"clinc150"``, ``"banking77"``, ``"hwu64"`` or ``"huffpost"``; or anything
            ``from_datasets`` reads: a file, a folder, a path under ``$JMETA_DATA``, a hub name.
        text_column: the column of texts (not for the known names).
        label_column: the column of labels (not for the known names).
        classes: ``{"train": names, "validation": names, "test": names}``; classes in none of
            them are left out. By default the published split of a known name, and elsewhere 60,
            15 and 25 % of the classes at random.
        config: the configuration on the hub.
        split: rows of this split only; a few-shot split is by class, so by default all of a file.
        length: tokens per text; longer texts are cut.
        vocab: size of the vocabulary.
        seed: decides a random split by class.

    Returns:
        ``{"train", "validation", "test"}``, sources with disjoint classes: ``x`` int32
        ``[n, length]``, padded with 0 (the attention mask is ``x != 0``).

    Raises:
        DataUnavailable: the data set is not to be had here; the message says what to do.
        ValueError: no such column, a row without a text or a label, which is named, a class named
            in ``classes`` that does not exist or comes in two splits, or a split without a class.
    """
    texts, labels, published = _read(path_or_name, text_column, label_column, config, split)
    texts, labels = _without_duplicates(texts, labels)
    names = sorted(set(labels))
    chosen = classes or published or _random_classes(names, seed)
    _check_classes(chosen, names, path_or_name)

    held = {s: [i for i, label in enumerate(labels) if label in set(chosen[s])] for s in SPLITS}
    training = [texts[i] for i in held["train"]]
    tokenizer = cached_bpe(
        cache_dir() / f"text-bpe-{cache_key(vocab=vocab, texts=training)}.json",
        lambda: training,
        vocab,
    )
    return {
        s: few_shot(
            encode(tokenizer, [texts[i] for i in held[s]], length), [labels[i] for i in held[s]]
        )
        for s in SPLITS
    }


def _read(
    source: str | os.PathLike[str],
    text: str,
    label: str,
    config: str | None,
    split: str | None,
) -> tuple[list[str], list[str], Classes | None]:
    """Texts, labels and the published class split of a data set."""
    known = KNOWN.get(str(source))
    if known is None:
        columns = from_datasets(source, split=split, config=config)
        label = f"{label}_name" if f"{label}_name" in columns else label
        return (*_columns(columns, text, label, source), None)
    folder = Path(os.environ.get("JMETA_DATA") or "$JMETA_DATA")
    if (folder / known.file).exists():
        columns = from_datasets(folder / known.file, split=split)
        texts, labels = _columns(columns, known.text, known.label, source)
        published = _published(folder / "fewshot" / "class_splits.json", known.splits)
    else:
        hub, hub_config, hub_split, text, label = known.hub
        try:
            columns = from_datasets(hub, split=split or hub_split, config=config or hub_config)
        except DataUnavailable as error:
            unset = "" if os.environ.get("JMETA_DATA") else ", and JMETA_DATA is not set"
            raise DataUnavailable(
                f"{source}: there is no file {folder / known.file}{unset}. {error}"
            ) from error
        texts, labels = _columns(columns, text, label, source)
        published = None
    kept = [i for i, name in enumerate(labels) if name not in known.dropped]
    return [texts[i] for i in kept], [labels[i] for i in kept], published


def _columns(
    columns: Columns, text: str, label: str, source: object
) -> tuple[list[str], list[str]]:
    for name in (text, label):
        if name not in columns:
            raise ValueError(
                f"{source} has no column {name!r}; its columns are {sorted(columns)}: say "
                "text_column=... and label_column=..."
            )
    given = rows.rows_of({name: columns[name] for name in (text, label)}, str(source))
    texts = [rows.text(row, text) for row in given]
    # HWU64's class names hold a "/" in the original and a "_" in the published splits.
    return texts, [str(rows.field(row, label)).replace("/", "_") for row in given]


def _published(path: Path, key: str) -> Classes | None:
    if not path.exists():
        return None
    split = json.loads(path.read_text(encoding="utf-8"))[key]["01"]
    return {"train": split["train"], "validation": split["valid"], "test": split["test"]}


def _random_classes(names: list[str], seed: int) -> Classes:
    parts = partition_classes(len(names), FRACTIONS, seed)
    return {
        split: [names[i] for i in sorted(part)] for split, part in zip(SPLITS, parts, strict=True)
    }


def _check_classes(chosen: Classes, names: list[str], source: object) -> None:
    if set(chosen) != set(SPLITS):
        raise ValueError(f"classes must have the keys {SPLITS}, not {tuple(chosen)}")
    everything = [name for split in SPLITS for name in chosen[split]]
    unknown = sorted(set(everything) - set(names))
    if unknown:
        raise ValueError(f"{source} has no class {unknown[0]!r}; its classes are {names[:8]} ...")
    twice = sorted({name for name in everything if everything.count(name) > 1})
    if twice:
        raise ValueError(f"the class {twice[0]!r} is in two splits")
    for split in SPLITS:
        if not chosen[split]:
            raise ValueError(f"{source} has {len(names)} classes, so its {split} split is empty")


def _without_duplicates(texts: list[str], labels: list[str]) -> tuple[list[str], list[str]]:
    seen: dict[tuple[str, str], int] = {}
    for i, (text, label) in enumerate(zip(texts, labels, strict=True)):
        seen.setdefault((text.strip().casefold(), label), i)
    kept = seen.values()
    return [texts[i] for i in kept], [labels[i] for i in kept]
