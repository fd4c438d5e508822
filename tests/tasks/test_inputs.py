import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from jmeta.tasks import glue, inputs
from jmeta.tasks.episodes import episodes
from jmeta.tasks.superglue import TASKS
from jmeta.tasks.text import Example
from jmeta.tasks.tokenizer import vocabulary

pytestmark = pytest.mark.usefixtures("text_cache")


def words(vocab):
    made = Tokenizer(models.WordLevel({"a": 0, "b": 1, **vocab}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return vocabulary(made)


BERT = words({"[PAD]": 2, "[CLS]": 3, "[SEP]": 4})
ROBERTA = words({"<pad>": 2, "<s>": 3, "</s>": 4})
GPT2 = words({"<|endoftext|>": 2})
BARE = words({})


@pytest.mark.parametrize(
    ("kind", "single", "pair"),
    [
        (BERT, [3, 0, 4], [3, 0, 4, 1, 1, 4]),
        (ROBERTA, [3, 0, 4], [3, 0, 4, 4, 1, 1, 4]),
        (GPT2, [0, 2], [0, 2, 1, 1, 2]),
        (BARE, [0], [0, 1, 1]),
    ],
)
def test_every_model_is_given_its_own_frame(kind, single, pair):
    found = inputs.encode([("a", None), ("a", "b b")], kind, positions=9)
    assert found.length.tolist() == [len(single), len(pair)]
    for row, expected in zip(found.tokens.tolist(), (single, pair), strict=True):
        assert row == expected + [kind.pad] * (9 - len(expected))
    batch = inputs.batch(found, [1])
    ends = len(pair) - pair.index(1)
    assert batch["segments"][0].tolist() == [0] * pair.index(1) + [1] * ends + [0] * (9 - len(pair))
    assert batch["mask"].sum() == len(pair)
    assert found.cut == 0


def test_longer_inputs_lose_their_end_the_longer_text_first():
    found = inputs.encode([("a", "b " * 50), ("a " * 50, None), ("a", "")], BERT, positions=8)
    assert found.tokens[0].tolist() == [3, 0, 4, 1, 1, 1, 1, 4]
    assert found.tokens[1].tolist() == [3, *[0] * 6, 4]
    assert found.tokens[2].tolist() == [3, 0, 4, 4, 2, 2, 2, 2]
    assert found.cut == 2
    with pytest.raises(ValueError, match=r"4 positions leave no room .* beside 3 special"):
        inputs.encode([("a", "b")], BERT, positions=4)
    with pytest.raises(ValueError, match="no text"):
        inputs.encode([], BERT)


def test_texts_alone_are_single_inputs():
    ours = inputs.encode(["a", "b"], BERT, positions=5)
    theirs = inputs.encode([("a", None), ("b", None)], BERT, positions=5)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(ours.second, ours.length)


def test_a_labelled_task_gives_episodes():
    rows = [Example("a " * i, "b", label=i % 2) for i in range(1, 13)]
    source = inputs.labelled(TASKS["RTE"], rows, BERT, positions=20)
    assert source.names == ("not_entailment", "entailment")
    episode = episodes(source, ways=2, shots=2, queries=3, tasks=4)(0, 0)
    assert episode.support["x"]["tokens"].shape == (4, 4, 20)
    assert episode.query["x"]["mask"].dtype == np.float32
    with pytest.raises(ValueError, match="the label of row 1 of RTE is hidden"):
        inputs.labelled(TASKS["RTE"], [rows[0], Example("a", "b")], BERT)
    for wrong in (0.5, "1", float("nan"), None, 2):
        with pytest.raises(ValueError, match=f"the label of row 1 of RTE .*: {wrong!r}"):
            inputs.labelled(TASKS["RTE"], [rows[0], Example("a", "b", wrong)], BERT)
    with pytest.raises(ValueError, match="input 1, first text: None is no text"):
        inputs.labelled(TASKS["RTE"], [rows[0], Example(None, "b", 0)], BERT)
    with pytest.raises(ValueError, match="STS-B has no classes"):
        inputs.labelled(glue.TASKS["STS-B"], rows, BERT)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", None], "input 1: None is no text"),
        ([("a", 3)], "input 0, second text: 3 is no text"),
        ([("a", "b", "c")], "input 0 is neither a text nor a pair: it holds 3 things"),
        (["a", "\ud83d"], "input 1: character 0 is half of a surrogate pair"),
    ],
)
def test_what_is_no_text_is_named(texts, message):
    with pytest.raises(ValueError, match=message):
        inputs.encode(texts, BERT)


def test_equal_inputs_of_a_class_are_kept_once():
    said = [("a", 0), ("b", 0), ("a ", 0), ("a", 1), ("b b", 0), ("b b b", 0)]
    rows = [Example(a, label=label) for a, label in said]
    source = inputs.labelled(glue.TASKS["SST-2"], rows, BERT, positions=4)
    # the last two are cut to the same four tokens; one text in two classes stays in both
    assert source.y.tolist() == [0, 0, 1, 0]
    assert source.x["tokens"].tolist() == [[3, 0, 4, 2], [3, 1, 4, 2], [3, 0, 4, 2], [3, 1, 1, 4]]
