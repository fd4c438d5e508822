import gzip
import json

import jax
import numpy as np
import pytest
from scipy import stats

from jmeta.data.loader import episode_loader
from jmeta.data.sources import DataUnavailable
from jmeta.tasks import reviews
from jmeta.tasks.bpe import train_bpe
from jmeta.tasks.reviews import domain_episodes, draws, encode, from_columns, hold_out, synthetic
from jmeta.tasks.tokenizer import Vocabulary, vocabulary

pytestmark = pytest.mark.usefixtures("text_cache")

DOMAINS = {"books": 60, "pens": 30, "ink": 10}


@pytest.fixture(scope="module")
def words() -> Vocabulary:
    return vocabulary(train_bpe(synthetic(["books"], 20).texts, 300))


@pytest.fixture(scope="module")
def source(words):
    """Three domains of 60, 30 and 10 reviews."""
    parts = [synthetic([name], n) for name, n in DOMAINS.items()]
    columns = {
        "text": [t for part in parts for t in part.texts],
        "label": np.concatenate([part.labels for part in parts]),
        "domain": [part.names[d] for part in parts for d in part.domains],
    }
    return encode(from_columns(columns), words, positions=48)


def table(**columns):
    base = {"text": ["good", "bad"], "label": ["positive", "negative"], "domain": ["a", "a"]}
    return base | columns


def test_reading_a_file_of_the_schema(tmp_path):
    path = tmp_path / "dataset.json"
    rows = [
        {"text": "Great pen", "label": "positive", "domain": "pens", "extra": 1},
        {"text": "bad\r\nink 😞", "label": "negative", "domain": "ink", "extra": 2},
    ]
    path.write_bytes(json.dumps(rows, indent=1).replace("\n", "\r\n").encode())
    found = reviews.read(path)
    assert found.texts == ["Great pen", "bad\r\nink 😞"]
    assert found.labels.tolist() == [1, 0]
    assert [found.names[d] for d in found.domains] == ["pens", "ink"]
    assert found.names == ("ink", "pens")


def test_splits_of_a_file_are_told_apart(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"text": s, "label": -1 if s == "unlabel" else 1, "domain": "a", "split": s}
        for s in ("train", "test", "unlabel")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert reviews.read(path).texts == ["train"]
    assert reviews.read(path, "test").texts == ["test"]
    with pytest.raises(ValueError, match=r"row 0 of .*, field 'label': there is none; ask for"):
        reviews.read(path, "unlabel")


def test_duplicates_are_dropped_within_a_domain():
    found = from_columns(
        {
            "text": ["Good", "good ", "good", "bad", "BAD", "odd", "odd"],
            "label": [1, 1, 1, 0, 0, 0, 1],
            "domain": ["a", "a", "b", "a", "a", "a", "a"],
        }
    )
    # "odd" is called both positive and negative, so that neither is kept
    assert list(zip(found.texts, found.labels, found.domains, strict=True)) == [
        ("Good", 1, 0), ("good", 1, 1), ("bad", 0, 0),
    ]  # fmt: skip
    assert found.dropped == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": ["positive", "neutral"]}, "row 1 of mine, field 'label': 'neutral' is none of"),
        ({"label": [1, 3]}, r"row 1 of mine, field 'label': 3 is none of \('negative', 'positive'"),
        ({"label": [1, -1]}, "row 1 of mine, field 'label': there is none"),
        ({"text": ["good", None]}, "row 1 of mine has no field 'text'"),
        ({"text": ["good", " "]}, "row 1 of mine, field 'text' is empty"),
        ({"text": ["good", 5]}, "row 1 of mine, field 'text': 5 is no text"),
        ({"text": ["good", "\ud800"]}, "row 1 of mine, field 'text': character 0 is half of a"),
        ({"domain": ["a", ""]}, "row 1 of mine, field 'domain' is empty"),
    ],
)
def test_mistakes_name_the_row_and_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        from_columns(table(**change), "mine")
    columns = table()
    del columns["domain"]
    with pytest.raises(ValueError, match=r"row 0 of mine has no field 'domain'; its fields are"):
        from_columns(columns, "mine")


