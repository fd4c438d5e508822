"""CaMeLS: the tokens of a document that a model should learn from, to answer questions afterwards.

A small decoder reads a stream of documents by gradient descent, one step each, and is then asked
about them. Weights on tokens are learned, uniform, or given by a rule.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jmeta
from experiments import _camels_data as reading
from experiments._shared import (
    Trained,
    command_line,
    learning_curve,
    record,
    train_method,
    write_metrics,
)
from jmeta.core.types import Array, Episode, Key, MetaGradient, Problem, PyTree
from jmeta.methods import init_weight_head, learned_start, weight_head, weight_slopes
from jmeta.methods.token_weights import FIRST_WEIGHT, given, token_weights, uniform
from jmeta.models import transformer
from jmeta.runtime import config as configuration
from jmeta.runtime import distributed, figures, fit, report
from jmeta.runtime.evaluate import adapt
from jmeta.runtime.statistics import mean_ci, summarise
from jmeta.tasks.bpe import SEP
from jmeta.tasks.scores import exact_match, token_f1

LEARNED, UNIFORM, NONE = "camels", "uniform", "not adapted"
LOSS, MOVED = "loss of the answer, nats per token", "divergence elsewhere, nats per token"
EXACT, F1 = "exact match, %", "F1, %"
KIND = "mean weight, the document's being 1"


@dataclasses.dataclass(frozen=True)
class Config(configuration.RunConfig):
    """Learned weights on tokens against uniform ones and rules, on a stream of documents."""

    source: str = "facts"
    """facts (made-up lives, needs no data), or questions: squad ($JMETA_DATA/qa)."""
    documents: tuple[int, ...] = (800, 800, 120, 240)
    """Documents that the base model is trained on, that weights are learned on, for the choices,
    and to test on."""
    vocab: int = 512
    """Size of the byte-level BPE, trained on the base's documents."""
    length: int = 80
    """Tokens of a document: a window around the answer."""
    question_length: int = 32
    """Tokens of a question with its answer."""
    longest_answer: int = 10
    """Tokens of an answer, the separator included; longer ones lose their end."""
    width: int = 48
    """Width of the decoder; the model of the weights is a copy of it with a head."""
    layers: int = 2
    """Layers of the decoder."""
    base_steps: int = 600
    """Steps of the base model's training on documents and questions."""
    base_batch: int = 16
    """Rows in each of them."""
    base_lr: float = 2e-3
    """AdamW's rate there, at the start of a cosine decay."""
    stream: int = 6
    """Documents that are read in turn before the questions about them."""
    locality_documents: int = 2
    """Documents of the base's training whose predictions should stay."""
    locality: float = 0.1
    """Weight of the divergence there."""
    inner_lr: float = 0.1
    """Rate of the inner SGD while weights are learned."""
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    """Rates at test to choose from, for every method by itself, on validation documents."""
    meta_steps: int = 200
    """Meta-steps."""
    meta_lr: float = 1e-3
    """Adam's rate of the weights' model, at the start of a cosine decay."""
    drop: float = 0.0
    """Share of a document's tokens whose TF-IDF is set to zero."""
    evaluate_every: int = 100
    """Meta-steps between looks at validation documents; the best is kept."""
    validation_streams: int = 20
    """Streams for the choices."""
    test_streams: int = 40
    """Streams of the final numbers, the same for all methods."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.documents) != 4 or min(self.documents) < self.stream:
            raise ValueError(
                f"documents={self.documents}: four numbers, each at least stream={self.stream}"
            )
        if not 1 < self.longest_answer < self.question_length:
            raise ValueError(
                f"longest_answer={self.longest_answer} leaves no room for a question of "
                f"question_length={self.question_length}"
            )


PRESETS = {
    "demo": Config(seeds=3),
    "squad": Config(
        seeds=3, source="squad", documents=(1800, 1600, 120, 360), vocab=1024, length=96,
        question_length=48, longest_answer=12, base_steps=2000, meta_steps=400,
        evaluate_every=80, test_streams=60,
    ),
    "smoke": Config(
        seeds=2, documents=(60, 40, 16, 16), vocab=320, length=32, question_length=32, width=16,
        layers=1, base_steps=20, base_batch=4, stream=2, meta_steps=8, evaluate_every=4,
        rates=(0.1, 0.5), validation_streams=3, test_streams=4,
    ),
}  # fmt: skip


class Seed(NamedTuple):
    """What one seed leaves.

    Attributes:
        seed: its number.
        scores: ``{method: {metric: [streams]}}``.
        rates: the rate that each method chose.
        kinds: mean weight by kind of token, of each method with weights.
        alignment: by kind, the mean slope of the outer loss in a token's weight, where all weigh
            the same.
        runs: the trainings.
    """

    seed: int
    scores: dict[str, dict[str, list[float]]]
    rates: dict[str, float]
    kinds: dict[str, dict[str, float]]
    alignment: dict[str, float]
    runs: dict[str, Trained]


def model_of(config: Config) -> transformer.TransformerConfig:
    """The decoder."""
    longest = max(config.length, config.question_length)
    return transformer.TransformerConfig(
        vocab=config.vocab, width=config.width, layers=config.layers, heads=4, max_len=longest
    )


def train_base(config: Config, data: reading.Data) -> Trained:
    """A language model of documents and of questions with their answers, the same for all seeds."""
    seed = config.first_seed
    model = model_of(config)

    def loss(params: PyTree, batch: PyTree, key: Key) -> tuple[Array, PyTree]:
        return transformer.next_token_loss(model, params, batch["tokens"], batch["mask"])

    # The gradient after no inner step is the gradient.
    mg = jmeta.first_order(learned_start(loss, optax.sgd(0.0)), 0)
    schedule = optax.cosine_decay_schedule(config.base_lr, config.base_steps)
    return train_method(
        "base", mg, optax.adamw(schedule, weight_decay=0.01),
        transformer.init(model, jax.random.key(seed)),
        fit.from_function(reading.base_batches(config, data.parts["base"], seed)),
        config.out / "base",
        resume=config.resume, steps=config.base_steps, keep=1,
        checkpoint_every=max(1, config.base_steps // 4), log_every=max(1, config.base_steps // 10),
    )  # fmt: skip


def problem_at(config: Config, base: PyTree, kind: str, rate: float | Array) -> Problem:
    """The problem of a kind of weights, at an inner rate."""
    model = model_of(config)

    def scores(params: PyTree, batch: PyTree, key: Key) -> Array:
        return transformer.logits(model, params, batch["tokens"])

    def learned(meta: PyTree, batch: PyTree, key: Key) -> Array:
        states = transformer.hidden(model, meta["body"], batch["tokens"])
        return weight_head(meta["head"], states, batch["mask"])

    weigh = {LEARNED: learned, UNIFORM: uniform}.get(kind, given)
    return token_weights(scores, weigh, base, optax.sgd(rate), locality=config.locality)


def first_weights(config: Config, base: PyTree, seed: int) -> PyTree:
    """The model of the weights before it has learned: the base's body, and a head of zeros."""
    key = jax.random.fold_in(jax.random.key(seed), 1)
    return {"body": base, "head": init_weight_head(config.width, key)}


