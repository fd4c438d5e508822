"""TSSA: a code model takes a few steps on the file at hand before it fills a hole in it.

Against dynamic evaluation, attention over the same tokens, and no adaptation, on the sources of the
Python standard library.
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
from experiments._shared import (
    Trained,
    command_line,
    learning_curve,
    record,
    train_method,
    write_metrics,
)
from jmeta import methods
from jmeta.core.types import Array, Episode, Key, MetaGradient, PyTree
from jmeta.methods.dynamic_evaluation import plain
from jmeta.models import transformer
from jmeta.runtime import config as configuration
from jmeta.runtime import distributed, figures, fit, report
from jmeta.runtime.evaluate import adapt
from jmeta.runtime.statistics import mean_ci, summarise
from jmeta.tasks import corpora, files
from jmeta.tasks.bpe import SEP

NONE, EXACT, FIRST = "no adaptation", "tssa, exact", "tssa, first order"
JOINT = "trained on holes, no adaptation"
TUNED = "steps on the support, not meta-trained"
LOSS = "loss of the hole, nats per token"
MAIN = "shared"  # what is trained with, and what the verdicts and the figure are of
SUPPORTS: dict[str, tuple[Any, Any]] = {
    "rare": ("rare", "both"),
    "shared": ("shared", "both"),
    "uniform": ("uniform", "both"),
    "shared, before the hole": ("shared", "before"),
}
"""How support windows are chosen at test, and on which side of the hole they lie."""
# Seeds of the holes; training takes the run's own, which are small.
VALIDATION, TEST = 10**6, 10**6 + 1


@dataclasses.dataclass(frozen=True)
class Config(configuration.RunConfig):
    """Holes in files of the standard library, and what adapting to the file is worth."""

    vocab: int = 512
    """Size of the byte-level BPE."""
    window: int = 32
    """Tokens of a support window, and of a hole with its context."""
    support: int = 3
    """Support windows, one inner step on each."""
    hole: int = 8
    """Tokens of a hole; each is predicted given the ones before it."""
    before: int = 8
    """Windows before a hole's own that dynamic evaluation may read, at most."""
    width: int = 32
    """Width of the decoder."""
    layers: int = 2
    """Layers of the decoder."""
    base_steps: int = 800
    """Steps of the base model's training, on rows as long as support and context together."""
    base_batch: int = 8
    """Rows in each of them."""
    base_lr: float = 2e-3
    """AdamW's rate there, at the start of a cosine decay."""
    meta_steps: int = 80
    """Meta-steps of each method that is meta-trained, from the base."""
    meta_batch: int = 8
    """Holes in each of them."""
    meta_lr: float = 3e-4
    """Adam's rate there, at the start of a cosine decay."""
    inner_lr: float = 0.05
    """Rate of the inner SGD in meta-training."""
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    """Rates at test to choose from, for every method by itself, on validation files."""
    decay: float = 0.0
    """How far dynamic evaluation goes back to its start at every step."""
    evaluate_every: int = 40
    """Meta-steps between looks at validation holes; the best is kept."""
    validation_holes: int = 64
    """Holes for the choices."""
    test_holes: int = 300
    """Holes of the final numbers, the same for all methods."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("support", "hole", "before", "base_batch", "meta_batch", "inner_lr",
                     "evaluate_every", "validation_holes", "test_holes"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: choose more than 0")
        if not self.rates or min(self.rates) <= 0:
            raise ValueError(f"rates={self.rates}: at least one to choose from, each above 0")
        if not self.hole < self.window:
            raise ValueError(
                f"hole={self.hole} leaves no context in a window of window={self.window}"
            )


PRESETS = {
    "demo": Config(seeds=3),
    "full": Config(
        seeds=5, vocab=1024, window=64, width=128, layers=4, base_steps=8000, meta_steps=600,
        evaluate_every=60, test_holes=1000,
    ),
    "smoke": Config(
        seeds=2, vocab=320, window=16, support=2, hole=2, before=3, width=16, layers=1,
        base_steps=10, base_batch=2, meta_steps=4, meta_batch=2, evaluate_every=2,
        rates=(0.1, 0.3), validation_holes=4, test_holes=6,
    ),
}  # fmt: skip


class Seed(NamedTuple):
    """What one seed leaves.

    Attributes:
        seed: its number.
        scores: ``{method: {support: [holes]}}``; the support is "" where none is read.
        rates: the rate that each method chose.
        runs: the trainings.
    """

    seed: int
    scores: dict[str, dict[str, list[float]]]
    rates: dict[str, float]
    runs: dict[str, Trained]


def model_of(config: Config) -> transformer.TransformerConfig:
    """The decoder; it has room for the support in front of the context."""
    return transformer.TransformerConfig(
        vocab=config.vocab, width=config.width, layers=config.layers, heads=4,
        max_len=(config.support + 1) * config.window,
    )  # fmt: skip


def make_loss(config: Config) -> Callable[[PyTree, PyTree, Key], tuple[Array, PyTree]]:
    """The language model's loss of tokens by their weights."""
    model = model_of(config)

    def loss(params: PyTree, batch: PyTree, key: Key) -> tuple[Array, PyTree]:
        return transformer.next_token_loss(model, params, batch["tokens"], batch["weights"])

    return loss


