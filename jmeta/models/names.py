"""What transformers calls each tensor of BERT, RoBERTa, DistilBERT and GPT-2.

Tensors that mean the same are the same here, whatever their names.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, TypeAlias

from jmeta.models import bert, gpt2

Config: TypeAlias = bert.BertConfig | gpt2.GPT2Config
Head: TypeAlias = Literal["masked_lm", "causal_lm", "classify", "spans"] | None

_PREFIX = {"bert": "bert.", "roberta": "roberta.", "distilbert": "distilbert."}


class Tensor(NamedTuple):
    """One leaf of the parameters in a checkpoint.

    Attributes:
        path: the leaf, dotted: ``blocks.attn.query.kernel``.
        name: the tensor; ``{}`` stands for the layer of a stacked leaf.
        transposed: whether it is stored as ``[out, in]``.
    """

    path: str
    name: str
    transposed: bool = False

    @property
    def stacked(self) -> bool:
        """Whether the leaf has a leading layer axis."""
        return "{}" in self.name


def kind(config: Config) -> str:
    """What ``config.json`` calls the architecture: ``model_type``."""
    return config.kind if isinstance(config, bert.BertConfig) else "gpt2"


def prefix(config: Config) -> str:
    """What stands before the body's tensors where there is a head."""
    return _PREFIX.get(kind(config), "transformer.")


def full_name(config: Config, tensor: Tensor) -> str:
    """A tensor's name in a checkpoint of this model, prefix and all.

    Args:
        config: the model.
        tensor: one of ``tensors(config)``.

    Returns:
        The name, with ``{}`` for the layer of a stacked leaf.

    Example:
        >>> config = gpt2.GPT2Config(vocab=11, width=8, layers=2, heads=2, max_len=5)
        >>> [full_name(config._replace(head=head), tensors(config)[0])
        ...  for head in (None, "causal_lm")]
        ['wte.weight', 'transformer.wte.weight']
    """
    body = not tensor.path.startswith("head.") or tensor.name.startswith("pooler.")
    return prefix(config) + tensor.name if body and config.head is not None else tensor.name


def tensors(config: Config) -> list[Tensor]:
    """The tensors of a model: body and head, without the body's prefix.

    Args:
        config: the model.

    Returns:
        One entry for each leaf of its parameters.

    Example:
        >>> config = gpt2.GPT2Config(vocab=11, width=8, layers=2, heads=2, max_len=5)
        >>> tensors(config)[0]
        Tensor(path='embed.tokens', name='wte.weight', transposed=False)
    """
    return [*_body(config), *head_tensors(config)]


