"""Checkpoints in and out: ``config.json`` and safetensors, as transformers reads and writes them.

Tensors are read one by one, straight into stacked arrays of the dtype and sharding asked for.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jmeta.core.tree import path_name
from jmeta.core.types import Array, Key
from jmeta.files import write_atomically
from jmeta.models import bert, folders, gpt2, names, settings_file, tensorfile
from jmeta.models.folders import INDEX, WEIGHTS
from jmeta.models.names import Config, Tensor
from jmeta.models.partial import put
from jmeta.models.tensorfile import Lazy, Stored

Params = dict[str, Any]
Shardings: TypeAlias = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], Any] | None

_FLOATING = ("float64", "float32", "float16", "bfloat16")


class Pretrained(NamedTuple):
    """A model that was read.

    Attributes:
        config: a ``BertConfig`` or a ``GPT2Config``; change what it is computed with (``loop``,
            ``remat``, ``dtype``) by ``_replace``.
        params: its parameters.
        drawn: leaves of the head that the checkpoint did not hold.
        unused: tensors of other heads that it held.
        settings: the contents of its ``config.json``.
    """

    config: Config
    params: Params
    drawn: tuple[str, ...]
    unused: tuple[str, ...]
    settings: dict[str, Any]


def model(config: Config) -> Any:
    """The module with the ``init``, ``hidden``, ``embed``, ``apply`` and ``loss`` of a config.

    Args:
        config: a ``BertConfig`` or a ``GPT2Config``.

    Returns:
        ``jmeta.models.bert`` or ``jmeta.models.gpt2``.

    Example:
        >>> model(gpt2.GPT2Config(vocab=11, width=8, layers=2, heads=2, max_len=5)).__name__
        'jmeta.models.gpt2'
    """
    return bert if isinstance(config, bert.BertConfig) else gpt2


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    head: Literal["saved", "none", "masked_lm", "causal_lm", "classify", "spans"] = "saved",
    labels: int | None = None,
    dtype: Any = None,
    sharding: Shardings = None,
    key: Key = None,
) -> Pretrained:
    """Read a checkpoint of BERT, RoBERTa, DistilBERT, MiniLM or GPT-2.

    Args:
        source: a local folder with ``config.json`` and ``*.safetensors`` (one file, or shards with
            an index), or the name of a model on the Hugging Face hub, which is taken from
            huggingface_hub's cache or downloaded by it.
        head: the head wanted; ``"saved"``: the one that ``config.json`` names.
        labels: outputs of the head ``"classify"``; None: as ``config.json`` says.
        dtype: of the parameters; None: as stored.
        sharding: one for all leaves, or a function of a leaf's dotted path and shape; None: the
            default device. Each process reads only the parts that its devices hold.
        key: draws what the head wanted has and the checkpoint has not; None: that is an error.

    Returns:
        A ``Pretrained``.

    Raises:
        FileNotFoundError: there is no such folder and no way to download, or a file is missing.
        ValueError: only pickles are there, the architecture is unknown, a file is truncated, or a
            tensor is missing, misshapen or unexpected; the message names it.
        TypeError: ``dtype`` is no floating dtype.

    Example:
        >>> import tempfile
        >>> config = gpt2.GPT2Config(vocab=11, width=8, layers=2, heads=2, max_len=5, ff=32)
        >>> params = gpt2.init(config, jax.random.key(0))
        >>> folder = to_pretrained(tempfile.mkdtemp(), config, params)
        >>> again = from_pretrained(folder)
        >>> again.config == config, bool((again.params["ln_f"]["scale"] == 1).all())
        (True, True)
    """
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype={jnp.dtype(dtype)}: parameters are floating-point numbers")
    folder = folders.local_folder(source, ["config.json", "*.safetensors", INDEX], folders.whole)
    settings = folders.json_object(folder / "config.json")
    config = settings_file.read_settings(settings, head)
    if labels is not None:
        if labels < 1:
            raise ValueError(f"labels={labels} is below 1")
        config = config._replace(labels=labels)
    files = _files(folder, config)
    shapes = jax.eval_shape(lambda: model(config).init(config, jax.random.key(0)))
    leaves = dict(_named(shapes))
    table = {tensor.path: tensor for tensor in names.tensors(config)}
    for tensor in names.pooler(config):
        if tensor.name in files:
            table[tensor.path] = tensor
            leaves[tensor.path] = jax.ShapeDtypeStruct(
                (config.width,) * (2 if tensor.transposed else 1), jnp.float32
            )
    drawn, unused = _account(config, table, leaves, files, key, folder)
    params: Params = {}
    fresh = dict(_named({"head": model(config).init_head(config, key)})) if drawn else {}
    for path, tensor in table.items():
        if path in drawn:
            where = sharding(path, leaves[path].shape) if callable(sharding) else sharding
            leaf = fresh[path] if dtype is None else fresh[path].astype(dtype)
            leaf = leaf if where is None else jax.device_put(leaf, where)
        else:
            leaf = _read(path, tensor, leaves[path].shape, files, dtype, sharding)
        put(params, path, leaf)
    return Pretrained(config, params, tuple(drawn), tuple(unused), settings)


def to_pretrained(
    folder: str | os.PathLike[str],
    config: Config,
    params: Params,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint that transformers loads, with the same outputs.

    Both files are written through temporary ones, so a reader never sees half of one. Tensors are
    written one by one. The tokeniser is its own: ``tokenizer.save_pretrained(folder)``.

    Args:
        folder: where ``config.json`` and ``model.safetensors`` go; made if missing.
        config: the model.
        params: its parameters, of one floating dtype or several; low-rank factors merged.
        settings: more entries for ``config.json``, such as ``Pretrained.settings``; those that
            the config decides are overwritten.

    Returns:
        The folder.

    Raises:
        ValueError: a leaf is missing, misshapen, not one of the model's, or split over processes.

    Example:
        >>> import tempfile
        >>> config = bert.BertConfig(vocab=11, width=8, layers=2, heads=2, max_len=5)
        >>> folder = to_pretrained(tempfile.mkdtemp(), config, bert.init(config, jax.random.key(0)))
        >>> sorted(file.name for file in folder.iterdir())
        ['config.json', 'model.safetensors']
    """
    folder = Path(folder)
    tensors = export(config, params)
    folder.mkdir(parents=True, exist_ok=True)
    decided = settings_file.write_settings(config)
    kept = dict(settings or {})
    if len(kept.get("id2label", decided.get("id2label", ()))) == config.labels:
        decided = {k: v for k, v in decided.items() if k not in ("id2label", "label2id")} | {
            k: kept.get(k, decided[k]) for k in ("id2label", "label2id") if k in decided
        }
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
    if len(dtypes) == 1:
        decided["dtype"] = dtypes.pop()
    for name in ("torch_dtype", "dtype"):  # that of another time may be a narrower one
        kept.pop(name, None)
    text = json.dumps({**kept, **decided}, indent=2, sort_keys=True) + "\n"
    tensorfile.write(folder / WEIGHTS, tensors)
    write_atomically(folder / "config.json", text)
    return folder