def load(config: Config) -> dict[str, files.Files]:
    """The files of each split; no file is in two of them, and rarity is that of training."""
    found: dict[str, files.Files] = {}
    for split, stream in corpora.stdlib_text(vocab=config.vocab).items():
        texts = [text for text in np.split(stream, np.flatnonzero(stream == SEP) + 1) if len(text)]
        rarity = found["train"].rarity if found else None
        found[split] = files.files(texts, config.vocab, rarity)
    return found


def holes(config: Config, source: files.Files, kind: str, tasks: int, long: bool) -> Any:
    """A sampler of holes with one kind of support; ``long``: with much of what comes before."""
    choose, side = SUPPORTS[kind]
    return files.holes(
        source, window=config.window, count=config.support, tasks=tasks, size=config.hole,
        choose=choose, side=side,
        long_context=(1 + config.before) * config.window if long else None,
    )  # fmt: skip


def train_base(config: Config, source: files.Files) -> Trained:
    """A language model of rows of code, the same for all seeds."""
    seed = config.first_seed
    length = model_of(config).max_len

    def batch(step: int) -> Episode:
        rng = np.random.default_rng([seed, 3, step])
        starts = rng.integers(0, len(source.tokens) - length, config.base_batch)
        rows = source.tokens[starts[:, None] + np.arange(length)]
        return Episode(None, {"tokens": rows, "weights": np.ones(rows.shape, np.float32)})

    # The gradient after no inner step is the gradient.
    mg = jmeta.first_order(methods.learned_start(make_loss(config), optax.sgd(0.0)), 0)
    schedule = optax.cosine_decay_schedule(config.base_lr, config.base_steps)
    return train_method(
        "base", mg, optax.adamw(schedule, weight_decay=0.01),
        transformer.init(model_of(config), jax.random.key(seed)), fit.from_function(batch),
        config.out / "base",
        resume=config.resume, steps=config.base_steps, keep=1,
        checkpoint_every=max(1, config.base_steps // 4), log_every=max(1, config.base_steps // 10),
    )  # fmt: skip


def estimators(config: Config) -> dict[str, MetaGradient]:
    """What is meta-trained, for one hole."""
    loss, inner = make_loss(config), optax.sgd(config.inner_lr)
    return {
        EXACT: methods.tssa(loss, steps=config.support, optimizer=inner),
        FIRST: methods.first_order_tssa(loss, steps=config.support, optimizer=inner),
        JOINT: methods.first_order_tssa(loss, steps=0, optimizer=inner),
    }


Values = Callable[[PyTree, Any, Episode], Array]


def readers(config: Config) -> dict[str, Values]:
    """``(params, rate, episodes) -> losses [holes]`` for every way to read the rest of a file."""
    loss, window = make_loss(config), config.window
    whole = (config.support + 1) * window

    def at_hole(params: PyTree, query: PyTree) -> Array:
        return loss(params, query, None)[0]

    def longer(query: PyTree, front: Array) -> PyTree:
        tokens = jnp.concatenate([front, query["tokens"]])
        return {"tokens": tokens, "weights": jnp.pad(query["weights"], (len(front), 0))}

    def not_adapted(params: PyTree, rate: Array, episode: Episode) -> Array:
        return at_hole(params, episode.query)

    def adapted(params: PyTree, rate: Array, episode: Episode) -> Array:
        problem = methods.learned_start(loss, optax.sgd(rate))
        return at_hole(adapt(problem, params, episode.support, config.support), episode.query)

    def attention_before(params: PyTree, rate: Array, episode: Episode) -> Array:
        return at_hole(params, longer(episode.query, episode.query["before"][-whole:-window]))

    def attention_support(params: PyTree, rate: Array, episode: Episode) -> Array:
        front = episode.support.batches["tokens"].reshape(-1)
        return at_hole(params, longer(episode.query, front))

    def dynamic(segments: int) -> Values:
        def value(params: PyTree, rate: Array, episode: Episode) -> Array:
            read = episode.query["before"][-(1 + segments) * window : -window]
            rows = read.reshape(segments, window)
            found = methods.dynamic_evaluation(
                plain(lambda p, row: loss(p, row, None)),
                methods.sgd_towards_start(rate, config.decay), params,
                {"tokens": rows, "weights": jnp.ones(rows.shape)},
            )  # fmt: skip
            return at_hole(found.params, episode.query)

        return value

    def over_holes(one: Values) -> Values:
        def each(params: PyTree, rate: Array, episodes: Episode) -> Array:
            return jax.lax.map(lambda episode: one(params, rate, episode), episodes)

        return jax.jit(each)

    found = {
        NONE: not_adapted,
        TUNED: adapted,
        f"attention to the {whole - window} tokens before": attention_before,
        "attention to the support": attention_support,
        f"dynamic evaluation, {config.support} steps": dynamic(config.support),
        f"dynamic evaluation, {config.before} steps": dynamic(config.before),
    }
    return {name: over_holes(one) for name, one in found.items()}


def run_seed(
    config: Config,
    sources: dict[str, files.Files],
    ways: dict[str, Values],
    base: PyTree,
    seed: int,
) -> Seed:
    """Meta-train from the base, choose rates, and score everything."""
    runs: dict[str, Trained] = {}
    draw = holes(config, sources["validation"], MAIN, config.validation_holes, True)
    validation = draw(VALIDATION, 0)
    test = {
        kind: holes(config, sources["test"], kind, config.test_holes, True)(TEST, seed)
        for kind in SUPPORTS
    }
    sample = holes(config, sources["train"], MAIN, config.meta_batch, False)
    schedule = optax.cosine_decay_schedule(config.meta_lr, config.meta_steps)
    for name, mg in estimators(config).items():
        way = ways[NONE if name == JOINT else TUNED]

        def look(meta: PyTree, way: Values = way) -> dict[str, float]:
            return {"loss": float(way(meta, jnp.float32(config.inner_lr), validation).mean())}

        runs[name] = train_method(
            f"{name}, seed {seed}", jmeta.over_tasks(mg), optax.adam(schedule), base,
            fit.from_function(lambda step: sample(seed, step)),
            config.out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}",
            resume=config.resume, steps=config.meta_steps, keep=1, best="min:loss",
            evaluate=look, evaluate_every=config.evaluate_every,
            checkpoint_every=config.evaluate_every, log_every=config.evaluate_every,
        )  # fmt: skip
    kept = config.out / f"scored-{seed}.json"
    if config.resume and kept.exists():  # a seed that is complete is only read
        scores, rates = json.loads(kept.read_text(encoding="utf-8"))
        return Seed(seed, scores, rates, runs)
    compared = {name: (base, way) for name, way in ways.items()}
    compared[JOINT] = (runs[JOINT].meta, ways[NONE])
    for name in (EXACT, FIRST):
        compared[name] = (runs[name].meta, ways[TUNED])
        compared[f"{name}, before its steps"] = (runs[name].meta, ways[NONE])
    scores, rates = {}, {}
    for name, (params, way) in compared.items():
        if way is ways[TUNED] or name.startswith("dynamic"):
            tried = [
                float(np.asarray(way(params, jnp.float32(rate), validation)).mean())
                for rate in config.rates
            ]
            # A rate that diverges gives NaN, which nothing may prefer.
            rates[name] = config.rates[int(np.nan_to_num(tried, nan=np.inf).argmin())]
        rate = jnp.float32(rates.get(name, 0.0))
        reads_support = way is ways[TUNED] or name == "attention to the support"
        for kind in SUPPORTS if reads_support else (MAIN,):
            losses = np.asarray(way(params, rate, test[kind]), float)
            scores.setdefault(name, {})[kind if reads_support else ""] = losses.tolist()
    distributed.write(kept, json.dumps((scores, rates)))
    return Seed(seed, scores, rates, runs)


