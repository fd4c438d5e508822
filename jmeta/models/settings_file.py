"""``config.json`` of BERT, RoBERTa, DistilBERT and GPT-2 as a config, and back.

Settings that mean the same are the same here, whatever their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from jmeta.models import bert, gpt2
from jmeta.models.names import Config, Head, kind

_MODEL = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert", "gpt2": "GPT2"}
_SUFFIX: dict[Head, str] = {
    None: "Model",
    "masked_lm": "ForMaskedLM",
    "causal_lm": "LMHeadModel",
    "classify": "ForSequenceClassification",
    "spans": "ForQuestionAnswering",
}
_COUNTS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "dim", "n_layers", "n_heads", "hidden_dim", "n_embd", "n_layer",
    "n_head", "n_positions", "num_labels",
)  # fmt: skip
_GELU = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


def read_settings(
    settings: Mapping[str, Any], head: Head | Literal["saved", "none"] = "saved"
) -> Config:
    """A config from the contents of ``config.json``.

    Args:
        settings: the parsed file.
        head: the head wanted; ``"saved"``: the one that the file names.

    Returns:
        A ``BertConfig`` or a ``GPT2Config``.

    Raises:
        ValueError: an architecture or a variant of one that jmeta does not have.

    Example:
        >>> config = read_settings({"model_type": "bert", "vocab_size": 30522, "hidden_size": 384,
        ...     "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536})
        >>> config.layers, config.head, config.max_len
        (6, None, 512)
    """
    model = settings.get("model_type")
    if model not in _MODEL:
        raise ValueError(
            f"config.json has model_type={model!r}; jmeta has {', '.join(map(repr, _MODEL))}"
        )
    for name, refused in {
        "is_decoder": True,
        "add_cross_attention": True,
        "scale_attn_by_inverse_layer_idx": True,
        "scale_attn_weights": False,
    }.items():
        if settings.get(name) is refused:
            raise ValueError(f"config.json has {name}={refused}, which jmeta's {model} does not do")
    if settings.get("quantization_config"):
        raise ValueError("config.json has a quantization_config; jmeta reads plain weights")
    if settings.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(
            f"config.json has position_embedding_type={settings['position_embedding_type']!r}; "
            "jmeta has absolute positions only"
        )
    chosen = _saved_head(model, settings) if head == "saved" else None if head == "none" else head
    if chosen == ("masked_lm" if model == "gpt2" else "causal_lm"):
        raise ValueError(f"{model} has no head {chosen!r}")
    if chosen in ("masked_lm", "causal_lm") and settings.get("tie_word_embeddings") is False:
        raise ValueError(
            "config.json has tie_word_embeddings=False; jmeta's decoder is the transposed embedding"
        )
    for name in _COUNTS:
        if type(value := settings.get(name, 1)) is not int or value < 1:
            raise ValueError(f"config.json has {name}={value!r}, which is no number above 0")
    named = settings.get("id2label")
    labels = settings.get("num_labels", 2 if named is None else len(named))
    read = {"gpt2": _read_gpt2, "distilbert": _read_distilbert}.get(model, _read_bert)
    return read(settings, chosen, labels)


def write_settings(config: Config) -> dict[str, Any]:
    """The contents of a ``config.json`` from which transformers builds the same model.

    Args:
        config: the model.

    Returns:
        A dict for JSON.

    Example:
        >>> config = gpt2.GPT2Config(vocab=11, width=8, layers=2, heads=2, max_len=5)
        >>> read_settings(write_settings(config)) == config._replace(ff=32)
        True
    """
    model = kind(config)
    shared = {
        "model_type": model,
        "architectures": [_MODEL[model] + _SUFFIX[config.head]],
        "vocab_size": config.vocab,
        "pad_token_id": config.pad_id,
        "tie_word_embeddings": True,
    }
    if config.head == "classify":
        shared["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.labels)}
        shared["label2id"] = {f"LABEL_{i}": i for i in range(config.labels)}
    ff = config.ff or 4 * config.width
    if isinstance(config, gpt2.GPT2Config):
        return shared | {
            "n_embd": config.width,
            "n_layer": config.layers,
            "n_head": config.heads,
            "n_positions": config.max_len,
            "n_inner": ff,
            "activation_function": "gelu_new" if config.gelu == "tanh" else "gelu",
            "embd_pdrop": config.dropout,
            "resid_pdrop": config.dropout,
            "attn_pdrop": config.attention_dropout,
            "layer_norm_epsilon": config.eps,
        }
    activation = "gelu" if config.gelu == "exact" else "gelu_new"
    if model != "distilbert" and not config.types:
        raise ValueError(f"a checkpoint of {model} has a segment embedding; the config has types=0")
    if model == "distilbert":
        if config.eps != 1e-12:
            raise ValueError(f"DistilBERT normalises with eps=1e-12, the config has {config.eps}")
        return shared | {
            "dim": config.width,
            "n_layers": config.layers,
            "n_heads": config.heads,
            "max_position_embeddings": config.max_len,
            "hidden_dim": ff,
            "activation": activation,
            "dropout": config.dropout,
            "attention_dropout": config.attention_dropout,
            "seq_classif_dropout": config.head_dropout,
        }
    return shared | {
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.max_len + bert.first_position(config),
        "intermediate_size": ff,
        "type_vocab_size": config.types,
        "hidden_act": activation,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "classifier_dropout": config.head_dropout,
        "layer_norm_eps": config.eps,
    }


def _saved_head(model: str, settings: Mapping[str, Any]) -> Head:
    named = (settings.get("architectures") or [f"{_MODEL[model]}Model"])[0]
    if named == "BertForPreTraining":
        return "masked_lm"
    for head, suffix in _SUFFIX.items():
        if named == _MODEL[model] + suffix:
            return head
    raise ValueError(
        f"config.json names the architecture {named}, whose head jmeta does not have; say which "
        'head you want, or head="none" for the body alone'
    )


def _activation(name: str) -> Any:
    if name not in _GELU:
        raise ValueError(f"config.json has the activation {name!r}; jmeta has {sorted(_GELU)}")
    return _GELU[name]


def _read_bert(settings: Mapping[str, Any], head: Any, labels: int) -> bert.BertConfig:
    model = settings["model_type"]
    pad = settings.get("pad_token_id", 1 if model == "roberta" else 0)
    if pad is None:
        if model == "roberta":
            raise ValueError("config.json has no pad_token_id, from which RoBERTa counts positions")
        pad = 0
    dropout = settings.get("hidden_dropout_prob", 0.1)
    last = settings.get("classifier_dropout")
    return bert.BertConfig(
        vocab=settings.get("vocab_size", 50265 if model == "roberta" else 30522),
        width=settings.get("hidden_size", 768),
        layers=settings.get("num_hidden_layers", 12),
        heads=settings.get("num_attention_heads", 12),
        max_len=settings.get("max_position_embeddings", 512)
        - (pad + 1 if model == "roberta" else 0),
        ff=settings.get("intermediate_size", 3072),
        kind=model,
        types=settings.get("type_vocab_size", 2),
        head=head,
        labels=labels,
        pad_id=pad,
        dropout=dropout,
        attention_dropout=settings.get("attention_probs_dropout_prob", 0.1),
        head_dropout=dropout if last is None else last,
        gelu=_activation(settings.get("hidden_act", "gelu")),
        eps=settings.get("layer_norm_eps", 1e-12),
    )


def _read_distilbert(settings: Mapping[str, Any], head: Any, labels: int) -> bert.BertConfig:
    return bert.BertConfig(
        vocab=settings.get("vocab_size", 30522),
        width=settings.get("dim", 768),
        layers=settings.get("n_layers", 6),
        heads=settings.get("n_heads", 12),
        max_len=settings.get("max_position_embeddings", 512),
        ff=settings.get("hidden_dim", 3072),
        kind="distilbert",
        types=0,
        head=head,
        labels=labels,
        pad_id=settings.get("pad_token_id") or 0,
        dropout=settings.get("dropout", 0.1),
        attention_dropout=settings.get("attention_dropout", 0.1),
        head_dropout=settings.get("seq_classif_dropout", 0.2),
        gelu=_activation(settings.get("activation", "gelu")),
    )


def _read_gpt2(settings: Mapping[str, Any], head: Any, labels: int) -> gpt2.GPT2Config:
    rates = {settings.get(name, 0.1) for name in ("resid_pdrop", "embd_pdrop")}
    if len(rates) > 1:
        raise ValueError(f"config.json has resid_pdrop and embd_pdrop of {rates}; jmeta has one")
    width = settings.get("n_embd", 768)
    return gpt2.GPT2Config(
        vocab=settings.get("vocab_size", 50257),
        width=width,
        layers=settings.get("n_layer", 12),
        heads=settings.get("n_head", 12),
        max_len=settings.get("n_positions", 1024),
        ff=settings.get("n_inner") or 4 * width,
        head=head,
        labels=labels,
        pad_id=settings.get("pad_token_id"),
        dropout=rates.pop(),
        attention_dropout=settings.get("attn_pdrop", 0.1),
        gelu=_activation(settings.get("activation_function", "gelu_new")),
        eps=settings.get("layer_norm_epsilon", 1e-5),
    )