def export(config: Config, params: Params) -> dict[str, Lazy]:
    """The tensors of a checkpoint, each made when it is asked for.

    Args:
        config: the model.
        params: its parameters, or anything of their structure and shapes, such as gradients.

    Returns:
        ``{name: Lazy}``; ``make()`` is the tensor as transformers stores it.

    Raises:
        ValueError: a leaf is missing, misshapen, not one of the model's, or split over processes.
    """
    shapes = jax.eval_shape(lambda: model(config).init(config, jax.random.key(0)))
    wanted = {path: leaf.shape for path, leaf in _named(shapes)}
    table = names.tensors(config)
    if "pooler" in params:
        table += names.pooler(config)
        wanted |= {"pooler.kernel": (config.width, config.width), "pooler.bias": (config.width,)}
    held = dict(_named(params))
    if "top" in params:
        raise ValueError("the top blocks stand apart; put them back with partial.join_top first")
    for path in sorted(set(held) ^ set(wanted)):
        where = "the model has no such leaf" if path in held else "it is missing"
        hint = "; merge low-rank factors first" if path.endswith((".a", ".b")) else ""
        raise ValueError(f"the leaf {path!r} of params: {where}{hint}")
    for path, shape in wanted.items():
        if held[path].shape != shape:
            raise ValueError(
                f"the leaf {path!r} has shape {held[path].shape}, the config means {shape}"
            )
        if not _at_hand(held[path]):
            raise ValueError(
                f"the leaf {path!r} is split over several processes; in all of them, call "
                "jmeta.runtime.distributed.whole(params) first"
            )
    made: dict[str, Lazy] = {}
    for tensor in table:
        leaf, name = held[tensor.path], names.full_name(config, tensor)
        if tensor.stacked:
            for i in range(config.layers):
                made[name.format(i)] = _piece(leaf, i, tensor.transposed)
        else:
            made[name] = _piece(leaf, None, tensor.transposed)
    return made


def _piece(leaf: Any, layer: int | None, transposed: bool) -> Lazy:
    shape = leaf.shape if layer is None else leaf.shape[1:]

    def make() -> np.ndarray:
        piece = _on_host(leaf, layer)
        return piece.T if transposed else piece

    return Lazy(shape[::-1] if transposed else shape, str(leaf.dtype), make)


def _at_hand(leaf: Any) -> bool:
    """Whether this process holds all of a leaf."""
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated


def _on_host(leaf: Any, layer: int | None) -> np.ndarray:
    """A leaf, or one of its layers, as numpy has it; nothing that other processes must join in."""
    if isinstance(leaf, jax.Array) and leaf.is_fully_replicated:
        leaf = leaf.addressable_data(0)
    devices = leaf.devices() if isinstance(leaf, jax.Array) else ()
    if len(devices) > 1 or any(device.platform != "cpu" for device in devices):
        # What asarray makes of a leaf that is elsewhere, or in pieces, stays as long as the leaf:
        # all of them together would be the model a second time. So it is made of a copy.
        return np.asarray(jnp.copy(leaf) if layer is None else leaf[layer])
    whole = np.asarray(leaf)
    return whole if layer is None else whole[layer]


