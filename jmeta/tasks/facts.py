"""A made-up stream of documents and questions: small enough to be learned within minutes."""

from __future__ import annotations

import numpy as np

from jmeta.tasks.questions import Question

# Words in a row, as a list of one a line would be longer than all the rest.
_FIRST, _LAST, _PLACES, _TRADES = (
    words.split()
    for words in (
        "Ada Bo Cleo Dan Eva Finn Gus Hana Ivo June Kai Lena Milo Nora Otto Pia Quin Rosa Sven "
        "Tess Uma Vito Wanda Xenia Yann Zoe",
        "Abel Brandt Castro Dahl Engel Frost Grimm Holm Ivers Jansen Kern Lund Moser Novak Olsen "
        "Price Quist Rossi Stein Thorn Ullman Varga Weiss York Zeman",
        "Aldra Borno Celta Dorin Ester Falun Gerda Hilma Istra Jorvik Kolma Lunda Malmo Narva "
        "Oslen Parno Quenta Rovin Selma Turku",
        "baker carpenter doctor engineer farmer gardener hunter judge lawyer mason nurse painter "
        "printer sailor tailor teacher weaver writer",
    )
)
_FILLERS = (
    "The records of that time are not complete, and much has been lost.",
    "Not everybody agrees on what happened in the years that followed.",
    "Some letters were kept by the family and can be read today.",
    "It is said that the winters were long and the summers were short.",
    "There was a market twice a week, and many people came to it.",
    "Later on a street and a small bridge were given the same name.",
    "Most of what is known comes from a few pages in an old book.",
    "The house still stands, although nobody has lived there for years.",
)


def facts(count: int, seed: int) -> list[Question]:
    """Short lives of made-up people, each with one question about it.

    A document tells where and when somebody was born and what became of them, between sentences
    that tell nothing. Names may be drawn twice, with other facts: who has read a document knows
    what only that document says.

    Args:
        count: how many documents.
        seed: decides everything.

    Returns:
        Questions, with the document as ``context``.

    Example:
        >>> [one] = facts(1, seed=0)
        >>> one.answers[0] in one.context, one.question.endswith("?")
        (True, True)
    """
    rng = np.random.default_rng([seed, 17])
    made = []
    for number in range(count):
        name = f"{rng.choice(_FIRST)} {rng.choice(_LAST)}"
        place, trade = str(rng.choice(_PLACES)), str(rng.choice(_TRADES))
        year = int(rng.integers(1700, 1900))
        told = [
            f"{name} was born in {place}.",
            f"{name} was born in the year {year}.",
            f"{name} became a {trade}.",
        ]
        kind = int(rng.integers(3))
        question, answer = (
            (f"Where was {name} born?", place),
            (f"In which year was {name} born?", str(year)),
            (f"What did {name} become?", trade),
        )[kind]
        sentences = [told[kind], *rng.choice(np.array(_FILLERS), 3, replace=False)]
        sentences.append(told[(kind + 1 + int(rng.integers(2))) % 3])
        order = rng.permutation(len(sentences))
        context = " ".join(str(sentences[i]) for i in order)
        start = context.index(told[kind]) + told[kind].index(answer)
        made.append(Question(f"{seed}-{number}", question, context, (answer,), (start,)))
    return made
