import functools
import re
import time

import numpy as np
import pytest

from jmeta.tasks import corpora
from jmeta.tasks.corpora import (
    name_pattern,
    stdlib_modules,
    stdlib_passages,
    stdlib_text,
    stdlib_tokenizer,
)
from jmeta.tasks.episodes import counts, episodes

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("JMETA_CACHE", str(folder))
        # The tokeniser and the passages read the same masked texts.
        patch.setattr(corpora, "masked_text", functools.cache(corpora.masked_text))
        yield folder


@pytest.fixture(scope="module")
def passages(cache):
    return stdlib_passages()


@pytest.fixture
def small(cache, monkeypatch):
    """A few short modules, with cache files of their own: quick to make again."""
    short = [each for each in stdlib_modules().items() if 3_000 < each[1].stat().st_size < 20_000]
    few = dict(short[::8])
    monkeypatch.setattr(corpora, "stdlib_modules", lambda: few)
    monkeypatch.setattr(corpora, "_VERSION", -1)
    return few


@pytest.fixture(scope="module")
def decoded(passages):
    """(module, text of one passage), with the special tokens shown as a blank that is no letter."""
    tokenizer = stdlib_tokenizer()
    pairs = []
    for split in SPLITS:
        source = passages[split]
        texts = tokenizer.decode_batch(source.x.tolist(), skip_special_tokens=False)
        assert not any("<|pad|>" in text for text in texts)
        pairs += [
            (source.names[y], text.replace("<|name|>", "\x00"))
            for y, text in zip(source.y, texts, strict=True)
        ]
    return pairs


def test_modules_are_real_and_tests_and_tables_are_not():
    modules = stdlib_modules()
    assert {"json", "json.decoder", "asyncio.events", "argparse", "email.message"} <= set(modules)
    assert modules["json"].name == "__init__.py"
    for name in modules:
        assert not {"test", "tests", "encodings", "idlelib"} & set(name.split("."))
    assert not any("site-packages" in str(path) for path in modules.values())


def test_enough_classes_and_passages(passages):
    for split, least in zip(SPLITS, (120, 25, 50), strict=True):
        source = passages[split]
        assert len(source.names) >= least
        sizes = counts(source)
        assert sizes.min() >= 20
        assert sizes.max() <= 60
        assert source.x.dtype == np.int32
        assert source.x.shape == (len(source.y), 64)
        assert source.x.min() > 0  # every window is full
        assert source.x.max() < 2048


def test_splits_are_disjoint_by_class_and_no_passage_comes_twice(passages):
    names = [name for split in SPLITS for name in passages[split].names]
    assert len(set(names)) == len(names)
    everything = np.concatenate([passages[split].x for split in SPLITS])
    assert len(np.unique(everything, axis=0)) == len(everything)


def test_long_parts_of_a_modules_name_are_absent_from_its_passages(decoded):
    checked = 0
    for module, text in decoded:
        for part in {part.strip("_").lower() for part in module.split(".")} - {""}:
            if len(part) > 3:
                assert part not in text.lower(), (module, text)
                checked += 1
    assert checked > 10_000


def test_short_parts_are_absent_as_words(decoded):
    """Split identifiers into words on our own: at underscores, digits and changes of case."""
    word = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
    checked = 0
    for module, text in decoded:
        short = {p.strip("_").lower() for p in module.split(".") if 0 < len(p.strip("_")) <= 3}
        short = {part for part in short if part.isalpha()}
        if short:
            # A window may begin or end inside a word: only whole words count.
            words = {w.lower() for w in word.findall(text)[1:-1]}
            assert not short & words, (module, text)
            checked += 1
    assert checked > 200


def test_passages_are_the_modules_own_text(decoded):
    modules = stdlib_modules()
    normal = re.compile(r"\s+")
    rng = np.random.default_rng(0)
    for i in rng.permutation(len(decoded))[:60]:
        module, text = decoded[i]
        own = corpora.masked_text(module, modules[module]).replace("<|name|>", "\x00")
        core = text.strip("\ufffd")  # a window may cut a character in two
        assert normal.sub(" ", core) in normal.sub(" ", own)