def test_without_data_it_is_said_what_to_do(monkeypatch, tmp_path):
    monkeypatch.delenv("JMETA_DATA", raising=False)
    with pytest.raises(DataUnavailable, match=r"JMETA_DATA is not set.*pass path="):
        reviews.read()
    with pytest.raises(DataUnavailable, match="no file or folder"):
        reviews.read(tmp_path / "none.jsonl")
    # the copy tells no splits apart, so it is not the test split
    (tmp_path / "amazon").mkdir()
    row = {"text": "good", "label": "positive", "domain": "a"}
    with gzip.open(tmp_path / reviews.LOCAL, "wt") as file:
        file.write(json.dumps(row))
    monkeypatch.setenv("JMETA_DATA", str(tmp_path))
    assert reviews.read().texts == ["good"]
    with pytest.raises(DataUnavailable, match="there is no test split here"):
        reviews.read(split="test")


def test_texts_are_framed_cut_and_padded(wordpiece_tokenizer):
    words = vocabulary(wordpiece_tokenizer)
    rows = from_columns(table(text=["cats", "cat " * 30]))
    found = encode(rows, words, positions=8)
    names = [[words.tokenizer.id_to_token(int(i)) for i in row] for row in found.tokens]
    assert names[0] == ["[CLS]", "cat", "##s", "[SEP]", *["[PAD]"] * 4]
    assert names[1] == ["[CLS]", *["cat"] * 6, "[SEP]"]
    assert found.cut == 1
    batch = reviews.batch(found, [0])
    assert batch["x"]["mask"].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]
    bare = words._replace(cls=None, sep=None, eos=words.sep)
    assert encode(rows, bare, positions=8).length.tolist() == [3, 8]
    with pytest.raises(ValueError, match="2 positions leave no room"):
        encode(rows, words, positions=2)


def test_support_and_query_are_disjoint_reviews_of_one_domain(source):
    draw = draws(source, shots=4, queries=6, tasks=5)
    domains = []
    for step in range(200):
        for rows in draw(0, step):
            assert len(set(rows.tolist())) == 10
            assert len(set(source.domains[rows])) == 1
            domains.append(int(source.domains[rows[0]]))
    # in proportion to its size: the domain of a random review
    expected = np.array([DOMAINS[name] for name in source.names]) / 100 * len(domains)
    assert stats.chisquare(np.bincount(domains), expected).pvalue > 1e-3


def test_episodes_read_what_was_drawn_and_share_no_text(source, words):
    sample = domain_episodes(source, shots=4, queries=6, tasks=3)
    rows = draws(source, shots=4, queries=6, tasks=3)(5, 9)
    episode = sample(5, 9)
    np.testing.assert_array_equal(episode.support["y"], source.labels[rows[:, :4]])
    np.testing.assert_array_equal(episode.query["x"]["tokens"], source.tokens[rows[:, 4:]])
    assert episode.query["mask"].shape == (3, 6)
    for task in range(3):
        shown, asked = (
            {tuple(row) for row in part["x"]["tokens"][task].tolist()}
            for part in (episode.support, episode.query)
        )
        assert not shown & asked
    small = domain_episodes(source, shots=4, queries=6, tasks=1)(5, 9)
    np.testing.assert_array_equal(small.query["y"][0], episode.query["y"][0])
    loader = episode_loader(sample, seed=5, start=9)
    jax.tree.map(np.testing.assert_array_equal, next(loader), episode)
    loader.close()


