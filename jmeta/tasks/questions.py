"""Questions about texts, read from SQuAD 1.1 and 2.0, DuoRC and whatever is stored like them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jmeta.tasks.rows import Row, field, inner, read_columns, rows_of, several, text, whole
from jmeta.tasks.tokenizer import whole_characters


class Known(NamedTuple):
    """Where a data set is found.

    Attributes:
        local: split -> file under ``$JMETA_DATA``.
        hub: name and configuration on the hub, or None.
    """

    local: Mapping[str, str]
    hub: tuple[str, str | None] | None = None


def _robust(name: str) -> dict[str, str]:
    return {"train": f"qa/{name}_train.json.gz", "dev": f"qa/{name}_val.json.gz"}


KNOWN = {
    "squad": Known(
        {
            "train": "qa/squad_v1.1_train_sample.json.gz",
            "dev": "qa/squad_v1.1_dev_part.json.gz",
        },
        ("rajpurkar/squad", None),
    ),
    "squad_v2": Known(
        {"train": "qa/squad_v2.0_devpart_a.json.gz", "dev": "qa/squad_v2.0_devpart_b.json.gz"},
        ("rajpurkar/squad_v2", None),
    ),
    "duorc": Known(_robust("duorc"), ("ibm-research/duorc", "ParaphraseRC")),
    "race": Known(_robust("race")),
    "relation_extraction": Known(_robust("relation_extraction")),
    "xquad_en": Known({"dev": "qa/xquad_en.json.gz"}, ("google/xquad", "xquad.en")),
}


class Question(NamedTuple):
    """A question about a text.

    Attributes:
        id: what the data set calls it.
        question: the question.
        context: the text.
        answers: the gold answers; none where the question cannot be answered.
        starts: the character at which each begins; -1 where it is not in the text word for word.
    """

    id: str
    question: str
    context: str
    answers: tuple[str, ...] = ()
    starts: tuple[int, ...] = ()


def read(
    name: str, split: str = "train", path: str | os.PathLike[str] | None = None
) -> list[Question]:
    """Read questions: SQuAD's nested JSON, SQuAD's columns on the hub, or DuoRC's.

    Args:
        name: ``"squad"``, ``"squad_v2"``, ``"duorc"``, ``"race"``, ``"relation_extraction"``,
            ``"xquad_en"``, or any name with ``path``.
        split: ``"train"`` or ``"dev"``.
        path: a file or folder, or a name on the hub; by default the copy under
            ``$JMETA_DATA/qa``, and the hub where that is not.

    Returns:
        The questions.

    Raises:
        DataUnavailable: the data are not to be had here; the message says what to do.
        ValueError: the name is not known, or a row is not as it should be: an answer that is not
            where it is said to be, say; the row and the field are named.
    """
    if name not in KNOWN and path is None:
        raise ValueError(f"no question answering {name!r}; known are {sorted(KNOWN)}; or give path")
    known = KNOWN.get(name, Known({}))
    split = "dev" if split in ("val", "validation") else split
    columns = read_columns(path, split, known.local.get(split), known.hub)
    questions = []
    for row in rows_of(columns, name):
        if "data" in row.values:
            questions += _nested(row)
        elif "plot" in row.values:
            questions.append(_duorc(row))
        else:
            questions.append(_question(row, text(row, "context")))
    if not questions:
        raise ValueError(f"{name} holds no question")
    return questions


def _nested(row: Row) -> list[Question]:
    questions = []
    for a, article in enumerate(several(row, "data")):
        paragraphs = several(inner(row, article, f"article {a}"), "paragraphs")
        for p, each in enumerate(paragraphs):
            paragraph = inner(row, each, f"article {a}, paragraph {p}")
            context = text(paragraph, "context")
            for q, asked in enumerate(several(paragraph, "qas")):
                questions.append(_question(inner(paragraph, asked, f"question {q}"), context))
    return questions


def _question(row: Row, context: str) -> Question:
    identity = str(field(row, "id"))
    answers = []
    for a, each in enumerate(_given(row)):
        answer = inner(row, each, f"question {identity!r}, answers[{a}]")
        said, start = text(answer, "text"), whole(answer, "answer_start")
        if start < 0 or context[start : start + len(said)] != said:
            there = context[max(start, 0) : max(start, 0) + len(said)]
            raise ValueError(
                f"{answer.where}, field 'answer_start': the context holds {there!r} at {start}, "
                f"not {said!r}"
            )
        answers.append((said, start))
    return Question(
        identity,
        text(row, "question"),
        context,
        tuple(said for said, _ in answers),
        tuple(start for _, start in answers),
    )


def _given(row: Row) -> Sequence[Any]:
    """The answers of a question as objects; none where it cannot be answered."""
    given = row.values.get("answers")
    if row.values.get("is_impossible") or given is None:
        return []
    if not isinstance(given, Mapping):
        return several(row, "answers")
    columns = inner(row, given, "answers")  # the hub: columns of texts and starts
    said, starts = several(columns, "text"), several(columns, "answer_start")
    if len(said) != len(starts):
        raise ValueError(f"{columns.where}: {len(said)} texts, but {len(starts)} starts")
    return [{"text": a, "answer_start": b} for a, b in zip(said, starts, strict=True)]


def _duorc(row: Row) -> Question:
    """DuoRC as on the hub: answers in free words, which may or may not be in the plot."""
    plot = text(row, "plot")
    given = [] if row.values.get("no_answer") else several(row, "answers")
    said = [
        whole_characters(each, f"{row.where}, field 'answers[{a}]'") for a, each in enumerate(given)
    ]
    return Question(
        str(field(row, "question_id")),
        text(row, "question"),
        plot,
        tuple(said),
        tuple(plot.find(each) for each in said),
    )