def rows_of(config: Config, each: Seed) -> list[dict[str, Any]]:
    """Result rows of one seed."""
    rows: list[dict[str, Any]] = []

    def add(method: str, metric: str, values: Any, **settings: Any) -> None:
        values = np.asarray(values, float).reshape(-1)
        row = {"method": method, "seed": each.seed, "metric": metric, "value": values.mean()}
        if config.seeds == 1 and len(values) > 1:
            row["values"] = values.tolist()
        rows.append(row | settings)

    for name, kinds in each.scores.items():
        for kind, values in kinds.items():
            add(name, LOSS, values, **({"support": kind} if kind else {}))
    for name, rate in each.rates.items():
        add(name, "rate at test", rate)
    for name, run in each.runs.items():
        add(name, "training CPU seconds", run.cpu_seconds)
    return rows


def verdicts(summary: Sequence[dict[str, Any]]) -> list[str]:
    """Whether adapting helps, in plain sentences."""
    rows = {(r["method"], r.get("support", "")): r for r in summary if r["metric"].startswith(LOSS)}
    said = []
    compared = [
        key
        for key in rows
        if key[1] in ("", MAIN)
        and key[0].startswith(("tssa", TUNED, JOINT, "dynamic", "attention"))
    ]
    for key in compared:
        gap, half = rows[key]["paired_difference"], rows[key]["paired_ci95"]
        word = "is not told apart from no adaptation"
        if half is not None and abs(gap) > half:
            word = "helps" if gap < 0 else "hurts"
        number = report.format_interval(gap, half, sign=True)
        said.append(f"{key[0]}: {word} ({number} nats per token).")
    return said