def test_a_domain_that_is_too_small_is_named(source):
    said = r"^books has 60, ink has 10, pens has 30, needs 100 \(80 support \+ 20 query\): ask for"
    with pytest.raises(ValueError, match=said):
        domain_episodes(source, shots=80, queries=20, tasks=1)
    with pytest.raises(ValueError, match=r"^pens has 30, needs 100 \(80 support \+ 20 query\)"):
        domain_episodes(source, shots=80, queries=20, tasks=1, domains=["pens"])
    assert reviews.at_least(source, 30) == ("books", "pens")
    sample = domain_episodes(source, shots=8, queries=22, tasks=2, domains=["pens"])
    assert sample(0, 0).query["y"].shape == (2, 22)  # all there is
    with pytest.raises(ValueError, match=r"no domain 'cars'; the domains are \['books'"):
        domain_episodes(source, shots=1, queries=1, tasks=1, domains=["cars"])
    with pytest.raises(ValueError, match="queries=-1"):
        domain_episodes(source, shots=1, queries=-1, tasks=1)


def test_imbalance_and_a_class_with_one_example(words):
    texts = [f"review {i}" for i in range(20)]
    rows = from_columns({"text": texts, "label": [1] + [0] * 19, "domain": ["a"] * 20})
    assert reviews.sizes(rows) == {"a": (19, 1)}
    source = encode(rows, words, positions=16)
    positives = [
        draws(source, shots=10, queries=10, tasks=1)(0, step)[0].tolist().index(0) < 10
        for step in range(100)
    ]
    assert 30 < sum(positives) < 70  # now in the support, now in the query, never in both
    assert "| a | 20 | 1 |" in reviews.describe(rows)


def test_held_out_domains_share_no_text_with_the_others():
    rows = from_columns(
        {
            "text": ["one", "two", "Three", "three", "four"],
            "label": [1, 0, 1, 1, 0],
            "domain": ["a", "b", "b", "c", "c"],
        }
    )
    rest, held = hold_out(rows, ["c"])
    assert (rest.texts, rest.names, rest.domains.tolist()) == (["one", "two"], ("a", "b"), [0, 1])
    assert (held.texts, held.names, held.domains.tolist()) == (["three", "four"], ("c",), [0, 0])
    with pytest.raises(ValueError, match="no domain 'z'"):
        hold_out(rows, ["z"])
    with pytest.raises(ValueError, match="no review on one of the sides"):
        hold_out(rows, ["a", "b", "c"])


def test_tables_print_n(source):
    assert reviews.describe(source).splitlines() == [
        "| domain | n | positive |",
        "| --- | ---: | ---: |",
        "| books | 60 | 30 |",
        "| ink | 10 | 5 |",
        "| pens | 30 | 15 |",
        "| all 3 | 100 | 50 |",
    ]


def test_made_up_reviews_can_be_learned_from_and_repeated():
    first, again = synthetic(["a", "b"], 40), synthetic(["a", "b"], 40)
    assert first.texts == again.texts != synthetic(["a", "b"], 40, seed=1).texts
    assert reviews.sizes(first) == {"a": (20, 20), "b": (20, 20)}
    said = [set(text.split()) & set(reviews._WORDS["positive"]) for text in first.texts]
    assert [bool(s) for s in said] == (first.labels == 1).tolist()


def test_real_reviews(jmeta_data, words):
    rows = reviews.read()
    rest, held = hold_out(rows)
    found = {name: sum(counts) for name, counts in reviews.sizes(held).items()}
    assert found == {"automotive": 72, "computer_&_video_games": 182, "office_products": 30}
    assert len(rest.names) == 19
    assert len(rows.labels) + rows.dropped == 15_104
    assert not {t.strip().casefold() for t in rest.texts} & {
        t.strip().casefold() for t in held.texts
    }
    source = encode(held, words, positions=32)
    with pytest.raises(ValueError, match=r"automotive has 72, office_products has 30, needs 100"):
        domain_episodes(source, shots=80, queries=20, tasks=1)
    with pytest.raises(ValueError, match=r"^office_products has 30, needs 100 \(80 support \+ 20"):
        domain_episodes(source, shots=80, queries=20, tasks=1, domains=["office_products"])
    other = reviews.read("amazon/fdu_mtl.parquet", "test")
    assert len(other.names) == 16
