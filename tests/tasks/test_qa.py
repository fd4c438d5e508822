import json

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from jmeta.data.sources import DataUnavailable
from jmeta.tasks import prompts, qa, questions
from jmeta.tasks.qa import Answer
from jmeta.tasks.questions import Question
from jmeta.tasks.tokenizer import byte_level, load_tokenizer, token_ids, token_pieces, vocabulary

pytestmark = pytest.mark.usefixtures("text_cache")

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
quick = settings(
    deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def own(bpe):
    """The byte-level BPE with a [CLS] of its own: the unified [CLS0] stands for it."""
    return vocabulary(bpe.tokenizer)._replace(cls=bpe.cls[0], eos=bpe.sep)


@pytest.fixture(scope="module")
def bert(wordpiece_tokenizer):
    return vocabulary(wordpiece_tokenizer)


def encoded(monkeypatch, *args, **settings):
    monkeypatch.setattr(qa, "cached_arrays", lambda path, make: make())
    return qa.encode(*args, **settings)


# --- windows and characters ---


@quick
@given(question=texts, context=texts, positions=st.integers(12, 40), stride=st.integers(1, 50))
def test_every_token_of_the_context_is_in_a_window(
    own, monkeypatch, question, context, positions, stride
):
    asked = [Question("q", question, context)]
    windows = encoded(
        monkeypatch, asked, own, positions=positions, stride=stride, longest_question=8
    )
    (pieces,) = token_pieces(own.tokenizer, [context])
    seen = set()
    for w in range(len(windows.tokens)):
        part = slice(windows.first[w], windows.last[w])
        places = list(zip(windows.from_char[w, part], windows.to_char[w, part], strict=True))
        ids = windows.tokens[w, part]
        seen |= set(zip(ids.tolist(), map(tuple, np.array(places).tolist()), strict=True))
        assert windows.length[w] == windows.last[w] + 1 <= positions
        outside = np.delete(windows.from_char[w], range(windows.first[w], windows.last[w]))
        assert (outside == -1).all()
    expected = zip(pieces.ids.tolist(), pieces.start.tolist(), pieces.stop.tolist(), strict=True)
    assert seen == {(i, (a, b)) for i, a, b in expected}


@quick
@given(context=texts.filter(str.strip), data=st.data())
def test_answers_come_back_to_their_characters(own, monkeypatch, context, data):
    """Whatever the text and the windows: the tokens of the target are the answer's, or cover it."""
    a = data.draw(st.integers(0, len(context) - 1))
    b = data.draw(st.integers(a + 1, len(context)))
    answer = context[a:b]
    assume(answer.strip())
    question = Question("q", "who?", context, (answer,), (a,))
    positions = data.draw(st.integers(12, 60))
    windows = encoded(monkeypatch, [question], own, positions=positions, stride=4)
    held = np.flatnonzero(windows.start)
    (pieces,) = token_pieces(own.tokenizer, [context])
    begin, end = a + len(answer) - len(answer.lstrip()), a + len(answer.rstrip())
    inside = (pieces.start < end) & (pieces.stop > begin)
    room = positions - int(windows.first[0]) - 1
    if inside.sum() + 3 <= room:  # windows overlap by room - 4: a short answer is whole somewhere
        assert len(held)
    for w in held:
        tokens = slice(windows.start[w], windows.stop[w] + 1)
        assert windows.stop[w] - windows.start[w] + 1 == inside.sum()
        low, high = windows.from_char[w, tokens].min(), windows.to_char[w, tokens].max()
        assert low <= begin < end <= high
        starts, stops = np.zeros((2, *windows.tokens.shape))
        starts[w, windows.start[w]] = stops[w, windows.stop[w]] = 9
        (found,) = qa.decode(starts, stops, windows, [question], longest_answer=100)
        assert context[found.start : found.stop] == found.text
        # A token may hold half a character, and with it the characters before.
        if pieces.start[inside].min() == begin and pieces.stop[inside].max() == end:
            assert found.text == answer.strip()
        else:
            assert answer.strip() in found.text


def test_golden_layout(bert, own):
    question = Question("q", "Cat?", "The cats sat.", ("cats",), (4,))
    windows = qa.encode([question], bert, positions=16)
    tokens = [bert.tokenizer.id_to_token(int(i)) for i in windows.tokens[0]]
    assert tokens == [
        "[CLS]", "cat", "?", "[SEP]", "the", "cat", "##s", "s", "##a", "##t", ".", "[SEP]",
        *["[PAD]"] * 4,
    ]  # fmt: skip
    found = qa.batch(windows, [0])
    assert found["segments"][0].tolist() == [0] * 4 + [1] * 8 + [0] * 4
    assert found["mask"][0].tolist() == [1] * 12 + [0] * 4
    assert (found["start"][0], found["stop"][0]) == (5, 6)
    assert windows.from_char[0, 4:11].tolist() == [0, 4, 7, 9, 10, 11, 12]


def test_roberta_has_two_separators_and_gpt2_its_end_of_text(bpe):
    from tokenizers import Tokenizer, models, pre_tokenizers

    def words(vocab):
        made = Tokenizer(models.WordLevel(vocab, unk_token="a"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        return vocabulary(made)

    roberta = words({"a": 0, "<pad>": 1, "</s>": 2, "<s>": 3, "<mask>": 4})
    gpt2 = words({"a": 0, "<|endoftext|>": 1})
    asked = [Question("q", "a", "a a")]
    assert qa.encode(asked, roberta, positions=8).tokens[0].tolist() == [3, 0, 2, 2, 0, 0, 2, 1]
    assert qa.encode(asked, gpt2, positions=8).tokens[0].tolist() == [1, 0, 1, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="nor an end of text"):
        qa.encode(asked, words({"a": 0}), positions=8)


def test_texts_longer_than_the_model_and_empty_ones(own):
    long = Question("long", "why " * 500, "a cat " * 700, ("cat",), (2,))
    none = Question("none", "", "")
    windows = qa.encode([long, none], own, positions=64, stride=20, longest_question=16)
    assert windows.length.max() == 64
    assert (windows.question == 1).sum() == 1
    starts, stops = np.random.default_rng(0).normal(size=(2, *windows.tokens.shape))
    first, second = qa.decode(starts, stops, windows, [long, none])
    assert long.context[first.start : first.stop] == first.text
    assert (second.text, second.null_odds) == ("", np.inf)
    with pytest.raises(ValueError, match=r"20 positions leave no room .* question of 64"):
        qa.encode([long], own, positions=20)


# --- decoding ---


def test_decoding_equals_a_search_of_every_span(own):
    rng = np.random.default_rng(2)
    asked = [
        Question("0", "who?", "the cat sat on the mat and a dog saw it", (), ()),
        Question("1", "what?", "a dog", (), ()),
    ]
    windows = qa.encode(asked, own, positions=14, stride=3)
    assert (windows.question == 0).sum() > 2
    for _ in range(5):
        starts, stops = rng.normal(size=(2, *windows.tokens.shape))
        found = qa.decode(starts, stops, windows, asked, longest_answer=4)
        for q, answer in enumerate(found):
            best, null = (-np.inf, "", 0, 0), np.inf
            for w in np.flatnonzero(windows.question == q):
                null = min(null, starts[w, 0] + stops[w, 0])
                for i in range(windows.first[w], windows.last[w]):
                    for j in range(i, min(i + 4, windows.last[w])):
                        a, b = windows.from_char[w, i], windows.to_char[w, j]
                        best = max(best, (starts[w, i] + stops[w, j], "", int(a), int(b)))
            said = asked[q].context[best[2] : best[3]]
            assert answer.text == said.strip()
            assert answer.text == asked[q].context[answer.start : answer.stop]
            assert answer.score == pytest.approx(best[0])
            assert answer.null_odds == pytest.approx(null - best[0])


def test_no_answer_must_hold_in_every_window(own):
    question = Question("q", "who?", "the cat sat on the mat " * 4, (), ())
    windows = qa.encode([question], own, positions=24, stride=10)
    starts, stops = np.zeros((2, *windows.tokens.shape))
    starts[:, 0] = 5  # every window says that it holds none ...
    (answer,) = qa.decode(starts, stops, windows, [question])
    assert answer.null_odds == 5
    assert qa.give_up([answer]) == [""]
    starts[1, 0] = -5  # ... but one
    (answer,) = qa.decode(starts, stops, windows, [question])
    assert qa.give_up([answer]) == [answer.text] != [""]
    assert qa.give_up([answer], threshold=-9) == [""]


def test_logits_that_are_nan_or_of_other_questions_are_no_answers(own):
    question = Question("q", "who?", "the cat sat", (), ())
    windows = qa.encode([question], own, positions=24)
    right, wrong = np.zeros((2, *windows.tokens.shape))
    wrong[0, 20] = np.nan
    with pytest.raises(ValueError, match="stop_logits of window 0 hold NaN"):
        qa.decode(right, wrong, windows, [question])
    with pytest.raises(ValueError, match="start_logits have the shape"):
        qa.decode(right[:, 1:], right, windows, [question])
    with pytest.raises(ValueError, match="the windows are of 1 questions, not of 2"):
        qa.decode(right, right, windows, [question] * 2)


def test_scores_of_answerable_and_of_mixed_questions():
    both = [Question("0", "q", "a cat", ("a cat",), (0,)), Question("1", "q", "a cat")]
    answers = [Answer("cat", 2, 5, 1.0, -1.0), Answer("cat", 2, 5, 1.0, 0.5)]
    one = qa.score(answers[:1], both[:1])
    assert (one.metrics, one.n, one.details) == ({"EM": 100.0, "F1": 100.0}, 1, {})
    mixed = qa.score(answers, both)
    assert (mixed.metrics, mixed.n) == ({"EM": 100.0, "F1": 100.0}, 2)
    assert mixed.details["HasAns_EM"] == mixed.details["NoAns_EM"] == 100.0
    assert (mixed.details["best_F1"], mixed.details["best_F1_threshold"]) == (100.0, -1.0)


# --- reading ---


def squad_file(folder, qas, context="Ann saw Bo.\r\nBo left. 😀 Ann"):
    path = folder / "squad.json"
    data = [{"title": "t", "paragraphs": [{"context": context, "qas": qas}]}]
    path.write_text(json.dumps({"version": "x", "data": data}))
    return path


def test_squads_own_json_and_the_hubs_columns(tmp_path):
    qas = [
        {"id": "1", "question": "who?", "answers": [{"text": "Ann", "answer_start": 24}]},
        {"id": "2", "question": "how?", "answers": [], "is_impossible": True,
         "plausible_answers": [{"text": "Ann", "answer_start": 0}]},
    ]  # fmt: skip
    found = questions.read("mine", path=squad_file(tmp_path, qas))
    context = "Ann saw Bo.\r\nBo left. 😀 Ann"
    assert found == [
        Question("1", "who?", context, ("Ann",), (24,)),
        Question("2", "how?", context),
    ]
    rows = [
        {"id": q.id, "title": "t", "question": q.question, "context": context,
         "answers": {"text": list(q.answers), "answer_start": list(q.starts)}}
        for q in found
    ]  # fmt: skip
    flat = tmp_path / "flat.jsonl"
    flat.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert questions.read("mine", path=flat) == found


def test_duorc_of_the_hub_has_answers_that_are_not_in_the_plot(tmp_path):
    row = {"plot": "Ann saw Bo.", "question_id": "7", "question": "who?", "title": "t"}
    rows = [
        {**row, "answers": ["Bo", "Bob"], "no_answer": False},
        {**row, "answers": [], "no_answer": True},
    ]
    path = tmp_path / "duorc.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    some, none = questions.read("duorc", path=path)
    assert (some.answers, some.starts) == (("Bo", "Bob"), (8, -1))
    assert none.answers == ()
    path.write_text(json.dumps({**row, "answers": ["Bo", None], "no_answer": False}))
    with pytest.raises(ValueError, match=r"row 0 of duorc, field 'answers\[1\]': None is no text"):
        questions.read("duorc", path=path)


@pytest.mark.parametrize(
    ("qas", "message"),
    [
        ([{"id": "1", "question": "q", "answers": [{"text": "Bo", "answer_start": 0}]}],
         r"question '1', answers\[0\], field 'answer_start': .* holds 'An' at 0, not 'Bo'"),
        ([{"id": "1", "answers": []}], "question 0 has no field 'question'"),
        ([{"id": "1", "question": "q", "answers": [{"text": "Bo"}]}],
         r"answers\[0\] has no field 'answer_start'"),
        ([{"id": "1", "question": "q", "answers": [{"text": "Ann", "answer_start": "0"}]}],
         r"answers\[0\], field 'answer_start': '0' is no whole number"),
        ([{"id": "1", "question": "q", "answers": [{"text": "Ann", "answer_start": 0.5}]}],
         r"answers\[0\], field 'answer_start': 0.5 is no whole number"),
        ([{"id": "1", "question": "q", "answers": 3}], "question 0, field 'answers': 3 is no list"),
        ([{"id": "1", "question": "q", "answers": {"text": ["Ann"], "answer_start": []}}],
         "question 0, answers: 1 texts, but 0 starts"),
        ({"id": "1"}, "field 'qas': {'id': '1'} is no list"),
        ([{"id": "1", "question": "q", "answers": [{"text": "Ann", "answer_start": -2}]}],
         "field 'answer_start'"),
    ],
)  # fmt: skip
def test_mistakes_name_the_question_and_the_field(tmp_path, qas, message):
    with pytest.raises(ValueError, match=message):
        questions.read("mine", path=squad_file(tmp_path, qas))


def test_what_is_not_here_is_said(monkeypatch, tmp_path):
    monkeypatch.delenv("JMETA_DATA", raising=False)
    with pytest.raises(DataUnavailable, match=r"'rajpurkar/squad_v2' .* JMETA_DATA"):
        questions.read("squad_v2")
    with pytest.raises(DataUnavailable, match="no train split here: JMETA_DATA is not set"):
        questions.read("race")
    with pytest.raises(ValueError, match=r"no question answering 'squad3'; known are \['duorc'"):
        questions.read("squad3")
    with pytest.raises(ValueError, match="mine holds no question"):
        questions.read("mine", path=squad_file(tmp_path, []))


@pytest.mark.parametrize(
    ("name", "train", "dev", "impossible"),
    [
        ("squad", 4330, 2910, 0),
        ("squad_v2", 4935, 1143, 571),
        ("duorc", 127, 126, 0),
        ("race", 127, 128, 0),
    ],
)
def test_gold_targets_are_perfect_on_real_data(jmeta_data, name, train, dev, impossible):
    assert len(questions.read(name, "train")) == train
    asked = questions.read(name, "dev")
    assert len(asked) == dev
    if name == "squad_v2":
        impossible = sum(not q.answers for q in asked)
        assert 0 < impossible < dev
    asked = asked[:300]
    tokenizer = load_tokenizer("vocab/bert-base-uncased")
    windows = qa.encode(asked, vocabulary(tokenizer), positions=384, stride=128)
    starts, stops = np.zeros((2, *windows.tokens.shape))
    rows = np.arange(len(starts))
    starts[rows, windows.start] = stops[rows, windows.stop] = 5
    found = qa.score(qa.decode(starts, stops, windows, asked, longest_answer=60), asked)
    assert found.n == len(asked)
    assert found.metrics["F1"] > 99.5  # RACE has an answer that begins inside a word


# --- prompts ---


def said_by(words, row):
    return words.tokenizer.decode(row.tolist(), skip_special_tokens=False)


def test_golden_prompt(own):
    asked = [
        Question("0", "who?", "the cat sat", ("cat",), (4,)),
        Question("1", "how?", "naïve 東京", ()),
    ]
    rows = prompts.answered(asked, own, positions=120)
    expected = [
        ("Context: the cat sat\nQuestion: who?\nAnswer:", " cat"),
        ("Context: naïve 東京\nQuestion: how?\nAnswer:", " unanswerable"),
    ]
    for i, (front, answer) in enumerate(expected):
        real = rows.mask[i] == 1
        tokens = rows.tokens[i][real]
        assert said_by(own, tokens[:-1]) == front + answer
        assert tokens[-1] == own.eos
        (ids,) = token_ids(own.tokenizer, [answer])
        assert rows.tokens[i][rows.weights[i] == 1].tolist() == [*ids.tolist(), own.eos]
        assert prompts.said(answer) == answer.strip().replace("unanswerable", "")
    open_rows = prompts.to_answer(asked, own, positions=120)
    for i, (front, _) in enumerate(expected):
        assert said_by(own, open_rows.tokens[i][open_rows.mask[i] == 1]) == front
    assert not open_rows.weights.any()


@quick
@given(data=st.data(), positions=st.integers(70, 110), stride=st.integers(1, 40))
def test_a_long_context_is_shown_where_its_answer_is(own, monkeypatch, data, positions, stride):
    monkeypatch.setattr(prompts, "cached_arrays", lambda path, make: make())
    filler = data.draw(st.text("xyz ", max_size=120))
    place = data.draw(st.integers(0, len(filler)))
    context = f"{filler[:place]}QQ{filler[place:]}"
    question = Question("q", "who?", context, ("QQ",), (place,))
    trained = prompts.answered([question], own, positions=positions, stride=stride)
    assert len(trained.tokens) == 1
    free = positions - int((trained.mask[0] == 1).sum())
    open_rows = prompts.to_answer([question], own, positions=positions, stride=stride, room=8)
    shown = [said_by(own, row[mask == 1]) for row, mask in zip(*open_rows[:2], strict=True)]
    assert all(text.startswith("Context:") and text.endswith("Answer:") for text in shown)
    assert (open_rows.mask.sum(-1) + 8 <= positions).all()
    if free > 0:  # it fits as a whole
        assert said_by(own, trained.tokens[0][trained.mask[0] == 1]).startswith(
            f"Context: {context}\n"
        )
    # whatever the stride: the two letters are one token or two, and there is room for two
    body = said_by(own, trained.tokens[0][trained.mask[0] == 1]).split("\nQuestion")[0]
    assert "QQ" in body


@pytest.mark.parametrize("place", [0, 10, 37, 70])
def test_an_answer_that_every_window_cuts_is_shown_all_the_same(own, place):
    context = f"{'x' * place}QWQWQWQWQW{'y' * (70 - place)}"
    question = Question("q", "who?", context, ("QWQWQWQWQW",), (place,))
    (front,) = prompts.to_answer([Question("q", "who?", "")], own, positions=120).mask
    (ids,) = token_ids(own.tokenizer, [" QWQWQWQWQW"])
    room = int(front.sum()) + len(ids) + 1 + 12
    for stride in (1, 12, 100):  # windows of 12 tokens; a stride of 12 leaves no overlap
        rows = prompts.answered([question], own, positions=room, stride=stride)
        shown = said_by(own, rows.tokens[0][rows.mask[0] == 1]).split("\nQuestion")[0]
        assert "QWQWQWQWQW" in shown


def test_prompts_that_do_not_fit_and_no_end_of_text(own):
    question = Question("q7", "who is it and why " * 9, "the cat")
    with pytest.raises(ValueError, match=r"question 'q7': 40 positions leave no room"):
        prompts.answered([question], own, positions=40)
    with pytest.raises(ValueError, match="has no end of text"):
        prompts.to_answer([question], own._replace(eos=None))
    with pytest.raises(ValueError, match="no question"):
        prompts.answered([], own)
    with pytest.raises(ValueError, match="longest_question=-1, room=32 are no tokens"):
        prompts.to_answer([question], own, longest_question=-1)
    with pytest.raises(ValueError, match="longest_question=64, room=-2 are no tokens"):
        prompts.to_answer([question], own, room=-2)
    with pytest.raises(ValueError, match="longest_question=-1 is no number of tokens"):
        qa.encode([question], own, longest_question=-1)


def test_prompts_for_gpt2(jmeta_data):
    folder = jmeta_data / "vocab" / "gpt2"
    words = vocabulary(byte_level(folder / "vocab.json", folder / "merges.txt"))
    asked = questions.read("duorc", "train")[:20]
    rows = prompts.answered(asked, words, positions=256)
    assert rows.tokens.max() <= 50256  # nothing that GPT-2 has no embedding for
    for question, tokens, weights in zip(asked, rows.tokens, rows.weights, strict=True):
        predicted = tokens[weights == 1]
        assert words.tokenizer.decode(predicted[:-1].tolist()) == f" {question.answers[0].strip()}"
        assert question.answers[0] in said_by(words, tokens[weights == 0])  # in the context shown
