"""Many tasks as Task2Vec embeddings: distances, a tree, diversity with an interval, and transfer.

Does diversity say how well a network transfers from three tasks to another, by three methods?
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import _qa_data, _qa_model
from experiments import _task_diversity_grid as grid
from experiments import _task_diversity_report as page
from experiments._shared import command_line, record, refuse_unresumed, train_method
from experiments._task_diversity_data import (
    Encoded,
    encode,
    plain_texts,
    read_tasks,
    shortened,
)
from experiments._task_diversity_probe import (
    Probe,
    embed_questions,
    embed_tasks,
    pretrained,
    probe,
)
from jmeta.data.sources import DataUnavailable
from jmeta.methods import load_embeddings, plain_gradient, save_embeddings
from jmeta.models import gpt2
from jmeta.runtime import config as configuration
from jmeta.runtime import distributed
from jmeta.runtime.fit import from_function


@dataclasses.dataclass(frozen=True)
class Config(configuration.RunConfig):
    """Task2Vec embeddings of many tasks, their diversity, and transfer between them.

    Twenty-seven tasks are read from $JMETA_DATA; without it, twenty are made of the standard
    library.
    """

    probe: str = "small"
    """small (a GPT-2 trained here as a language model), or a checkpoint: a folder or a name."""
    vocab: int = 2048
    """Size of the small probe's byte-level BPE vocabulary."""
    width: int = 128
    """Width of the small probe."""
    layers: int = 2
    """Blocks of the small probe."""
    lm_steps: int = 1000
    """Steps of its training, once for all seeds."""
    lm_batch: int = 16
    """Windows per step of it."""
    positions: int = 64
    """Tokens of a text."""
    classes: int = 10
    """Classes of a task at most: its most frequent ones."""
    most: int = 2000
    """Examples of a task at most."""
    half: int = 200
    """Examples of each half that is embedded; fewer where there are not as many."""
    draws: int = 2
    """Labels drawn from the probe for each example."""
    questions: int = 128
    """Prompts of each question-answering source that are embedded."""
    question_positions: int = 96
    """Tokens of a prompt."""
    grid_batches: int = 144
    """Batches that every method of the transfer grid sees; 0: no grid."""
    grid_batch: int = 8
    """Rows of each."""
    grid_positions: int = 32
    """Tokens of a text there."""
    target_steps: int = 60
    """Steps of fine-tuning on the target, of twice as many rows."""
    target_train: int = 640
    """Rows of the target that may be trained on; the others are scored."""

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = grid.SUBSET * (grid.INNER + 1)
        if self.grid_batches % whole:
            raise ValueError(
                f"grid_batches={self.grid_batches} cannot be shared evenly by {grid.SUBSET} tasks "
                f"and MAML's {grid.INNER + 1} batches of each: make it a multiple of {whole}"
            )


PRESETS = {
    "small": Config(seeds=3),
    "full": Config(seeds=5, vocab=8192, width=256, layers=4, lm_steps=10_000, positions=128,
                   half=512, draws=8, grid_batches=960, grid_positions=128, target_steps=300),
    "smoke": Config(vocab=400, width=16, layers=1, lm_steps=3, lm_batch=2, positions=16, most=64,
                    half=12, questions=4, grid_batches=12, grid_batch=2, target_steps=2,
                    target_train=20),
}  # fmt: skip


