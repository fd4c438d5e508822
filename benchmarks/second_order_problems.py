"""The problems of ``second_order_cost``: a decoder, a sinusoid network and a few-shot one.

Random weights and data: what is measured does not depend on their values.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks import peers_jax
from benchmarks.pieces import WholeConfig
from jmeta.core.tree import global_norm
from jmeta.core.types import Array, Episode, Info, MetaGradient, Problem, PyTree, Steps
from jmeta.methods.maml import TaskLoss, learned_start
from jmeta.models import conv, lora, losses, mlp, transformer

RATE = 0.1  # of SGD on the decoder
RANK = 8  # of its low-rank factors


@dataclasses.dataclass(frozen=True)
class DecoderConfig(WholeConfig):
    """The decoder that is measured, and which rows of its table are."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the decoder is computed in. float32 is float32 on a GPU too, and not TF32."""
    width: int = 256
    """Width of the decoder."""
    layers: int = 4
    """Its blocks."""
    heads: int = 4
    """Its attention heads."""
    vocab: int = 1024
    """Its vocabulary."""
    batch: tuple[int, int] = (4, 128)
    """Sequences of an inner step, and tokens of a sequence."""
    small: bool = False
    """Shrink the models, to see that everything runs."""
    cells: tuple[str, ...] = ()
    """Which rows of the table are measured; none named: all. First order is always one."""


class Setting(NamedTuple):
    """One model variant: the same mathematics, computed in another way."""

    name: str
    problem: Problem
    meta: PyTree
    episode: Episode


def decoder(given: DecoderConfig, steps: int, variant: str) -> Setting:
    """A decoder of the config's shape; ``variant``: how layers are looped and rematerialised."""
    loss, params, episode = parts(given, steps, variant)
    return Setting(variant, learned_start(loss, optax.sgd(RATE)), params, episode)


def adapted(given: DecoderConfig, steps: int) -> Setting:
    """The looped decoder, of which rank-8 factors on queries, keys and values learn and adapt."""
    loss, params, episode = parts(given, steps, "unroll/none")
    factors = lora.init(params, jax.random.key(1), RANK)
    tree, loss = lora.trainable(loss, params, factors, 2.0)
    return Setting("lora", learned_start(loss, optax.sgd(RATE)), tree, episode)


def by_hand(given: DecoderConfig, steps: int, row: str) -> MetaGradient:
    """``jax.grad`` of a loop or a scan over SGD, as one writes it, without jmeta's loops."""
    loss = parts(given, steps, "unroll/none")[0]

    def outer(params: PyTree, episode: Episode) -> Array:
        value = lambda p, batch: loss(p, batch, None)[0]  # noqa: E731
        batches = episode.support.batches
        params = peers_jax.trained(row, value, RATE, params, batches, steps, each=True)
        return value(params, episode.query)

    def estimate(meta: PyTree, state: PyTree, episode: Episode, key: Any):
        loss, grads = jax.value_and_grad(outer)(meta, episode)
        return grads, state, Info(loss, jnp.zeros(steps), {}, global_norm(grads))

    return MetaGradient(lambda meta, key: (), estimate)


def parts(given: DecoderConfig, steps: int, variant: str) -> tuple[TaskLoss, PyTree, Episode]:
    """The decoder's loss, its parameters, and one episode."""
    loop, remat = variant.split("/")
    config = transformer.TransformerConfig(
        vocab=64 if given.small else given.vocab,
        width=16 if given.small else given.width,
        layers=2 if given.small else given.layers,
        heads=4 if given.small else given.heads,
        max_len=given.batch[1],
        loop=loop,  # pyright: ignore[reportArgumentType]
        remat=remat,  # pyright: ignore[reportArgumentType]
        dtype=None if given.dtype == "float32" else jnp.dtype(given.dtype),
    )
    batch = (4, 16) if given.small else given.batch
    keys = jax.random.split(jax.random.key(0), 3)

    def loss(params: PyTree, tokens: jax.Array, key: Any):
        return transformer.next_token_loss(config, params, tokens, key=key)

    episode = Episode(
        Steps(jax.random.randint(keys[1], (steps, *batch), 0, config.vocab)),
        jax.random.randint(keys[2], batch, 0, config.vocab),
    )
    return loss, transformer.init(config, keys[0]), episode


def regressor() -> Setting:
    """The sinusoid network of the MAML paper, 1-40-40-1, ten points."""
    keys = jax.random.split(jax.random.key(0), 3)

    def loss(params: PyTree, batch: dict[str, jax.Array], key: Any):
        return losses.squared_error(mlp.apply(params, batch["x"]), batch["y"]), {}

    def batch(key: jax.Array) -> dict[str, jax.Array]:
        x = jax.random.uniform(key, (10, 1), minval=-5.0, maxval=5.0)
        return {"x": x, "y": jnp.sin(x)}

    episode = Episode(batch(keys[1]), batch(keys[2]))
    problem = learned_start(loss, optax.sgd(0.01))
    return Setting("mlp", problem, mlp.init(keys[0], (1, 40, 40, 1)), episode)


def classifier(*, small: bool = False, convolve: conv.Convolve | None = None) -> Setting:
    """The 4-block few-shot network with 32 filters, 5-way 1-shot, 5 queries of each class."""
    keys = jax.random.split(jax.random.key(0), 3)

    def loss(params: PyTree, batch: dict[str, jax.Array], key: Any):
        return losses.cross_entropy(conv.apply(params, batch["x"], convolve), batch["y"]), {}

    def batch(key: jax.Array, each: int) -> dict[str, jax.Array]:
        return {
            "x": jax.random.uniform(key, (5 * each, 28, 28, 1)),
            "y": jnp.tile(jnp.arange(5), each),
        }

    episode = Episode(batch(keys[1], 1), batch(keys[2], 5))
    problem = learned_start(loss, optax.sgd(0.4))
    params = conv.init(keys[0], 5, filters=8 if small else 32)
    return Setting("conv", problem, params, episode)