def head_tensors(config: Config) -> list[Tensor]:
    """The tensors of a model's head.

    BERT's pooler belongs to its body, but it is the ``dense`` of its classifier.

    Args:
        config: the model.

    Returns:
        One entry for each leaf of ``params["head"]``.
    """
    model = kind(config)
    if config.head == "spans":
        return _linear("head.out", "qa_outputs")
    if model == "gpt2":
        if config.head != "classify":
            return []
        return [Tensor("head.out.kernel", "score.weight", True)]
    if config.head == "classify":
        dense, out = {
            "bert": ("pooler.dense", "classifier"),
            "roberta": ("classifier.dense", "classifier.out_proj"),
            "distilbert": ("pre_classifier", "classifier"),
        }[model]
        return [*_linear("head.dense", dense), *_linear("head.out", out)]
    if config.head == "masked_lm":
        dense, norm, bias = {
            "bert": (
                "cls.predictions.transform.dense",
                "cls.predictions.transform.LayerNorm",
                "cls.predictions.bias",
            ),
            "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
            "distilbert": ("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),
        }[model]
        return [*_linear("head.dense", dense), *_norm("head.ln", norm), Tensor("head.bias", bias)]
    return []


def pooler(config: Config) -> list[Tensor]:
    """The pooler that BERT's and RoBERTa's body may hold without a head; nothing here uses it."""
    if kind(config) not in ("bert", "roberta") or config.head is not None:
        return []
    return _linear("pooler", "pooler.dense")


def canonical(name: str) -> str:
    """A tensor's name as transformers writes it today: ``gamma`` and ``beta`` are older."""
    return re.sub(r"\.beta$", ".bias", re.sub(r"\.gamma$", ".weight", name))


def redundant(name: str) -> bool:
    """Whether a tensor says nothing: a buffer, or a decoder that is tied to the embedding."""
    return bool(
        re.search(r"(^|\.)(position_ids|token_type_ids|masked_bias)$", name)
        or re.search(r"(^|\.)h\.\d+\.attn\.bias$", name)  # GPT-2's causal mask
        or name
        in {
            "cls.predictions.decoder.weight",
            "cls.predictions.decoder.bias",
            "lm_head.decoder.weight",
            "lm_head.decoder.bias",
            "lm_head.weight",
            "vocab_projector.weight",
        }
    )


def of_a_head(name: str) -> bool:
    """Whether a tensor, without prefix, belongs to a head that transformers puts on a model."""
    heads = r"cls|lm_head|classifier|pre_classifier|qa_outputs|score|vocab_\w+"
    return bool(re.match(rf"({heads}|pooler)\.", name))


def _linear(path: str, name: str, transposed: bool = True) -> list[Tensor]:
    return [
        Tensor(f"{path}.kernel", f"{name}.weight", transposed),
        Tensor(f"{path}.bias", f"{name}.bias"),
    ]


def _norm(path: str, name: str) -> list[Tensor]:
    return [Tensor(f"{path}.scale", f"{name}.weight"), Tensor(f"{path}.bias", f"{name}.bias")]


def _body(config: Config) -> list[Tensor]:
    if isinstance(config, gpt2.GPT2Config):
        return [
            Tensor("embed.tokens", "wte.weight"),
            Tensor("embed.positions", "wpe.weight"),
            *_norm("blocks.ln1", "h.{}.ln_1"),
            *_linear("blocks.attn.qkv", "h.{}.attn.c_attn", False),
            *_linear("blocks.attn.out", "h.{}.attn.c_proj", False),
            *_norm("blocks.ln2", "h.{}.ln_2"),
            *_linear("blocks.mlp.up", "h.{}.mlp.c_fc", False),
            *_linear("blocks.mlp.down", "h.{}.mlp.c_proj", False),
            *_norm("ln_f", "ln_f"),
        ]
    layer, parts = _LAYERS["distilbert" if config.kind == "distilbert" else "bert"]
    types = [Tensor("embed.types", "embeddings.token_type_embeddings.weight")]
    return [
        Tensor("embed.tokens", "embeddings.word_embeddings.weight"),
        Tensor("embed.positions", "embeddings.position_embeddings.weight"),
        *(types if config.types else []),
        *_norm("embed.ln", "embeddings.LayerNorm"),
        *(
            tensor
            for path, name in parts.items()
            for tensor in (_norm if path.startswith("ln") else _linear)(
                f"blocks.{path}", f"{layer}.{name}"
            )
        ),
    ]


_LAYERS = {
    "bert": (
        "encoder.layer.{}",
        {
            "attn.query": "attention.self.query",
            "attn.key": "attention.self.key",
            "attn.value": "attention.self.value",
            "attn.out": "attention.output.dense",
            "ln1": "attention.output.LayerNorm",
            "mlp.up": "intermediate.dense",
            "mlp.down": "output.dense",
            "ln2": "output.LayerNorm",
        },
    ),
    "distilbert": (
        "transformer.layer.{}",
        {
            "attn.query": "attention.q_lin",
            "attn.key": "attention.k_lin",
            "attn.value": "attention.v_lin",
            "attn.out": "attention.out_lin",
            "ln1": "sa_layer_norm",
            "mlp.up": "ffn.lin1",
            "mlp.down": "ffn.lin2",
            "ln2": "output_layer_norm",
        },
    ),
}