@pytest.mark.parametrize(
    ("module", "text", "masked"),
    [
        (
            "os",
            "os.path _os OSError posix close POS",
            "_.path __ _Error posix close POS",
        ),
        ("re", "return re.compile(Re, RE_X)", "return _.compile(_, __X)"),
        ("json.decoder", "JSONDecodeError jsondecoder Decoder", "_DecodeError __ _"),
        ("asyncio.base_events", "BASE_EVENTS asyncio_x base events", "_ __x base events"),
        ("_weakrefset", "class WeakRefSet", "class _"),
    ],
)
def test_what_is_masked(module, text, masked):
    assert name_pattern(module).sub("_", text) == masked


def test_the_cache_is_fast(passages):
    start = time.perf_counter()
    again = stdlib_passages()
    assert time.perf_counter() - start < 1
    for split in SPLITS:
        assert again[split].names == passages[split].names
        np.testing.assert_array_equal(again[split].x, passages[split].x)
        np.testing.assert_array_equal(again[split].y, passages[split].y)


@pytest.mark.parametrize("also_the_tokeniser", [False, True])
def test_a_damaged_cache_is_made_again_the_same(small, cache, monkeypatch, also_the_tokeniser):
    before = set(cache.iterdir())
    monkeypatch.setattr(corpora, "_VERSION", ("damaged", also_the_tokeniser))
    first = stdlib_passages(min_passages=5)
    made = sorted(set(cache.iterdir()) - before)
    assert [path.name.rsplit("-", 1)[0] for path in made] == ["stdlib-bpe", "stdlib-passages"]
    calls = []
    make = corpora._make_passages
    monkeypatch.setattr(corpora, "_make_passages", lambda *args: calls.append(args) or make(*args))
    for path in made if also_the_tokeniser else made[1:]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.warns(UserWarning, match="is damaged .*; it is made again"):
        rebuilt = stdlib_passages(min_passages=5)
    assert calls == [(64, 2048, 5, 0)]
    for split in SPLITS:
        assert rebuilt[split].names == first[split].names
        np.testing.assert_array_equal(rebuilt[split].x, first[split].x)
    stdlib_passages(min_passages=5)
    assert len(calls) == 1
    assert set(cache.iterdir()) == before | set(made)  # no temporary file is left


def test_seeds_lengths_and_vocabularies_have_caches_of_their_own(small):
    base = stdlib_passages(min_passages=5)
    other = stdlib_passages(min_passages=5, seed=1)
    assert other["test"].names != base["test"].names
    assert stdlib_passages(min_passages=5, length=32)["train"].x.shape[1] == 32
    assert 2048 > stdlib_passages(min_passages=5, vocab=512)["train"].x.max() + 1 > 400


def test_a_passage_and_its_neighbours_tell_the_class(passages):
    """Nearest centroid of token counts is far above chance: the labels belong to the texts."""
    sample = episodes(passages["test"], ways=5, shots=5, queries=10, tasks=30)
    batch = sample(0, 0)

    def features(tokens):
        bags = np.zeros((*tokens.shape[:-1], 2048))
        np.put_along_axis(bags, tokens, 1.0, axis=-1)
        return bags / np.sqrt(bags.sum(-1, keepdims=True))

    centroids = features(batch.support["x"]).reshape(30, 5, 5, -1).mean(1)
    guess = np.einsum("tqd,twd->tqw", features(batch.query["x"]), centroids).argmax(-1)
    assert (guess == batch.query["y"]).mean() > 0.4


def test_settings_that_leave_nothing_say_so(small):
    with pytest.raises(ValueError, match=r"no \w+ module has 9999 passages of 64 tokens"):
        stdlib_passages(min_passages=9999)
    with pytest.raises(ValueError, match="must be positive"):
        stdlib_passages(length=0)


def test_stdlib_text_is_the_library_split_by_the_same_modules(small):
    streams = stdlib_text()
    passages = stdlib_passages(min_passages=1)
    tokenizer = stdlib_tokenizer()
    owner = {corpora._text(path): name for name, path in small.items()}
    found = {}
    for split, stream in streams.items():
        assert stream.dtype == np.int32
        pieces = np.split(stream, np.flatnonzero(stream == 4) + 1)
        assert not len(pieces.pop())  # the last module is ended as well
        texts = tokenizer.decode_batch([piece[:-1].tolist() for piece in pieces])
        found[split] = {owner[text] for text in texts}
        assert set(passages[split].names) <= found[split]
    assert set().union(*found.values()) == set(owner.values())
    assert sum(map(len, found.values())) == len(owner)
