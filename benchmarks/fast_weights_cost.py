"""What fast weights cost: against the same decoder without, and against dynamic evaluation.

Evaluation of a document, a training step, generation; medians of interleaved runs, XLA's temporary
memory, and the FLOPs at the shapes of GPT-2.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.pieces import WholeConfig, leave
from jmeta import cost
from jmeta.core.types import Array, PyTree
from jmeta.methods import fast_weights
from jmeta.methods.dynamic_evaluation import dynamic_evaluation, sgd_towards_start
from jmeta.methods.fast_weights import FastWeights
from jmeta.methods.fast_weights_stream import decoder, generate, init_state
from jmeta.models import decoding, gpt2, transformer
from jmeta.runtime import config as configuration
from jmeta.runtime import statistics

STATIC, FAST, DYNAMIC = "static", "fast weights", "dynamic evaluation"
FIRST = "fast weights, first order"
EVALUATION, TRAINING, GENERATION = "evaluation", "training step", "generation"
GPT2 = "evaluation, GPT-2 124M shapes"
# (part, method, metric) -> (against, at most)
BARS = {
    (EVALUATION, FAST, "seconds"): (STATIC, 2.0),
    (EVALUATION, FAST, "seconds of dynamic evaluation's"): (DYNAMIC, 0.6),
    (TRAINING, FAST, "seconds"): (STATIC, 2.3),
    (TRAINING, FAST, "temp_bytes"): (STATIC, 1.6),
    (GPT2, FAST, "flops"): (STATIC, 1.7),
}


@dataclasses.dataclass(frozen=True)
class Config(WholeConfig):
    """What fast weights cost against a decoder without, and against dynamic evaluation."""

    vocab: int = 4096
    """Tokens of the vocabulary."""
    width: int = 256
    """Width of the decoder, and of the block."""
    layers: int = 4
    """Blocks of the decoder."""
    heads: int = 4
    """Attention heads."""
    tokens: int = 1024
    """Tokens of a document, all of them context."""
    batch: int = 2
    """Documents of a training step; one is evaluated."""
    segment: int = 128
    """Tokens between two updates of dynamic evaluation."""
    chunk: int = 128
    """Positions of a chunk of the linear attention."""
    scored: int = 256
    """Tokens whose slow scores exist at a time in training."""
    written: int = 2000
    """Tokens that are generated."""
    repeats: int = 7
    """Timed runs of each program, interleaved; of generation a third of them."""
    gpt2_tokens: int = 1024
    """Tokens of a document at the shapes of GPT-2 124M, for which FLOPs are counted; 0: none."""


PRESETS = {
    "paper": Config(),
    "smoke": Config(
        vocab=50, width=16, layers=1, heads=2, tokens=16, segment=4, chunk=4, scored=8, written=6,
        repeats=1, gpt2_tokens=0,
    ),
}  # fmt: skip

Program = tuple[Callable[..., Any], tuple[Any, ...]]


def losses_of(states: Callable, config: FastWeights | None) -> Callable[[PyTree, Array], Array]:
    """``(params, tokens [batch, time]) -> [batch, time]``, of a body with or without a block."""

    def losses(params: PyTree, tokens: Array) -> Array:
        labels, weights = fast_weights.next_tokens(tokens)
        table = params["body"]["embed"]["tokens"]
        out = states(params["body"], tokens)
        if config is not None:
            out = fast_weights.features(config, params["block"], table, out, labels, weights)
        return fast_weights.token_losses(out, table, labels)

    return losses


def of_segments(shape: Any, size: int) -> Callable[[PyTree, Array], Array]:
    """Dynamic evaluation of one document, with the keys and values of earlier segments."""

    def loss(params: PyTree, cache: Any, piece: Any) -> Any:
        tokens, labels = piece
        states, cache = decoding.extend(shape, params, cache, tokens[None])
        each = fast_weights.token_losses(states[0], params["embed"]["tokens"], labels)
        return each.mean(), (cache, each)

    def losses(params: PyTree, tokens: Array) -> Array:
        labels, _ = fast_weights.next_tokens(tokens)
        pieces = tuple(x[0].reshape(-1, size) for x in (tokens, labels))
        cache = decoding.init_cache(shape, params["body"], 1, tokens.shape[1])
        found = dynamic_evaluation(
            loss, sgd_towards_start(0.1, 0.01), params["body"], pieces, cache
        )
        return found.aux.reshape(1, -1)

    return losses


def step_of(losses: Callable[[PyTree, Array], Array]) -> Callable[[PyTree, PyTree, Array], Any]:
    """A whole training step with Adam."""
    optimizer = optax.adam(1e-3)

    def step(params: PyTree, state: PyTree, tokens: Array) -> Any:
        value, grads = jax.value_and_grad(lambda p: losses(p, tokens).mean())(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def continuing(shape: Any, block: FastWeights | None, count: int) -> Callable[[PyTree, Array], Any]:
    """Generation of ``count`` tokens from a prompt ``[batch, time]``."""

    def run(params: PyTree, prompt: Array) -> Array:
        body, table = params["body"], params["body"]["embed"]["tokens"]

        def states(cache: Any, tokens: Array) -> tuple[Array, Any]:
            out, cache = decoding.extend(shape, body, cache, tokens[:, None])
            return out[:, 0], cache

        def plain(cache: Any, tokens: Array) -> tuple[Array, Any]:
            out, cache = states(cache, tokens)
            return out @ table.T, cache

        cache = decoding.init_cache(shape, body, prompt.shape[0])
        if block is None:
            return generate(plain, cache, prompt, count)[0]
        step = decoder(block, params["block"], table, states)
        return generate(step, (cache, init_state(params["block"], prompt.shape[0])), prompt, count)[
            0
        ]

    return run


def programs(config: Config) -> dict[str, dict[str, Program]]:
    """For each part: its programs and their arguments."""
    room = max(config.tokens, config.written + 16)
    shape = transformer.TransformerConfig(
        vocab=config.vocab, width=config.width, layers=config.layers, heads=config.heads,
        max_len=room,
    )  # fmt: skip
    keys = jax.random.split(jax.random.key(0), 3)
    body = transformer.init(shape, keys[0])
    block = fast_weights.init(config.width, config.width, keys[1])
    params, alone = {"body": body, "block": block}, {"body": body}
    tokens = jax.random.randint(keys[2], (config.batch, config.tokens), 0, config.vocab)
    states = functools.partial(transformer.hidden, shape)
    fast = FastWeights(chunk=config.chunk, reference=float(config.segment))
    trained = fast._replace(scored=config.scored)
    first = trained._replace(first_order=True)
    adam = optax.adam(1e-3)
    whole, small = adam.init(params), adam.init(alone)
    prompt = tokens[:1, :8]
    return {
        EVALUATION: {
            STATIC: (losses_of(states, None), (alone, tokens[:1])),
            FAST: (losses_of(states, fast), (params, tokens[:1])),
            DYNAMIC: (of_segments(shape, config.segment), (alone, tokens[:1])),
        },
        TRAINING: {
            STATIC: (step_of(losses_of(states, None)), (alone, small, tokens)),
            FAST: (step_of(losses_of(states, trained)), (params, whole, tokens)),
            FIRST: (step_of(losses_of(states, first)), (params, whole, tokens)),
        },
        GENERATION: {
            STATIC: (continuing(shape, None, config.written), (alone, prompt)),
            FAST: (continuing(shape, fast, config.written), (params, prompt)),
        },
    }


def gpt2_flops(config: Config) -> list[dict[str, Any]]:
    """FLOPs of evaluation at the shapes of GPT-2 124M, traced and never run."""
    shape = gpt2.GPT2Config(vocab=50257, width=768, layers=12, heads=12, max_len=1024)
    key = jax.random.key(0)
    body = jax.eval_shape(functools.partial(gpt2.init, shape), key)
    block = jax.eval_shape(lambda key: fast_weights.init(768, 768, key), key)
    tokens = jax.ShapeDtypeStruct((1, config.gpt2_tokens), jnp.int32)

    def states(params: PyTree, tokens: Array) -> Array:
        return gpt2.hidden(shape, params, {"tokens": tokens})

    rows = []
    for name, chosen in ((STATIC, None), (FAST, FastWeights(chunk=config.chunk))):
        traced = jax.make_jaxpr(losses_of(states, chosen))({"body": body, "block": block}, tokens)
        rows.append(row_of(GPT2, name, "flops", cost.flops(traced)))
    return rows


def row_of(part: str, method: str, metric: str, value: float) -> dict[str, Any]:
    return {"method": method, "seed": 0, "metric": metric, "value": value, "part": part}


def measure(config: Config) -> list[dict[str, Any]]:
    """Time, memory and FLOPs of every program."""
    rows = []
    for part, every in programs(config).items():
        made = {name: cost.compile_program(run, *given) for name, (run, given) in every.items()}
        arguments = {name: given for name, (_, given) in every.items()}
        repeats = config.repeats if part != GENERATION else max(config.repeats // 3, 1)
        seconds, _ = cost.interleave(made, arguments, repeats)
        for name, program in made.items():
            values = list(seconds[name])
            rows.append({"method": name, "seed": 0, "metric": "runs, seconds", "part": part,
                         "values": values})  # fmt: skip
            rows.append(row_of(part, name, "seconds", cost.median(values)))
            rows.append(row_of(part, name, "temp_bytes", program.temp_bytes))
            rows.append(row_of(part, name, "flops", program.flops))
            ratios = [a / b for a, b in zip(values, seconds[STATIC], strict=True)]
            rows.append(row_of(part, name, "seconds x", cost.median(ratios)))
            if part == GENERATION:
                rate = config.written / cost.median(values)
                rows.append(row_of(part, name, "tokens per second", rate))
                rows.append(row_of(part, name, "temp_bytes for a token more",
                                   growth(config, name, arguments[name])))  # fmt: skip
    return rows + (gpt2_flops(config) if config.gpt2_tokens else [])


def growth(config: Config, name: str, given: tuple[Any, ...]) -> float:
    """Temporary memory that one more generated token takes."""
    sizes = []
    shape = transformer.TransformerConfig(
        vocab=config.vocab, width=config.width, layers=config.layers, heads=config.heads,
        max_len=given[0]["body"]["embed"]["positions"].shape[0],
    )  # fmt: skip
    block = FastWeights(reference=float(config.segment)) if name == FAST else None
    counts = max(config.written // 4, 1), config.written
    for count in counts:
        sizes.append(cost.compile_program(continuing(shape, block, count), *given).temp_bytes)
    return (sizes[1] - sizes[0]) / max(counts[1] - counts[0], 1)


def bars(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The bounds that the benchmark is held to, one sentence each."""
    value = {(r["part"], r["method"], r["metric"]): r["value"] for r in rows if "value" in r}
    runs = {(r["part"], r["method"]): r["values"] for r in rows if "values" in r}
    lines = []
    for (part, method, metric), (against, bar) in BARS.items():
        if metric.startswith("seconds"):
            pairs = zip(runs[part, method], runs[part, against], strict=True)
            ratio = cost.median([a / b for a, b in pairs])
        elif (part, method, metric) in value:
            ratio = value[part, method, metric] / value[part, against, metric]
        else:
            continue
        held = "holds" if ratio <= bar else "MISSED"
        what = (
            metric.split(" ")[0].replace("temp_bytes", "temporary memory").replace("flops", "FLOPs")
        )
        lines.append(
            f"{part}: {method} takes {ratio:.2f} x the {what} of {against} (bar {bar}: {held})"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    jax.config.update("jax_enable_compilation_cache", False)
    config = configuration.parse(PRESETS, argv, description=__doc__)
    configuration.dump(config, Path(config.out))
    rows = measure(config)
    timed = [row for row in rows if row["metric"] != "runs, seconds"]
    leave(
        config, "What fast weights cost",
        f"A decoder of {config.layers} layers of width {config.width}, vocabulary {config.vocab}, "
        f"{config.tokens} tokens.",
        rows, statistics.summarise(timed, baseline=STATIC), notes=bars(rows),
    )  # fmt: skip


if __name__ == "__main__":
    main()
