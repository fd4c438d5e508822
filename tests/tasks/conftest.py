"""Small tokenisers for the text tasks, trained or written here, and a cache folder of its own."""

import string

import pytest

from jmeta.tasks.tokenizer import train_unified, unified

WORDS = [
    "the cat sat on the mat and a dog saw it",
    "question answer cause effect true false",
    "naïve café 東京 العربية 😀",
]


@pytest.fixture(scope="module")
def text_cache(tmp_path_factory):
    """A cache folder for the tests of one module."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JMETA_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def bpe():
    """A byte-level BPE in the unified format: any text comes back exactly."""
    return unified(train_unified(WORDS, 340))


@pytest.fixture(scope="session")
def wordpiece_tokenizer():
    """A lower-casing WordPiece of letters, with BERT's special and unused tokens."""
    from tokenizers.implementations.bert_wordpiece import BertWordPieceTokenizer

    letters = string.ascii_lowercase + string.digits
    vocab = ["[PAD]", *(f"[unused{k}]" for k in range(32)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab += ["the", "cat", "##s", "*", *letters, *(f"##{c}" for c in letters[:18] + letters[19:])]
    vocab += [c for c in string.punctuation if c != "*"]
    return BertWordPieceTokenizer({token: i for i, token in enumerate(vocab)}, lowercase=True)


@pytest.fixture(scope="session")
def wordpiece(wordpiece_tokenizer):
    """The same in the unified format."""
    return unified(wordpiece_tokenizer)