Read = Callable[[PyTree, PyTree, Any, Episode], dict[str, Array]]


def make_read(config: Config, kind: str) -> Read:
    """``(meta, base, rate, episode) -> {LOSS, MOVED, "said": tokens}`` after one stream."""
    model = model_of(config)

    def answered(params: PyTree, asked: PyTree) -> Array:
        """Greedy answers ``[stream, longest_answer]``."""
        prompts = (asked["mask"] - asked["answers"]).sum(-1).astype(jnp.int32)
        rows = jnp.where(asked["answers"] + (1 - asked["mask"]) > 0, 0, asked["tokens"])
        at = jnp.arange(rows.shape[0])

        def step(rows: Array, i: Array) -> tuple[Array, Array]:
            last = prompts + i - 1
            states = transformer.hidden(model, params, rows)[at, last]
            said = (states @ params["embed"]["tokens"].T).argmax(-1).astype(rows.dtype)
            return rows.at[at, last + 1].set(said, mode="drop"), said

        _, said = jax.lax.scan(step, rows, jnp.arange(config.longest_answer, dtype=jnp.int32))
        return said.T

    @jax.jit
    def read(meta: PyTree, base: PyTree, rate: Array, episode: Episode) -> dict[str, Array]:
        problem = problem_at(config, base, kind, rate)
        steps = 0 if kind == NONE else config.stream
        params = adapt(problem, meta, episode.support, steps) if steps else base
        _, aux = problem.outer_loss(params, meta, episode.query, None)
        said = answered(params, episode.query["questions"])
        return {LOSS: aux["answers"], MOVED: aux["divergence"], "said": said}

    return read


