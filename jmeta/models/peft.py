"""LoRA adapters in and out, in the files that PEFT reads and writes.

That is ``adapter_config.json`` and ``adapter_model.safetensors``: factors, and a trained head.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmeta.core.tree import path_name
from jmeta.files import write_atomically
from jmeta.models import lora, names, tensorfile
from jmeta.models.folders import json_object, local_folder
from jmeta.models.names import Config, Tensor
from jmeta.models.partial import put
from jmeta.models.pretrained import model
from jmeta.models.tensorfile import Lazy, Stored

Params = dict[str, Any]

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_BEFORE = "base_model.model."
_TASKS = {
    None: "FEATURE_EXTRACTION",
    "causal_lm": "CAUSAL_LM",
    "classify": "SEQ_CLS",
    "spans": "QUESTION_ANS",
}
# What changes the mathematics and has no counterpart here.
_REFUSED = (
    "use_dora", "rank_pattern", "alpha_pattern", "layers_pattern", "layers_to_transform",
    "trainable_token_indices", "target_parameters", "lora_bias", "use_qalora", "use_bdlora",
    "alora_invocation_tokens",
)  # fmt: skip
# Any other way to begin changes the model too, so that the factors alone would not do.
_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


class Adapter(NamedTuple):
    """An adapter that was read.

    Attributes:
        factors: as ``lora.init`` makes them.
        scale: what their product is multiplied by.
        head: the trained leaves of the head, or ``{}``.
        settings: the contents of ``adapter_config.json``.
    """

    factors: Params
    scale: float
    head: Params
    settings: dict[str, Any]


def write(
    folder: str | os.PathLike[str],
    config: Config,
    factors: Params,
    scale: float,
    *,
    head: Params | None = None,
    base: str = "",
) -> Path:
    """Write an adapter that PEFT loads onto the same model in transformers.

    Args:
        folder: where the two files go; made if missing.
        config: the model.
        factors: as ``lora.init`` makes them.
        scale: what their product is multiplied by; written as ``lora_alpha = scale * r``.
        head: the head, if it was trained too. Of BERT's, the pooler (``dense``) belongs to the
            body, which PEFT does not save: freeze it, and leave it out here.
        base: name or folder of the model that is adapted, for PEFT to find it.

    Returns:
        The folder.

    Raises:
        ValueError: factors of several ranks, or of a layer that a checkpoint does not have; a leaf
            of the head that is missing, or that PEFT would not save.

    Example:
        >>> import tempfile
        >>> from jmeta.models import gpt2
        >>> config = gpt2.GPT2Config(vocab=11, width=8, layers=2, heads=2, max_len=5)
        >>> params = gpt2.init(config, jax.random.key(0))
        >>> factors = lora.init(params, jax.random.key(1), rank=2)
        >>> again = read(write(tempfile.mkdtemp(), config, factors, 4.0), config)
        >>> again.scale, sorted(again.settings["target_modules"])
        (4.0, ['attn.c_attn'])
    """
    folder = Path(folder)
    known = {t.path.removesuffix(".kernel"): t for t in names.tensors(config)}
    pairs = _pairs(factors)
    for path in pairs:
        if path not in known or not (path.startswith("blocks.") and known[path].stacked):
            raise ValueError(f"the factors of {path!r} have no place in a checkpoint of {config}")
    ranks = {pair["a"].shape[-1] for pair in pairs.values()}
    if len(ranks) != 1:
        raise ValueError(f"factors have the ranks {sorted(ranks)}; an adapter has one")
    rank = ranks.pop()
    tensors: dict[str, Lazy] = {}
    for path, pair in pairs.items():
        module = names.full_name(config, known[path]).removesuffix(".weight")
        for factor, name in (("a", "lora_A"), ("b", "lora_B")):
            for i in range(config.layers):
                tensors[f"{_BEFORE}{module.format(i)}.{name}.weight"] = _transposed(pair[factor], i)
    saved = _head_tensors(config) if head else []
    held = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path({"head": head or {}})}
    if left := sorted(set(held) - {tensor.path for tensor in saved}):
        raise ValueError(
            f"PEFT does not save {', '.join(left)} with the head of a {names.kind(config)}: where "
            "that is trained, write the whole model with to_pretrained; else leave it out of head="
        )
    for tensor in saved:
        leaf = held.get(tensor.path)
        if leaf is None:
            raise ValueError(f"the head has no leaf {tensor.path!r}")
        kept = Lazy(leaf.shape, str(leaf.dtype), lambda leaf=leaf: np.asarray(leaf))
        name = _BEFORE + names.full_name(config, tensor)
        tensors[name] = _transposed(leaf, None) if tensor.transposed else kept
    settings = {
        "peft_type": "LORA",
        "task_type": _TASKS.get(config.head),
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scale * rank,
        "target_modules": _targets(config, list(pairs), known),
        "modules_to_save": sorted({t.name.split(".")[0] for t in saved}) or None,
        "fan_in_fan_out": names.kind(config) == "gpt2",
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    tensorfile.write(folder / WEIGHTS, tensors)
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    write_atomically(folder / SETTINGS, text)
    return folder


def read(source: str | os.PathLike[str], config: Config, *, dtype: Any = None) -> Adapter:
    """Read an adapter that PEFT or ``write`` made for this model.

    Args:
        source: a local folder, or the name of an adapter on the Hugging Face hub.
        config: the model that is adapted.
        dtype: of the factors; None: as stored.

    Returns:
        An ``Adapter``; ``lora_dropout`` is its writer's affair and does nothing here.

    Raises:
        FileNotFoundError: there are no such files.
        ValueError: another kind of adapter, a tensor that is missing or misshapen, or one that
            belongs nowhere; the message names it.
    """
    needed = [SETTINGS, WEIGHTS]
    folder = local_folder(source, needed, lambda at: all((at / name).is_file() for name in needed))
    for name in needed:
        if not (folder / name).is_file():
            pickle = (folder / "adapter_model.bin").exists() and name == WEIGHTS
            hint = "; the pickle adapter_model.bin is not opened, save it again with PEFT"
            raise FileNotFoundError(f"{folder} holds no {name}{hint if pickle else ''}")
    settings = json_object(folder / SETTINGS)
    scale = _scale(settings)
    before = _BEFORE + (names.prefix(config) if config.head is not None else "")
    files = {
        name.removeprefix(before).removeprefix(_BEFORE): entry
        for name, entry in tensorfile.contents([folder / WEIGHTS]).items()
    }
    factors: Params = {}
    used: set[str] = set()
    shapes = _kernel_shapes(config)
    for tensor in names.tensors(config):
        if not tensor.stacked or not tensor.path.endswith(".kernel"):
            continue
        path, module = tensor.path.removesuffix(".kernel"), tensor.name.removesuffix(".weight")
        if not any(name.startswith(f"{module.format(0)}.lora_A") for name in files):
            continue
        rows, columns = shapes[tensor.path]
        rank = settings["r"]
        for factor, name, shape in (
            ("a", "lora_A", (rank, rows)),
            ("b", "lora_B", (columns, rank)),
        ):
            entries = [f"{module.format(i)}.{name}.weight" for i in range(config.layers)]
            read = [_take(files, entry, shape, folder) for entry in entries]
            used.update(entries)
            stack = jnp.asarray(np.stack([piece.T for piece in read]))
            put(factors, f"{path}.{factor}", stack if dtype is None else stack.astype(dtype))
    head: Params = {}
    for tensor in _head_tensors(config):
        if tensor.name in files:
            used.add(tensor.name)
            piece = tensorfile.read(files[tensor.name])
            leaf = jnp.asarray(np.ascontiguousarray(piece.T if tensor.transposed else piece))
            path = tensor.path.removeprefix("head.")
            put(head, path, leaf if dtype is None else leaf.astype(dtype))
    for name in files:
        if name not in used:
            entry = files[name]
            raise ValueError(
                f"{entry.file}: tensor {entry.name!r} of shape {list(entry.shape)} belongs to no "
                f"layer of this {names.kind(config)} with {config.layers} layers and head "
                f"{config.head!r}"
            )
    return Adapter(factors, scale, head, settings)


def _scale(settings: Mapping[str, Any]) -> float:
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{SETTINGS} has peft_type={settings.get('peft_type')!r}, not 'LORA'")
    if settings.get("bias", "none") != "none":
        raise ValueError(f"{SETTINGS} has bias={settings['bias']!r}; jmeta reads bias='none'")
    for name in _REFUSED:
        if settings.get(name):
            raise ValueError(f"{SETTINGS} has {name}={settings[name]!r}, which jmeta does not do")
    if (begun := settings.get("init_lora_weights")) not in _BEGINNINGS:
        raise ValueError(
            f"{SETTINGS} has init_lora_weights={begun!r}, which changes the model's own weights; "
            "PEFT's save_pretrained(path_initial_model_for_weight_conversion=...) makes a plain "
            "adapter of it"
        )
    rank = settings.get("r")
    if type(rank) is not int or rank < 1 or not isinstance(settings.get("lora_alpha"), int | float):
        raise ValueError(
            f"{SETTINGS} has r={rank!r} and lora_alpha={settings.get('lora_alpha')!r}, no numbers"
        )
    return settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)


def _pairs(factors: Any, path: str = "") -> dict[str, Params]:
    if lora.is_pair(factors):
        return {path: factors}
    found: dict[str, Params] = {}
    for name, below in factors.items():
        found |= _pairs(below, f"{path}.{name}" if path else name)
    return found


def _targets(config: Config, paths: list[str], known: Mapping[str, Tensor]) -> Any:
    """The modules as a list of suffixes, or a pattern where a suffix would name others too."""
    modules = {
        path: re.sub(r"^.*\{\}\.", "", tensor.name).removesuffix(".weight")
        for path, tensor in known.items()
        if tensor.stacked
    }
    chosen = [modules[path] for path in paths]
    others = [module for path, module in modules.items() if path not in paths]
    if not any(o.endswith("." + c) for o in others for c in chosen):
        return sorted(chosen)
    whole = [known[p].name.removesuffix(".weight") for p in paths]
    return "|".join(rf"(.*\.)?{re.escape(n).replace(re.escape('{}'), r'[0-9]+')}" for n in whole)


def _head_tensors(config: Config) -> list[Tensor]:
    """The head's tensors without BERT's pooler, which PEFT counts as part of the body."""
    return [t for t in names.head_tensors(config) if not t.name.startswith("pooler.")]


def _kernel_shapes(config: Config) -> dict[str, tuple[int, int]]:
    shapes = jax.eval_shape(lambda: model(config).init(config, jax.random.key(0)))
    return {
        path_name(path): leaf.shape[1:]
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
        if leaf.ndim == 3
    }


def _take(
    files: Mapping[str, Stored], name: str, shape: tuple[int, int], folder: Path
) -> np.ndarray:
    entry = files.get(name)
    if entry is None:
        raise ValueError(f"{folder / WEIGHTS} has no tensor {name!r} of shape {list(shape)}")
    if entry.shape != shape:
        raise ValueError(
            f"{entry.file}: tensor {entry.name!r} has shape {list(entry.shape)}, but the model and "
            f"r={min(shape)} mean {list(shape)}"
        )
    return tensorfile.read(entry)


def _transposed(leaf: Any, layer: int | None) -> Lazy:
    shape = leaf.shape if layer is None else leaf.shape[1:]

    def make() -> np.ndarray:
        return (np.asarray(leaf) if layer is None else np.asarray(leaf)[layer]).T

    return Lazy(shape[::-1], str(leaf.dtype), make)