def small_probe(config: Config, texts: list[str]) -> Probe:
    """A GPT-2 trained as a language model on the standard library and the tasks' texts."""
    code = _qa_data.library()
    words = _qa_data.small_vocabulary([*code, *texts], config.vocab)
    shape = gpt2.GPT2Config(
        vocab=words.size, width=config.width, layers=config.layers,
        heads=max(1, config.width // 32), ff=4 * config.width,
        max_len=max(config.question_positions, config.positions),
        head="causal_lm", pad_id=words.pad,
    )  # fmt: skip
    streams = [_qa_data.stream(part, words) for part in (code, texts, texts)]
    trained = train_method(
        "language model", plain_gradient(_qa_model.text_loss(shape)),
        _qa_model.adamw(_qa_model.decayed(2e-3, config.lm_steps)),
        gpt2.init(shape, jax.random.key(0)),
        from_function(_qa_data.windows_of(streams, config.lm_batch, config.positions, 0)),
        config.out / "language-model", resume=config.resume, steps=config.lm_steps, key=0, keep=1,
        checkpoint_every=200, log_every=max(1, config.lm_steps // 10),
    )  # fmt: skip
    return probe("small", shape, trained.meta, words)


def embeddings(
    config: Config, found: Probe, tasks: Sequence[Encoded], seed: int
) -> dict[str, np.ndarray]:
    """A seed's embeddings, read from the run folder where they are done."""
    path = config.out / f"embeddings-{seed}.npz"
    if path.exists():
        return load_embeddings(path)[0]
    vectors = embed_tasks(
        found, tasks, seed, size=config.half, classes=config.classes, draws=config.draws
    )
    if isinstance(found.config, gpt2.GPT2Config):
        try:
            vectors |= embed_questions(
                found,
                seed,
                size=config.questions,
                positions=config.question_positions,
                draws=config.draws,
            )
        except DataUnavailable as error:
            print(f"question answering is left out: {error}", file=sys.stderr)
    if distributed.is_writer():
        save_embeddings(
            path, vectors,
            {"probe": found.name, "shape": list(found.config[:5]), "seed": seed,
             "positions": config.positions, "examples of a half": config.half,
             "labels drawn": config.draws, "rows": "kernels of attention and MLP, mean over inputs",
             "tasks": {task.name: task.family for task in tasks}},
        )  # fmt: skip
    return vectors


def transfer(
    config: Config, made: grid.Grid, tasks: Sequence[Encoded], seed: int
) -> dict[str, dict[str, float]]:
    """Accuracies of a seed by method and subset, read from the run folder where they are done."""
    path = config.out / f"grid-{seed}.json"
    found: dict[str, dict[str, float]] = {}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
    sources, target = grid.chosen([shortened(task, config.grid_positions) for task in tasks])
    wanted = [(grid.NONE, ())] + [(m, s) for s in grid.subsets(list(sources)) for m in grid.METHODS]
    for method, names in wanted:
        key = " + ".join(names)
        if key in found.get(method, {}):
            continue
        params = made.start()
        if names:
            params = made.source(method, [sources[name] for name in names], seed)
        found.setdefault(method, {})[key] = made.score(params, target, seed)
        if distributed.is_writer():
            distributed.write(path, json.dumps(found) + "\n")
    return found


def run(config: Config) -> None:
    """Embed, measure, transfer, and write the run directory."""
    record(config, "seeds", "first_seed")
    if any(config.out.glob("embeddings-*.npz")):
        refuse_unresumed(config.out, config.resume)
    try:
        texts = read_tasks(config.classes, config.most)
        if config.probe == "small":
            found = small_probe(config, plain_texts(texts))
        else:
            found = pretrained(config.probe)
    except (DataUnavailable, FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    tasks = encode(texts, found.words, config.positions)
    vectors = {seed: embeddings(config, found, tasks, seed) for seed in config.seed_list}
    accuracies: dict[int, Any] = {}
    if config.grid_batches:
        sizes = grid.Sizes(
            config.grid_batches, config.grid_batch, config.target_steps, config.target_train,
            config.classes,
        )  # fmt: skip
        made = grid.make_grid(found, sizes, grid.Rates())
        accuracies = {seed: transfer(config, made, tasks, seed) for seed in config.seed_list}
    if distributed.is_writer():
        page.write(config, tasks, vectors, accuracies, published())


def published() -> dict[str, dict[str, dict[int, float]]]:
    """SST-2 accuracies of the committed question-answering grid: kind, sources, seed."""
    path = Path(__file__).parents[1] / "benchmarks" / "results" / "qa_transfer-small.json"
    if not path.exists():
        return {}
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        kind, _, names = row["method"].partition(": ")
        if row["metric"] == "SST-2 accuracy" and names:
            key = "+".join(sorted(names.split(", ")))
            seeds = found.setdefault(kind, {}).setdefault(key, {})
            seeds.setdefault(row["seed"], row["value"])  # the first order of a sequence
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    command_line(PRESETS, run, argv)


if __name__ == "__main__":
    main()
