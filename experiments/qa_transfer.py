"""Question answering on the way to sentiment: transfer by GPT-2 from every subset of three sources.

SQuAD, SQuAD 2.0 and DuoRC in sequence, mixed, and by Reptile, at one budget; then SST-2.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments import _qa_data as data
from experiments import _qa_model as model
from experiments import _qa_report as page
from experiments._qa_data import SOURCES
from experiments._shared import Trained, command_line, kept, record, require_positive, train_method
from jmeta.core.types import MetaGradient, PyTree
from jmeta.data.sources import DataUnavailable
from jmeta.methods import plain_gradient
from jmeta.models import gpt2
from jmeta.runtime import config as configuration
from jmeta.runtime import distributed
from jmeta.runtime.fit import from_function
from jmeta.tasks import glue
from jmeta.tasks.text import Example


@dataclasses.dataclass(frozen=True)
class Config(configuration.RunConfig):
    """Transfer from question answering to SST-2 with GPT-2, at equal budget.

    SQuAD 1.1, SQuAD 2.0, DuoRC and SST-2 are read from $JMETA_DATA, or from the Hugging Face hub.
    """

    model: str = "small"
    """small (a GPT-2 trained here from random weights), or a checkpoint: gpt2, or a folder."""
    vocab: int = 2048
    """Size of the small model's byte-level BPE vocabulary."""
    width: int = 128
    """Width of the small model."""
    layers: int = 2
    """Blocks of the small model."""
    lm_steps: int = 300
    """Steps of the small model's training as a language model, once for all seeds."""
    lm_batch: int = 16
    """Windows per step of it."""
    lm_lr: float = 2e-3
    """Its peak rate."""
    positions: int = 96
    """Tokens of a prompt and of a window of text."""
    qa_steps: int = 60
    """Batches of intermediate training, the same number for every method and subset."""
    qa_batch: int = 8
    """Prompts per batch."""
    qa_lr: float = 1e-3
    """AdamW's peak rate in intermediate training."""
    inner_steps: int = 5
    """Reptile's inner steps on each task, one batch each."""
    inner_lr: float = 1e-3
    """Adam's rate inside Reptile."""
    reptile_lr: float = 1.0
    """Reptile's step towards the mean of the adapted weights, at the start of a linear decay."""
    target_steps: int = 100
    """Steps of fine-tuning on SST-2."""
    target_batch: int = 16
    """Phrases per step."""
    target_positions: int = 48
    """Tokens of a phrase."""
    target_lr: float = 1e-3
    """AdamW's peak rate on SST-2."""
    looks: int = 5
    """How often validation sentences are scored during fine-tuning, for the learning curves."""
    validation: int = 400
    """Sentences for the learning curves."""
    test: int = 1500
    """Sentences for the numbers reported."""
    scored_questions: int = 200
    """Development questions scored of each source; fewer where there are not as many."""
    diversity: Path | None = None
    """A JSON file {subset: coefficient}, such as {"squad+duorc": 0.17}, for the figure's axis."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "looks")
        whole = 6 * self.inner_steps
        if self.qa_steps < whole or self.qa_steps % whole:
            raise ValueError(
                f"qa_steps={self.qa_steps} cannot be shared evenly by 2 and 3 sources and by "
                f"Reptile's {self.inner_steps} inner steps: make it a multiple of {whole}"
            )


PRESETS = {
    "demo": Config(),
    "small": Config(
        seeds=3, lm_steps=1500, qa_steps=90, target_steps=150, looks=3, validation=300
    ),
    "full": Config(
        seeds=5, vocab=8192, width=256, layers=4, lm_steps=20000, positions=256, qa_steps=3000,
        target_steps=1000, validation=400, test=1500, scored_questions=1000,
    ),
    "gpt2": Config(
        model="gpt2", seeds=5, positions=384, qa_steps=990, qa_lr=5e-5, inner_lr=5e-5,
        target_steps=500, target_lr=5e-5, target_positions=64,
    ),
    "smoke": Config(
        vocab=300, width=8, layers=1, lm_steps=2, lm_batch=2, positions=48, qa_steps=6, qa_batch=2,
        inner_steps=1, target_steps=2, target_batch=2, target_positions=24, looks=2, validation=4,
        test=8, scored_questions=4,
    ),
}  # fmt: skip


class Plan(NamedTuple):
    """An intermediate training.

    Attributes:
        name: of the method in every table.
        kind: ``"none"``, ``"text"``, ``"sequence"``, ``"mixture"`` or ``"Reptile"``.
        sources: in the order in which they are learned from.
    """

    name: str
    kind: str
    sources: tuple[str, ...] = ()


def plans() -> list[Plan]:
    """All subsets of the sources, in sequence, mixed and by Reptile, and two controls.

    A single source is the same in sequence and mixed, and no meta-learning: it comes once.
    """
    found = [Plan(page.NONE, "none"), Plan("more language modelling", "text")]
    for size in range(1, len(SOURCES) + 1):
        for sources in itertools.combinations(SOURCES, size):
            found.append(Plan(f"sequence: {', '.join(sources)}", "sequence", sources))
            if size > 1:
                found.append(Plan(f"mixture: {', '.join(sources)}", "mixture", sources))
                found.append(Plan(f"Reptile: {', '.join(sources)}", "Reptile", sources))
    backwards = tuple(reversed(SOURCES))
    return [*found, Plan(f"sequence: {', '.join(backwards)}", "sequence", backwards)]


class Bench(NamedTuple):
    """What all seeds share.

    Attributes:
        start: the language model everything begins with.
        sources: the question answering prompts.
        text: the texts that the training questions are about, as a stream of tokens.
        examples: rows of SST-2.
        lm: the language model's training, or None of a checkpoint.
        answers: scores answers.
        hits: scores sentences.
    """

    start: model.Start
    sources: dict[str, data.Source]
    text: np.ndarray
    examples: list[Example]
    lm: Trained | None
    answers: Any
    hits: Any


def train(
    config: Config, title: str, folder: Path, mg: MetaGradient, outer: Any, meta: PyTree,
    sample: data.Sample, steps: int, seed: int = 0, **options: Any,
) -> Trained:  # fmt: skip
    """Train one phase in a folder of its own."""
    return train_method(
        title, mg, outer, meta, from_function(sample), folder, resume=config.resume, steps=steps,
        key=seed, keep=1, checkpoint_every=100, log_every=max(1, steps // 10), **options,
    )  # fmt: skip


def small_start(config: Config, text: list[str], held: list[str]) -> tuple[model.Start, Trained]:
    """A GPT-2 with random weights, trained as a language model once and kept in the run folder."""
    code = data.library()
    words = data.small_vocabulary([*code, *text], config.vocab)
    shape = gpt2.GPT2Config(
        vocab=words.size, width=config.width, layers=config.layers,
        heads=max(1, config.width // 32), ff=4 * config.width,
        max_len=max(config.positions, config.target_positions),
        head="causal_lm", pad_id=words.pad,
    )  # fmt: skip
    streams = [data.stream(code, words), data.stream(text, words)]
    judged = data.windows_of([data.stream(held, words)], 64, config.positions, 1)(0).query
    loss = jax.jit(lambda params: gpt2.loss(shape, params, judged)[0])
    trained = train(
        config, "language model", config.out / "language-model",
        plain_gradient(model.text_loss(shape)),
        model.adamw(model.decayed(config.lm_lr, config.lm_steps)),
        gpt2.init(shape, jax.random.key(0)),
        data.windows_of(streams, config.lm_batch, config.positions, 0),
        config.lm_steps, evaluate=lambda params: {"loss": loss(params)},
        evaluate_every=max(1, config.lm_steps // 10),
    )  # fmt: skip
    return model.Start(shape, trained.meta, words), trained


def prepare(config: Config) -> Bench:
    """Data, vocabulary and the language model."""
    questions, examples = data.read_questions(), glue.read("SST-2")
    text = data.contexts(questions)
    if config.model == "small":
        held = list(dict.fromkeys(q.context for part in questions.values() for q in part["dev"]))
        start, lm = small_start(config, text, held)
    else:
        start, lm = model.pretrained(config.model), None
        longest = max(config.positions, config.target_positions)
        if longest > start.config.max_len:
            raise ValueError(
                f"{config.model} has {start.config.max_len} positions; {longest} are asked for"
            )
    sources = {
        name: data.source(
            part, start.words, positions=config.positions, most=config.scored_questions
        )
        for name, part in questions.items()
    }
    return Bench(
        start, sources, data.stream(text, start.words), examples, lm,
        model.make_answer_scores(start.config),
        model.make_class_hits(start.config._replace(head="classify", labels=2)),
    )  # fmt: skip


def intermediate(
    config: Config, bench: Bench, plan: Plan, seed: int
) -> tuple[MetaGradient, optax.GradientTransformation, data.Sample, int]:
    """The meta-gradient, outer optimizer, batches and number of outer steps of a plan.

    All see ``qa_steps * qa_batch`` rows: an inner step of Reptile on one task is a step.
    """
    loss, steps, size = model.text_loss(bench.start.config), config.qa_steps, config.qa_batch
    sources = {name: bench.sources[name] for name in plan.sources}
    once = model.adamw(model.decayed(config.qa_lr, steps))
    if plan.kind == "text":
        sample = data.windows_of([bench.text], size, config.positions, seed)
        return plain_gradient(loss), once, sample, steps
    if plan.kind == "mixture":
        return plain_gradient(loss), once, data.mixed(sources, size, seed), steps
    if plan.kind == "sequence":
        outer = model.adamw(model.restarted(config.qa_lr, steps, len(sources)))
        return plain_gradient(loss), outer, data.in_sequence(sources, size, steps, seed), steps
    steps //= len(sources) * config.inner_steps
    outer = optax.sgd(optax.linear_schedule(config.reptile_lr, 0.0, steps))
    sample = data.by_task(sources, size, config.inner_steps, seed)
    return model.reptile(loss, config.inner_steps, config.inner_lr), outer, sample, steps


def fine_tune(
    config: Config, bench: Bench, plan: Plan, seed: int, params: PyTree,
    sentences: data.Sentiment, folder: Path,
) -> Trained:  # fmt: skip
    """From a body to a classifier of SST-2; heads and batches of a seed are those of every plan."""
    shape, begin = model.classifier(bench.start, params, jax.random.key(seed))

    def look(params: PyTree) -> dict[str, float]:
        return {"accuracy": float(bench.hits(params, sentences.validation).mean())}

    return train(
        config, f"{plan.name}, then SST-2, seed {seed}", folder,
        plain_gradient(model.class_loss(shape)),
        model.adamw(model.decayed(config.target_lr, config.target_steps)), begin,
        data.phrases(sentences.train, config.target_batch), config.target_steps, seed,
        evaluate=look, evaluate_every=max(1, config.target_steps // config.looks),
    )  # fmt: skip


def run_plan(
    config: Config, bench: Bench, plan: Plan, seed: int, sentences: data.Sentiment, number: int
) -> dict[str, Any]:
    """One intermediate training and what came of it, read from the run folder where it is done."""
    folder = config.out / "plans" / f"{number:02d}-{seed}"
    file = folder / "scored.json"
    if (done := kept(config, file)) is not None:
        if done["name"] != plan.name:
            sys.exit(f"{folder} holds {done['name']!r}, not {plan.name!r}: choose another --out")
        return done
    params: PyTree = bench.start.params
    found = {"name": plan.name, "positions": 0, "tokens": 0, "seconds": 0.0}
    if plan.kind != "none":
        mg, outer, sample, steps = intermediate(config, bench, plan, seed)
        found["positions"], found["tokens"] = data.counted(sample, steps)
        title = f"{plan.name}, seed {seed}"
        trained = train(config, title, folder / "qa", mg, outer, params, sample, steps, seed)
        params, found["seconds"] = trained.meta, trained.cpu_seconds
    found["distance"] = model.distance(bench.start.params, params)
    found["answers"] = {k: bench.answers(params, each.dev) for k, each in bench.sources.items()}
    tuned = fine_tune(config, bench, plan, seed, params, sentences, folder / "sst2")
    found["curve"] = [
        [row["step"], row["eval/accuracy"]] for row in tuned.history if "eval/accuracy" in row
    ]
    found["hits"] = bench.hits(tuned.meta, sentences.test).astype(int).tolist()
    distributed.write(file, json.dumps(found) + "\n")
    if distributed.is_writer():
        for done in (folder / "qa", folder / "sst2"):  # a copy of the weights each
            shutil.rmtree(done / "checkpoints", ignore_errors=True)
    return found


def cut(config: Config, bench: Bench, seed: int) -> data.Sentiment:
    """SST-2 as a seed sees it."""
    return data.sentiment(
        bench.examples, bench.start.words, seed, positions=config.target_positions,
        rows=config.target_steps * config.target_batch, validation=config.validation,
        test=config.test,
    )  # fmt: skip


def run_seed(config: Config, bench: Bench, seed: int, sentences: data.Sentiment) -> page.Seed:
    """All plans of a seed, and what needs no network."""
    phrases, gold = sentences.phrases, sentences.sentences
    same = phrases[: len(sentences.train.y)]
    baselines = {
        "bag of words, the same rows": model.bag_of_words(same, gold),
        "bag of words, all rows": model.bag_of_words(phrases, gold),
        "majority": model.majority(phrases, gold),
    }
    sample = data.phrases(sentences.train, config.target_batch)
    found = {
        plan.name: run_plan(config, bench, plan, seed, sentences, number)
        for number, plan in enumerate(plans())
    }
    return page.Seed(
        seed, found, baselines, data.counted(sample, config.target_steps), len(phrases)
    )


def run(config: Config) -> None:
    """Train, score, and write the run directory."""
    record(config, "seeds", "first_seed", "diversity")
    try:
        diversity = page.read_diversity(config.diversity, list(SOURCES))
        bench = prepare(config)
        cuts = {seed: cut(config, bench, seed) for seed in config.seed_list}
    except (DataUnavailable, FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    seeds = [run_seed(config, bench, seed, each) for seed, each in cuts.items()]
    if distributed.is_writer():
        page.write(config, seeds, bench, plans(), diversity)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    command_line(PRESETS, run, argv)


if __name__ == "__main__":
    main()
