import json

import numpy as np
import pytest

from jmeta.data.sources import DataUnavailable
from jmeta.tasks.labelled_text import KNOWN, labelled_text


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JMETA_CACHE", str(tmp_path / "cache"))


# What each name's data set on the hub is taken to look like: (row, its class).
HUB = {
    "clinc150": lambda i, c: {"text": f"say {c} {i}", "intent": c},
    "banking77": lambda i, c: {"text": f"say {c} {i}", "label": c, "label_text": f"class {c}"},
    "hwu64": lambda i, c: {"text": f"say {c} {i}", "label": f"domain/{c}"},
    "huffpost": lambda i, c: {
        "link": "no", "headline": f"say {c} {i}", "category": f"CLASS {c}", "short": "no",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_name_is_read_from_the_hub(name, monkeypatch):
    import datasets

    monkeypatch.delenv("JMETA_DATA", raising=False)
    asked = []

    def load_dataset(path, config, *, split):
        asked.append((path, config, split))
        table = datasets.Dataset.from_list([HUB[name](i, c) for c in range(8) for i in range(3)])
        if name != "clinc150":
            return table
        classes = ["a", "b", "oos", "c", "d", "e", "f", "g"]
        return table.cast_column("intent", datasets.ClassLabel(names=classes))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    sources = labelled_text(name, length=24, vocab=280)
    assert asked == [KNOWN[name].hub[:3]]
    names = {
        "clinc150": ["a", "b", "c", "d", "e", "f", "g"],  # without what is out of scope
        "banking77": [f"class {c}" for c in range(8)],
        "hwu64": [f"domain_{c}" for c in range(8)],
        "huffpost": [f"CLASS {c}" for c in range(8)],
    }[name]
    found = [source.names for source in sources.values()]
    assert sorted(sum(found, ())) == names
    for source in sources.values():  # three texts a class, all different and not cut to nothing
        assert (np.bincount(source.y) == 3).all()
        assert len(np.unique(source.x, axis=0)) == len(source.x)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [
        {"words": f"example {i} of group {g}", "group": g}
        for g in ("a", "b", "c/d", "e", "f", "g", "h")
        for i in range(6)
    ]
    rows += [{"words": "Example 0 of group a ", "group": "a"}]  # equal up to case and blanks
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


CLASSES = {"train": ["a", "b"], "validation": ["e"], "test": ["c_d", "f"]}


def test_own_file_with_own_classes(table):
    sources = labelled_text(
        table, text_column="words", label_column="group", classes=CLASSES, length=40, vocab=280
    )
    assert {s: v.names for s, v in sources.items()} == {
        "train": ("a", "b"),
        "validation": ("e",),
        "test": ("c_d", "f"),
    }
    for source in sources.values():
        assert (np.bincount(source.y) == 6).all()  # the duplicate is gone
        assert len(np.unique(source.x, axis=0)) == len(source.x)
        assert source.x.dtype == np.int32


def test_random_classes_are_disjoint_and_a_function_of_the_seed(table):
    def names(seed):
        sources = labelled_text(
            table, text_column="words", label_column="group", vocab=280, seed=seed
        )
        found = [source.names for source in sources.values()]
        assert sorted(sum(found, ())) == ["a", "b", "c_d", "e", "f", "g", "h"]
        return found

    assert names(1) == names(1)
    assert len({str(names(seed)) for seed in range(4)}) > 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"text_column": "text"}, r"no column 'text'; its columns are \['group', 'words'\]"),
        ({"classes": {**CLASSES, "test": ["zz"]}}, "no class 'zz'"),
        ({"classes": {**CLASSES, "test": ["a"]}}, "'a' is in two splits"),
        ({"classes": {**CLASSES, "test": []}}, "its test split is empty"),
        ({"classes": {"train": ["a"]}}, "must have the keys"),
    ],
)
def test_mistakes_are_named(table, bad, message):
    good = {"text_column": "words", "label_column": "group", "vocab": 280}
    with pytest.raises(ValueError, match=message):
        labelled_text(table, **{**good, **bad})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words": None}, "row 42 of .* has no field 'words'"),
        ({"words": 7.0}, "row 42 of .*, field 'words': 7.0 is no text"),
        ({"group": None}, "row 42 of .* has no field 'group'"),
    ],
)
def test_a_row_without_text_or_label_is_named(change, message, monkeypatch):
    rows = [{"words": f"{i}", "group": f"{i % 7}"} for i in range(42)]
    rows.append({"words": "x", "group": "a", **change})
    columns = {name: [row[name] for row in rows] for name in ("words", "group")}
    monkeypatch.setattr("jmeta.tasks.labelled_text.from_datasets", lambda *_, **__: columns)
    with pytest.raises(ValueError, match=message):
        labelled_text("mine", text_column="words", label_column="group", vocab=280)


def test_a_gap_among_numbers_is_no_class(monkeypatch):
    columns = {
        "text": [f"{i}" for i in range(8)],
        "label": np.array([0.0, 1, 2, 3, 4, 5, 6, np.nan]),
    }
    monkeypatch.setattr("jmeta.tasks.labelled_text.from_datasets", lambda *_, **__: columns)
    with pytest.raises(ValueError, match="row 7 of mine has no field 'label'"):
        labelled_text("mine", vocab=280)


def test_a_known_name_without_data_says_what_to_do(monkeypatch):
    monkeypatch.delenv("JMETA_DATA", raising=False)
    for name in KNOWN:
        with pytest.raises(DataUnavailable, match=r"pass the path of a local copy.*JMETA_DATA"):
            labelled_text(name)


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        (
            "",
            r"there is no file \$JMETA_DATA/intent/clinc150.parquet, and JMETA_DATA is not",
        ),
        ("here", "clinc150: there is no file here/intent/clinc150.parquet. the hub is away"),
    ],
)
def test_a_known_name_says_which_file_it_looked_for(folder, said, monkeypatch):
    def away(*_, **__):
        raise DataUnavailable("the hub is away")

    monkeypatch.setenv("JMETA_DATA", folder)
    monkeypatch.setattr("jmeta.tasks.labelled_text.from_datasets", away)
    with pytest.raises(DataUnavailable, match=said):
        labelled_text("clinc150")


@pytest.mark.parametrize(
    ("name", "train", "validation", "test"),
    [
        ("clinc150", 50, 50, 50),
        ("banking77", 25, 25, 27),
        ("hwu64", 16, 23, 25),
        ("huffpost", 20, 5, 16),
    ],
)
def test_published_splits(jmeta_data, name, train, validation, test):
    from tokenizers import Tokenizer

    from jmeta.data.sources import from_datasets
    from jmeta.files import cache_dir

    sources = labelled_text(name)
    assert [len(s.names) for s in sources.values()] == [train, validation, test]
    classes = [c for s in sources.values() for c in s.names]
    assert len(set(classes)) == len(classes)
    # every row decodes to a text that the file gives this very class
    known = KNOWN[name]
    columns = from_datasets(jmeta_data / known.file)
    labels = [label.replace("/", "_") for label in columns[known.label]]
    (path,) = cache_dir().glob("text-bpe-*.json")
    tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    pairs = set(zip(columns[known.text], labels, strict=True))
    source = sources["test"]
    short = np.flatnonzero(source.x[:, -1] == 0)[:300]
    for row in short:
        text = tokenizer.decode(source.x[row][source.x[row] != 0].tolist())
        assert (text, source.names[source.y[row]]) in pairs