def score(
    config: Config, data: reading.Data, read: Read, kind: str, meta: PyTree, base: PyTree,
    rate: float, part: str, count: int, seed: int,
) -> dict[str, list[float]]:  # fmt: skip
    """Scores ``[streams]`` of a method at a rate."""
    found: dict[str, list[float]] = {name: [] for name in (LOSS, MOVED, EXACT, F1)}
    golds = data.parts[part].golds
    for rows, kept in zip(*reading.streams(config, data, part, count, seed), strict=True):
        rule = kind if kind in reading.RULES else None
        episode = reading.episode(data, part, rows, kept, rule)
        each = read(meta, base, jnp.float32(rate), episode)
        found[LOSS].append(float(each[LOSS]))
        found[MOVED].append(float(each[MOVED]))
        answers = [decoded(data, ids) for ids in np.asarray(each["said"])]
        for metric, measure in ((EXACT, exact_match), (F1, token_f1)):
            best = [
                max(measure(said, gold) for gold in golds[row])
                for said, row in zip(answers, rows, strict=True)
            ]
            found[metric].append(100 * float(np.mean(best)))
    return found


def decoded(data: reading.Data, ids: np.ndarray) -> str:
    """What was said before the separator."""
    stop = np.flatnonzero(ids == SEP)
    kept = ids[: stop[0]] if len(stop) else ids
    return data.words.tokenizer.decode(kept.tolist(), skip_special_tokens=True).strip()


def weights_by_kind(config: Config, data: reading.Data, learned: PyTree) -> dict[str, dict]:
    """What tokens of each kind weigh on test documents, where a document's mean is 1."""
    part = data.parts["test"]
    problem = problem_at(config, {}, LEARNED, 0.0)
    batch = reading.text(part.documents)
    mine = np.asarray(problem.encode(learned, batch, None)["weights"])
    found = {}
    for name, weights in ((LEARNED, mine), *part.rules.items()):
        real = part.kinds > 0
        mean = np.where(real, weights, 0).sum(1, keepdims=True) / real.sum(1, keepdims=True)
        relative = weights / np.where(mean == 0, 1, mean)
        found[name] = {
            label: float(relative[part.kinds == kind].mean())
            for kind, label in reading.KINDS.items()
        }
    return found


def alignment(config: Config, data: reading.Data, base: PyTree, seed: int) -> dict[str, float]:
    """By kind of token, the mean slope of the outer loss in its weight, where learning begins."""
    problem = problem_at(config, base, UNIFORM, config.inner_lr * FIRST_WEIGHT)
    slopes = jax.jit(lambda episode: weight_slopes(problem, config.stream, (), episode))
    found: dict[str, list[np.ndarray]] = {label: [] for label in reading.KINDS.values()}
    part, count = data.parts["validation"], min(config.validation_streams, 10)
    for rows, kept in zip(*reading.streams(config, data, "validation", count, seed), strict=True):
        each = np.asarray(slopes(reading.episode(data, "validation", rows, kept)))[:, 0]
        for kind, label in reading.KINDS.items():
            found[label].append(each[part.kinds[rows] == kind])
    return {label: float(np.concatenate(values).mean()) for label, values in found.items()}