def _files(folder: Path, config: Config) -> dict[str, Stored]:
    """The tensors of a checkpoint under their names of today, without prefix."""
    listed = folders.listed(folder)
    files = folders.weights(folder, listed)
    for file in files:
        if not file.is_file():
            if pickles := sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt")):
                raise ValueError(
                    f"{folder} holds {pickles[0].name} and no {file.name}. A pickle can run any "
                    "code when it is opened, so jmeta does not; convert it where you trust it, "
                    "with PyTorch installed: transformers.AutoModel.from_pretrained(folder)"
                    ".save_pretrained(other_folder) writes safetensors (use the class with the "
                    "head you need)"
                )
            raise FileNotFoundError(
                f"{folder} holds no {file.name}, which transformers' save_pretrained writes"
            )
    found = tensorfile.contents(files)
    for name, file in listed.items():
        if name not in found:
            raise ValueError(f"{INDEX} puts the tensor {name!r} into {file}, which has no such one")
    before = names.prefix(config)
    return {names.canonical(name).removeprefix(before): entry for name, entry in found.items()}


def _account(
    config: Config,
    table: Mapping[str, Tensor],
    leaves: Mapping[str, Any],
    files: Mapping[str, Stored],
    key: Key,
    folder: Path,
) -> tuple[list[str], list[str]]:
    """Leaves to draw and tensors not used; every other difference is an error."""
    drawn, used = [], set()
    for path, tensor in table.items():
        shape = leaves[path].shape
        own = shape[1:] if tensor.stacked else shape
        own = own[::-1] if tensor.transposed else own
        for name in _each(tensor, shape):
            entry = files.get(name)
            if entry is None:
                if path.startswith("head."):
                    drawn.append(path)
                    break
                raise ValueError(
                    f"{folder} has no tensor {name!r} of shape {list(own)} (the leaf {path!r})"
                )
            used.add(name)
            if entry.shape != own:
                by_label = config.head == "classify" and path.startswith("head.out.")
                raise ValueError(
                    f"{entry.file}: tensor {entry.name!r} has shape {list(entry.shape)}, but "
                    f"{f'labels={config.labels}' if by_label else 'config.json'} means {list(own)} "
                    f"(the leaf {path!r})"
                )
            if entry.dtype not in _FLOATING:
                raise ValueError(
                    f"{entry.file}: tensor {entry.name!r} has dtype {entry.dtype}; jmeta reads "
                    "floating-point weights, not quantised ones"
                )
    if drawn and key is None:
        raise ValueError(
            f"{folder} has no head {config.head!r} (the leaves {', '.join(drawn)}); pass key= to "
            "draw a new one"
        )
    unused = [n for n in files if n not in used and not names.redundant(n)]
    for name in unused:
        if not names.of_a_head(name):
            entry = files[name]
            raise ValueError(
                f"{entry.file}: tensor {entry.name!r} of shape {list(entry.shape)} is not part of "
                f"a {names.kind(config)} with {config.layers} layers, which config.json describes"
            )
    return drawn, [files[name].name for name in unused]


def _each(tensor: Tensor, shape: tuple[int, ...]) -> list[str]:
    return [tensor.name.format(i) for i in range(shape[0])] if tensor.stacked else [tensor.name]


def _read(
    path: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    files: Mapping[str, Stored],
    dtype: Any,
    sharding: Shardings,
) -> Array:
    """A leaf, stacked and transposed while it is read, on its devices."""
    entries = [files[name] for name in _each(tensor, shape)]
    with jax.numpy_dtype_promotion("standard"):  # layers may be stored in several
        stored_as = functools.reduce(jnp.promote_types, sorted({e.dtype for e in entries}))
    kind = jax.dtypes.canonicalize_dtype(stored_as if dtype is None else dtype)
    parts: dict[str, np.ndarray] = {}  # devices that hold the same part share one reading

    def part(index: Any) -> np.ndarray:  # a slice for each axis
        if (made := parts.get(str(index))) is None:
            made = parts[str(index)] = stack(index)
        return made

    def stack(index: Any) -> np.ndarray:
        ranges = [range(n)[s] for n, s in zip(shape, index, strict=True)]
        out = np.empty([len(r) for r in ranges], kind)
        own = index[1:] if tensor.stacked else index
        whole = all(
            len(r) == n for r, n in zip(ranges[-len(own) :], shape[-len(own) :], strict=True)
        )
        stored = () if whole else own[::-1] if tensor.transposed else own
        for place, layer in enumerate(ranges[0] if tensor.stacked else [0]):
            piece = tensorfile.read(entries[layer], stored)
            target = out[place] if tensor.stacked else out
            target[...] = piece.T if tensor.transposed else piece
        return out

    where = sharding(path, shape) if callable(sharding) else sharding
    if where is None:
        leaf = jax.device_put(stack(tuple(slice(None) for _ in shape)))
    else:
        leaf = jax.make_array_from_callback(shape, where, part)
    return leaf.block_until_ready()  # so that the buffer it came from is gone before the next


def _named(tree: Any) -> list[tuple[str, Any]]:
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