def run(config: Config) -> None:
    """Train, score, and write the run directory."""
    record(config, "seeds")  # more of them may come later
    sources, ways = load(config), readers(config)
    base = train_base(config, sources["train"])
    seeds = [run_seed(config, sources, ways, base.meta, seed) for seed in config.seed_list]
    if not distributed.is_writer():
        return
    histories = {"base": base.history} | {
        f"{name}, seed {each.seed}": run.history
        for each in seeds
        for name, run in each.runs.items()
    }
    write_metrics(config.out, histories)
    seeds[0].runs["base"] = base
    rows = [row for each in seeds for row in rows_of(config, each)]
    losses = [row for row in rows if row["metric"] == LOSS]
    rest = [row for row in rows if row["metric"] != LOSS]
    joint = [
        {**row, "metric": f"{LOSS}, against {JOINT}"} for row in losses
        if row["method"] in (EXACT, FIRST, JOINT)
    ]  # fmt: skip
    first = summarise(losses, baseline=NONE)
    summary = first + summarise(joint, baseline=JOINT) + summarise(rest)
    report.write_results(config.out, rows, summary)
    report.print_table(summary)
    said = verdicts(first)
    print("\n".join(said))
    curves = {
        name: learning_curve(each.runs[name].history, ["loss"], mean_ci)
        for each in seeds[:1] for name in (EXACT, FIRST, JOINT)
    }  # fmt: skip
    shown = [row for row in first if row.get("support", MAIN) == MAIN]
    made = [
        (
            "Loss of the hole minus that without adaptation, support by shared vocabulary, with "
            "95 % intervals; filled where the interval excludes zero.",
            figures.forest(config.out / "differences", shown, LOSS),
        ),
        (
            f"Validation loss of holes after {config.support} steps of rate {config.inner_lr} "
            "(none for training on holes), first seed.",
            figures.learning_curves(config.out / "learning", curves, ylabel="validation loss"),
        ),
    ]
    report.write_report(
        config.out, "Code models that adapt to the file at hand", _INTRO, config, summary, made,
        [*said, *_notes(config)],
    )  # fmt: skip
    print(f"report: {config.out / 'report.html'}")


_INTRO = """A hole is the next few tokens at some place of a source file. A model that may look at
the rest of the file can do so in several ways: take gradient steps on a few windows of it (TSSA,
with a start that is meta-learned for such steps), follow it by dynamic evaluation, or attend to it.

The base is a small decoder trained here on other modules of the standard library, on rows as long
as support and context together, so that attention is used as it was trained."""


def _notes(config: Config) -> list[str]:
    over = "seeds" if config.seeds > 1 else "holes of the one seed"
    return [
        f"Intervals are 95 % t-intervals over {over}. A seed meta-trains by itself and has its own "
        "holes; the base is the same for all, so that the intervals do not cover its training. "
        f"The rate at test is chosen of {list(config.rates)} for every method on validation files.",
        "Support windows overlap neither the hole nor its context. Those of dynamic evaluation and "
        "of 'shared, before the hole' lie before the hole, as when a file is read; the others may "
        "lie behind it, as when a file is edited.",
        f"'{JOINT}' continues the base's training on the same holes for as many meta-steps, "
        "without inner steps: what TSSA gains beyond it is due to adapting.",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    command_line(PRESETS, run, argv)


if __name__ == "__main__":
    main()