def run_seed(
    config: Config, data: reading.Data, readers: dict[str, Read], base: PyTree, seed: int
) -> Seed:
    """Learn weights, choose rates, and score all methods."""
    runs: dict[str, Trained] = {}

    def validation(kind: str, meta: PyTree, rate: float) -> float:
        count = config.validation_streams
        found = score(
            config, data, readers[kind], kind, meta, base, rate, "validation", count, seed
        )
        return float(np.mean(found[LOSS]) + config.locality * np.mean(found[MOVED]))

    mg: MetaGradient = jmeta.mixed_mode(
        problem_at(config, base, LEARNED, config.inner_lr), config.stream
    )
    schedule = optax.cosine_decay_schedule(config.meta_lr, config.meta_steps)
    runs[LEARNED] = train_method(
        f"{LEARNED}, seed {seed}", mg, optax.chain(optax.clip_by_global_norm(1.0),
                                                   optax.adam(schedule)),
        first_weights(config, base, seed),
        fit.from_function(reading.meta_batches(config, data, seed)),
        config.out / f"{LEARNED}-{seed}",
        resume=config.resume, steps=config.meta_steps, keep=1, best="min:loss",
        evaluate=lambda meta: {"loss": validation(LEARNED, meta, config.inner_lr)},
        evaluate_every=config.evaluate_every, checkpoint_every=config.evaluate_every,
        log_every=config.evaluate_every,
    )  # fmt: skip
    kept = config.out / f"scored-{seed}.json"
    if config.resume and kept.exists():  # a seed that is complete is only read
        scores, rates, by_kind, slopes = json.loads(kept.read_text(encoding="utf-8"))
        return Seed(seed, scores, rates, by_kind, slopes, runs)
    scores, rates = {}, {}
    for kind, read in readers.items():
        meta = runs[LEARNED].meta if kind == LEARNED else ()
        tried = (0.0,) if kind == NONE else config.rates
        losses = [validation(kind, meta, rate) for rate in tried]
        # A rate that diverges gives NaN, which nothing may prefer.
        rates[kind] = tried[int(np.nan_to_num(losses, nan=np.inf).argmin())]
        scores[kind] = score(
            config, data, read, kind, meta, base, rates[kind], "test", config.test_streams, seed
        )
    by_kind = weights_by_kind(config, data, runs[LEARNED].meta)
    found = (scores, rates, by_kind, alignment(config, data, base, seed))
    distributed.write(kept, json.dumps(found))
    return Seed(seed, *found, runs)


def rows_of(config: Config, each: Seed) -> list[dict[str, Any]]:
    """Result rows of one seed."""
    rows: list[dict[str, Any]] = []

    def add(method: str, metric: str, values: Any, **settings: Any) -> None:
        values = np.asarray(values, float).reshape(-1)
        row = {"method": method, "seed": each.seed, "metric": metric, "value": values.mean()}
        if config.seeds == 1 and len(values) > 1:
            row["values"] = values.tolist()
        rows.append(row | settings | {"source": config.source})

    for metric in (LOSS, F1, EXACT, MOVED):
        for method, found in each.scores.items():
            add(method, metric, found[metric])
    for method, kinds in each.kinds.items():
        for label, weight in kinds.items():
            add(method, KIND, weight, tokens=label)
    for label, slope in each.alignment.items():
        add(UNIFORM, "slope of the outer loss in a token's weight", slope, tokens=label)
    for method, rate in each.rates.items():
        if method != NONE:
            add(method, "rate at test", rate)
    for name, run in each.runs.items():
        add(name, "training CPU seconds", run.cpu_seconds)
    return rows


def verdict(summary: Sequence[dict[str, Any]]) -> str:
    """Whether learned weights help, in a plain sentence."""
    row = next(r for r in summary if r["method"] == LEARNED and r["metric"] == LOSS)
    gap, half = row["paired_difference"], row["paired_ci95"]
    word = "are not told apart from uniform ones"
    if half is not None and abs(gap) > half:
        word = "beat uniform ones" if gap < 0 else "are worse than uniform ones"
    number = report.format_interval(gap, half, sign=True)
    return (
        f"Learned weights {word}: the loss of the answers changes by {number} nats per token, "
        f"paired over {row['n']} {row['over']}."
    )


