"""Few-shot text classification on unseen classes: exact MAML beside twelve other ways (make demo).

A network is trained jointly on half of the training classes; its body is then frozen, and every
method goes on from there on the other half. All are scored on the same episodes of test classes.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jmeta
from experiments import _fewshot_model as model
from experiments import _fewshot_report as page
from experiments import _fewshot_scoring as scoring
from experiments._shared import (
    Trained,
    command_line,
    record,
    require_positive,
    require_same_settings,
    train_method,
    write_metrics,
)
from jmeta.core.types import Episode, MetaGradient, PyTree
from jmeta.data.loader import episode_loader
from jmeta.data.sources import DataUnavailable
from jmeta.methods.maml import plain_gradient
from jmeta.runtime import config as configuration
from jmeta.runtime import distributed
from jmeta.tasks.corpora import SPLITS, stdlib_passages
from jmeta.tasks.episodes import FewShot, at_least, episodes, split_classes
from jmeta.tasks.labelled_text import KNOWN, labelled_text

STDLIB = "stdlib"
META = ("maml", "fomaml", "reptile", "anil")


@dataclasses.dataclass(frozen=True)
class Config(configuration.RunConfig):
    """Few-shot text classification on unseen classes, with exact MAML and its alternatives."""

    source: str = STDLIB
    """stdlib (passages of Python's standard library), clinc150, banking77, huffpost, hwu64, a file
    of texts and labels, or a name on the Hugging Face hub."""
    text_column: str = "text"
    """The column of texts, of a source that is a file or on the hub."""
    label_column: str = "label"
    """The column of labels there."""
    source_config: str | None = None
    """The configuration there."""
    ways: int = 5
    """Classes per episode."""
    shots: int = 5
    """Support passages per class."""
    queries: int = 10
    """Query passages per class in training."""
    test_queries: int = 15
    """Query passages per class in validation and test."""
    vocab: int = 2048
    """Size of the byte-level BPE vocabulary."""
    length: int = 64
    """Tokens per passage."""
    width: int = 128
    """Width of the token embedding and of the adapter."""
    dropout: float = 0.3
    """Share of the tokens dropped in joint training."""
    top_dropout: float = 0.5
    """Share of the encoded features dropped while a method trains the top."""
    joint_steps: int = 800
    """Steps of joint training that every method starts from."""
    joint_batch: int = 100
    """Passages per step of joint training, and of transfer."""
    joint_lr: float = 1e-3
    """AdamW's rate at the start of a cosine decay, in joint training and transfer."""
    meta_steps: int = 200
    """Meta-steps of each method; transfer takes as many gradient evaluations as exact MAML."""
    meta_batch: int = 8
    """Episodes per meta-step."""
    inner_steps: int = 3
    """Inner steps in meta-training; their number at test is chosen on validation classes."""
    outer_lr: float = 1e-3
    """Adam's rate at the start of a cosine decay, of maml, fomaml and anil."""
    reptile_lr: float = 1e-3
    """Reptile's step towards the adapted weights, at the start of a cosine decay. Of 0.1, 0.01 and
    0.001 the demo's validation classes prefer the last (0.803, 0.822 and 0.826)."""
    evaluations: int = 4
    """How often validation looks at a method while it trains; the best look is kept."""
    validation_episodes: int = 100
    """Episodes of validation classes, for every choice."""
    test_episodes: int = 500
    """Episodes of test classes, for the numbers reported."""
    cost_repeats: int = 5
    """Timed runs of each estimator in the cost table."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "evaluations")
        columns = (self.text_column, self.label_column, self.source_config)
        if self.source in (STDLIB, *KNOWN) and columns != ("text", "label", None):
            raise ValueError(
                f"text_column, label_column and source_config are of a file or a name on the hub; "
                f"those of {self.source} are known: leave them out"
            )
        if gradient_evaluations(self, "maml") % self.joint_batch:
            raise ValueError(
                f"transfer cannot take exactly {gradient_evaluations(self, 'maml')} gradient "
                f"evaluations in batches of {self.joint_batch}: change joint_batch or meta_batch"
            )


def gradient_evaluations(config: Config, method: str) -> int:
    """Gradient evaluations of a method's training after the joint start.

    One is a forward and a backward pass of the top of the network over one passage. An inner step
    takes one for each support passage, and its exact derivative, a Jacobian-vector product of the
    gradient, counts as two more. The query takes one each. Reptile has no query and learns from
    all passages of an episode. Inner steps of ANIL count like the others although they are cheaper.
    """
    support, query = config.ways * config.shots, config.ways * config.queries
    inner = config.inner_steps * support
    each = {
        "maml": 3 * inner + query,
        "anil": 3 * inner + query,
        "fomaml": inner + query,
        "reptile": config.inner_steps * (support + query),
    }
    each["transfer"] = each["maml"]
    return each.get(method, 0) * config.meta_batch * config.meta_steps


PRESETS = {
    "demo": Config(),
    "full": Config(seeds=5, meta_steps=2000, joint_steps=2000, test_episodes=1000),
    "smoke": Config(
        ways=3, shots=2, queries=3, test_queries=4, width=8, joint_steps=4, joint_batch=12,
        meta_steps=4, meta_batch=2, inner_steps=2, evaluations=2, validation_episodes=4,
        test_episodes=6, cost_repeats=1, vocab=512, length=32,
    ),
}  # fmt: skip


def load(config: Config) -> dict[str, FewShot]:
    """The sources by split, without classes that are too small for an episode."""
    least = config.shots + max(config.queries, config.test_queries)
    if config.source == STDLIB:
        found = stdlib_passages(length=config.length, vocab=config.vocab, min_passages=least)
    else:
        found = labelled_text(
            config.source, text_column=config.text_column, label_column=config.label_column,
            config=config.source_config, length=config.length, vocab=config.vocab,
        )  # fmt: skip
    return {split: at_least(found[split], least) for split in SPLITS}


def joint(dropout: float, *, whole: bool) -> MetaGradient:
    """What a joint classifier follows."""
    return plain_gradient(model.whole_loss(dropout) if whole else model.top_loss(dropout))


def estimator(config: Config, method: str, rates: dict[str, float]) -> MetaGradient:
    """The meta-gradient of one method."""
    full = model.full_problem(rates["full"], config.top_dropout)
    head = model.head_problem(rates["head"], config.top_dropout)
    steps = config.inner_steps
    found = {
        "maml": lambda: jmeta.mixed_mode(full, steps),
        "fomaml": lambda: jmeta.first_order(full, steps),
        "reptile": lambda: jmeta.reptile(full, steps),
        "anil": lambda: jmeta.mixed_mode(head, steps),
    }
    return jmeta.over_tasks(found[method](), microbatch=1)


def few_way(config: Config, params: PyTree) -> PyTree:
    """Adapter and a fresh head for an episode, from parameters with any head."""
    kernel = params["head"]["kernel"]
    return {
        "adapter": params["adapter"],
        "head": model.zero_head(kernel.shape[0], config.ways),
    }


def train(
    config: Config, name: str, seed: int, mg: MetaGradient, outer: Any, meta: PyTree, sample: Any,
    *, steps: int, validate: Any = None,
) -> Trained:  # fmt: skip
    """Train one phase in a folder of its own; the best look of validation, if there is one."""
    loader = episode_loader(sample, seed=seed, threads=1)
    looks = max(1, steps // config.evaluations)
    judged = {"evaluate": validate, "evaluate_every": looks, "best": "max:accuracy"}
    try:
        return train_method(
            f"{name}, seed {seed}", mg, outer, meta, loader, config.out / f"{name}-{seed}",
            resume=config.resume, steps=steps, key=seed, keep=1, checkpoint_every=looks,
            log_every=max(1, steps // 20), **(judged if validate else {}),
        )  # fmt: skip
    finally:
        loader.close()


def joint_start(
    config: Config, seed: int, tokens: dict[str, FewShot], clock: scoring.Clock
) -> tuple[PyTree, PyTree, scoring.Data]:
    """Random parameters, those after joint training, and the data that went through the body."""
    seen, unseen = split_classes(tokens["train"], (0.5, 0.5), seed=seed)
    counts = seen._replace(x=model.bags(seen.x, config.vocab))
    fresh = model.init(jax.random.key(seed), config.vocab, config.width, len(seen.names))
    weights = jnp.log(jnp.asarray(model.inverse_document_frequency(counts.x)))
    begin = {**fresh, "body": {**fresh["body"], "gate": weights}}
    schedule = optax.cosine_decay_schedule(config.joint_lr, config.joint_steps)
    with clock("joint training"):
        trained = train(
            config, "joint", seed, joint(config.dropout, whole=True),
            optax.adamw(schedule, weight_decay=1e-2), begin,
            model.batches(counts, config.joint_batch), steps=config.joint_steps,
        )  # fmt: skip
    with clock("encoding all passages once"):
        body = trained.meta["body"]
        sources = {"train": unseen, "validation": tokens["validation"], "test": tokens["test"]}
        encoded = {k: model.encode_source(body, v, config.vocab) for k, v in sources.items()}
    return fresh, trained.meta, scoring.Data(tokens, encoded)


def as_reptile(sample: Any) -> Any:
    """Episodes without a query: Reptile's inner loop learns from all of it."""

    def joined(seed: int, step: int) -> Episode:
        both = sample(seed, step)
        return Episode(jax.tree.map(lambda *x: np.concatenate(x, 1), both.support, both.query))

    return joined


def run_seed(
    config: Config, seed: int, tokens: dict[str, FewShot], clock: scoring.Clock
) -> page.Seed:
    """Train and score every method of one seed."""
    fresh, start, data = joint_start(config, seed, tokens, clock)
    size = {"ways": config.ways, "shots": config.shots}
    tests = {**size, "queries": config.test_queries}
    held_out = episodes(data.encoded["validation"], tasks=config.validation_episodes, **tests)
    held_out = held_out(scoring.VALIDATION, 0)
    curves = scoring.make_curves()
    meta = few_way(config, start)

    with clock("search of the inner rate"):
        grids = {kind: scoring.search(curves[kind], meta, held_out) for kind in curves}
        # In training, a rate is used for inner_steps; the nearest number on the grid stands for it.
        at = int(np.argmin(np.abs(np.array(page.STEPS) - config.inner_steps)))
        rates = {kind: scoring.RATES[int(grid[:, at].argmax())] for kind, grid in grids.items()}

    def validator(kind: str, prepare: Any = lambda params: params) -> Any:
        def look(params: PyTree) -> dict[str, float]:
            found = curves[kind](prepare(params), rates[kind], held_out)
            return {"accuracy": float(found[:, at].mean())}

        return look

    sample = episodes(
        data.encoded["train"], queries=config.queries, tasks=config.meta_batch, **size
    )
    runs: dict[str, Trained] = {}
    for method in META:
        lr = config.reptile_lr if method == "reptile" else config.outer_lr
        schedule = optax.cosine_decay_schedule(lr, config.meta_steps)
        outer = optax.sgd(schedule) if method == "reptile" else optax.adam(schedule)
        with clock(method):
            runs[method] = train(
                config, method, seed, estimator(config, method, rates),
                optax.chain(optax.clip_by_global_norm(10.0), outer), meta,
                as_reptile(sample) if method == "reptile" else sample,
                steps=config.meta_steps, validate=validator("head" if method == "anil" else "full"),
            )  # fmt: skip
    with clock("transfer"):
        runs["transfer"] = transfer(
            config, seed, start, data, validator("full", lambda params: few_way(config, params))
        )

    starts = {name: each.meta for name, each in runs.items()}
    starts["transfer"] = few_way(config, starts["transfer"])
    starts |= {"joint start": meta, "no meta-training": few_way(config, fresh)}
    plain = {
        split: model.encode_source(fresh["body"], tokens[split], config.vocab)
        for split in ("validation", "test")
    }  # through a random body
    with clock("scoring"):
        scored = {}
        for name, params in starts.items():
            sources = plain if name == "no meta-training" else data.encoded
            kind = "head" if name == "anil" else "full"
            # The meta-learned are used as they were trained: at their rate.
            allowed = (rates[kind],) if name in META else scoring.RATES
            scored[name] = scoring.score(config, curves[kind], params, sources, tests, allowed)
    with clock("baselines"):
        adapter = starts["transfer"]["adapter"]
        scored |= scoring.score_baselines(config, adapter, data, tests)
    return page.Seed(seed, scored, runs, grids, rates, meta, sample(seed, 0))


def transfer(
    config: Config, seed: int, start: PyTree, data: scoring.Data, validate: Any
) -> Trained:
    """Go on with joint training on the classes that the meta-learners learn from."""
    source = data.encoded["train"]
    steps = gradient_evaluations(config, "transfer") // config.joint_batch
    kernel = start["head"]["kernel"]
    params = {
        "adapter": start["adapter"],
        "head": model.zero_head(kernel.shape[0], len(source.names)),
    }
    schedule = optax.cosine_decay_schedule(config.joint_lr, steps)
    return train(
        config, "transfer", seed, joint(config.top_dropout, whole=False),
        optax.adamw(schedule, weight_decay=1e-2), params,
        model.batches(source, config.joint_batch), steps=steps, validate=validate,
    )  # fmt: skip


def costs(config: Config, seed: page.Seed) -> list[Any]:
    """Time, memory and compile time of the estimators on this very problem."""
    problem, steps = model.full_problem(seed.rates["full"]), config.inner_steps
    chosen = {
        "first_order": jmeta.first_order(problem, steps),
        "mixed_mode": jmeta.mixed_mode(problem, steps),
        "unrolled": jmeta.unrolled(problem, steps),
        "reptile": jmeta.reptile(problem, steps),
    }
    many = {name: jmeta.over_tasks(mg) for name, mg in chosen.items()}
    episode = jax.tree.map(jnp.asarray, seed.episode)
    return jmeta.cost.table(
        problem, steps, seed.meta, episode, chosen=many, repeats=config.cost_repeats
    )


def run(config: Config) -> None:
    """Train, score, and write the run directory."""
    free = ("seeds", "first_seed")
    require_same_settings(config, *free)
    complete = page.finished(config) if config.resume and distributed.is_writer() else None
    if distributed.first_says(complete is not None):
        if complete is not None:
            page.show(config.out, **complete)
        return  # what says how the numbers were made stays as it is, too
    record(config, *free)
    clock, begun = scoring.Clock(), (time.perf_counter(), time.process_time())
    with clock("text and tokeniser"):
        try:
            tokens = load(config)
        except (DataUnavailable, ValueError) as error:
            sys.exit(str(error))
    seeds = [run_seed(config, seed, tokens, clock) for seed in config.seed_list]
    if not distributed.is_writer():
        return  # the first tells what all have done
    write_metrics(
        config.out,
        {f"{name}, seed {s.seed}": each.history for s in seeds for name, each in s.runs.items()},
    )
    with clock("cost table"):
        cost = costs(config, seeds[0])
    counts = {m: gradient_evaluations(config, m) for m in (*META, "transfer")}
    total = time.perf_counter() - begun[0], time.process_time() - begun[1]
    page.write(config, seeds, cost, counts, clock.spent, total)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    command_line(PRESETS, run, argv)


if __name__ == "__main__":
    main()
