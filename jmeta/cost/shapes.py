"""Problems by the names of known models: their shapes, without a single weight.

A decoder adapts to text by its own next-token loss, an encoder to a classification task.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jmeta.core.types import Array, Episode, Key, Problem, PyTree, Steps

CLASSES = 4  # of an encoder's task
FLOATS = ("float32", "bfloat16", "float16", "float64")


class Shape(NamedTuple):
    """The shape of a transformer.

    Attributes:
        vocab: rows of the embedding, rounded up to a multiple of 128 so that meshes divide it.
        width: of the residual stream.
        layers: number of blocks.
        heads: of each attention.
        max_len: learned positions.
        causal: a decoder.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    max_len: int
    causal: bool


MODELS = {
    "gpt2-124m": Shape(50304, 768, 12, 12, 1024, True),
    "gpt2-355m": Shape(50304, 1024, 24, 16, 1024, True),
    "gpt2-774m": Shape(50304, 1280, 36, 20, 1024, True),
    "bert-base": Shape(30592, 768, 12, 12, 512, False),
    "bert-large": Shape(30592, 1024, 24, 16, 512, False),
    "tiny": Shape(128, 128, 2, 4, 64, True),
}


class Setting(NamedTuple):
    """What a plan is made for: everything by shape alone.

    Attributes:
        problem: what to differentiate.
        meta: the meta-parameters, ``jax.ShapeDtypeStruct`` leaves.
        episode: of one task, likewise.
        rules: where the meta-parameters lie on a mesh, as in ``jmeta.runtime.parallel``; None: a
            copy on every device.
    """

    problem: Problem
    meta: PyTree
    episode: Episode
    rules: Any = None


def setting(
    model: str,
    *,
    sequences: int = 8,
    tokens: int = 512,
    steps: int = 5,
    block_remat: Literal["none", "dots", "hidden", "full"] = "full",
    compute: str | None = None,
    weights: str = "float32",
    layers: int | None = None,
) -> Setting:
    """Full fine-tuning of a named model as the inner loop of MAML, SGD inside.

    Args:
        model: a key of ``MODELS``.
        sequences: in the support batch of each inner step, and in the query.
        tokens: of each sequence.
        steps: inner steps, each with a batch of its own.
        block_remat: what the backward pass of a block recomputes.
        compute: the dtype that blocks compute in, such as ``bfloat16``; None: that of the weights.
        weights: the dtype of the fast weights; the meta-parameters are float32.
        layers: another number of blocks.

    Returns:
        A ``Setting``.

    Raises:
        ValueError: no such model; more tokens than it has positions; a size that is not positive, a
            dtype that is not floating point.

    Example:
        >>> made = setting("gpt2-124m")
        >>> sum(leaf.size for leaf in jax.tree.leaves(made.meta))
        124392960
        >>> made.episode.query.shape
        (8, 512)
    """
    from jmeta.models import losses, transformer
    from jmeta.runtime import parallel

    if model not in MODELS:
        raise ValueError(f"there is no model {model!r}; known are {', '.join(MODELS)}")
    shape = MODELS[model]
    sizes = {"sequences": sequences, "tokens": tokens, "steps": steps, "layers": layers}
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}; it must be positive")
    for name, dtype in (("compute", compute), ("weights", weights)):
        if dtype not in (None, *FLOATS):
            raise ValueError(f"{name} is {dtype!r}; it must be one of {', '.join(FLOATS)}")
    if tokens > shape.max_len:
        raise ValueError(f"{model} has {shape.max_len} positions; {tokens} tokens do not fit")
    config = transformer.TransformerConfig(
        **shape._replace(layers=layers or shape.layers)._asdict(),
        loop="scan",
        remat=block_remat,
        gelu="tanh" if shape.causal else "exact",
        dtype=None if compute is None else jnp.dtype(compute),
    )
    params = jax.eval_shape(lambda key: transformer.init(config, key), jax.random.key(0))
    text = jax.ShapeDtypeStruct((sequences, tokens), jnp.int32)

    def decode(fast: PyTree, meta: PyTree, batch: Array, key: Key) -> tuple[Array, PyTree]:
        return transformer.next_token_loss(config, fast, batch, key=key)

    def classify(fast: PyTree, meta: PyTree, batch: Any, key: Key) -> tuple[Array, PyTree]:
        states = transformer.pooled(config, fast["encoder"], batch["tokens"], key=key)
        scores = states @ fast["head"].astype(states.dtype)
        return losses.cross_entropy(scores, batch["labels"]), {}

    if shape.causal:
        meta, batch, loss, rules = params, text, decode, parallel.TRANSFORMER
    else:
        head = jax.ShapeDtypeStruct((shape.width, CLASSES), jnp.float32)
        meta, loss = {"encoder": params, "head": head}, classify
        batch = {"tokens": text, "labels": jax.ShapeDtypeStruct((sequences,), jnp.int32)}
        rules = (("head", jax.P()), *parallel.TRANSFORMER)
    several = jax.tree.map(lambda x: jax.ShapeDtypeStruct((steps, *x.shape), x.dtype), batch)

    def start(meta: PyTree, key: Key) -> PyTree:
        return jax.tree.map(lambda leaf: leaf.astype(weights), meta)

    problem = Problem(loss, loss, lambda meta: optax.sgd(0.1), init=start)
    return Setting(problem, meta, Episode(Steps(several), batch), rules)