def run(config: Config) -> None:
    """Train, score, and write the run directory."""
    record(config, "seeds")  # more of them may come later
    data = reading.load(config)
    by_rule = make_read(config, reading.RULES[0])  # one program for all rules
    readers = {kind: make_read(config, kind) for kind in (NONE, UNIFORM, LEARNED)}
    readers |= dict.fromkeys(reading.RULES, by_rule)
    base = train_base(config, data)
    seeds = [run_seed(config, data, readers, base.meta, seed) for seed in config.seed_list]
    if not distributed.is_writer():
        return
    histories = {"base": base.history} | {
        f"{LEARNED}, seed {each.seed}": each.runs[LEARNED].history for each in seeds
    }
    write_metrics(config.out, histories)
    seeds[0].runs["base"] = base
    rows = [row for each in seeds for row in rows_of(config, each)]
    compared = [row for row in rows if row["metric"] in (LOSS, F1, EXACT, MOVED)]
    rest = [row for row in rows if row["metric"] not in (LOSS, F1, EXACT, MOVED)]
    summary = summarise(compared, baseline=UNIFORM) + summarise(rest)
    report.write_results(config.out, rows, summary)
    report.print_table(summary)
    print(verdict(summary))
    curve = {}
    names = ["loss"]
    for each in seeds:
        curve[f"seed {each.seed}"] = learning_curve(each.runs[LEARNED].history, names, mean_ci)
    made = [
        (
            "Loss of the answers minus that with uniform weights, with 95 % intervals; filled "
            "where the interval excludes zero.",
            figures.forest(config.out / "differences", compared_only(summary), LOSS),
        ),
        (
            f"Validation loss of the questions while weights are learned, at rate "
            f"{config.inner_lr}.",
            figures.learning_curves(
                config.out / "learning", curve, ylabel="validation loss, divergence included"
            ),
        ),
    ]
    report.write_report(
        config.out, f"CaMeLS: which tokens to learn from, {config.source}", _INTRO, config,
        summary, made, [verdict(summary), *_notes(config)],
    )  # fmt: skip
    print(f"report: {config.out / 'report.html'}")


def compared_only(summary: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the figure of differences shows: not the reference that knows the answers."""
    return [row for row in summary if row["metric"] == LOSS and row["method"] != reading.RULES[-1]]


_INTRO = """A language model reads documents by gradient descent, one step on each, and is then
asked about them without seeing them. Which tokens should the gradient listen to? CaMeLS learns a
weight for each, by differentiating the loss of the answers through the steps.

The base is a small decoder trained here on other documents and on other questions with their
answers. All methods read the same streams of documents from the same base with SGD; only the
weights of tokens differ, and the rate, which every method chooses for itself."""


def _notes(config: Config) -> list[str]:
    over = "seeds" if config.seeds > 1 else "streams of the one seed"
    notes = [
        f"Intervals are 95 % t-intervals over {over}. A seed learns its own weights and reads its "
        "own streams; the base is the same for all, so that the intervals do not cover its "
        f"training. The rate at test is chosen of {list(config.rates)} for every method on "
        "validation documents.",
        f"'{reading.RULES[-1]}' weighs the tokens of the answer in the document and no others. No "
        "method can know them: it says what the best of weights could do.",
        "Salient spans are runs of capitalised words and words that begin with a digit, found by "
        "rule and not by an entity recogniser.",
        "A model of this size answers few questions word for word: the loss of the answers is what "
        "tells the methods apart, and exact match is there to keep it honest.",
    ]
    if config.source == "facts":
        notes.insert(0, "The documents are made up: the numbers show how the method works.")
    return notes


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    command_line(PRESETS, run, argv)


if __name__ == "__main__":
    main()
