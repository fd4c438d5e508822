"""What a config says about the blocks of a transformer, and what is refused before any runs."""

from __future__ import annotations

from typing import Any, Protocol

from jmeta.core.types import Array

_CHOICES = {
    "loop": (None, "scan", "unroll"),
    "remat": ("none", "dots", "hidden", "full"),
    "attention": ("xla", "fused"),
    "gelu": ("tanh", "exact"),
}


class BlockConfig(Protocol):
    """What a config says about its blocks; ``TransformerConfig`` explains each field."""

    @property
    def width(self) -> int: ...  # noqa: D102
    @property
    def layers(self) -> int: ...  # noqa: D102
    @property
    def heads(self) -> int: ...  # noqa: D102
    @property
    def loop(self) -> str | None: ...  # noqa: D102
    @property
    def remat(self) -> str: ...  # noqa: D102
    @property
    def attention(self) -> str: ...  # noqa: D102
    @property
    def gelu(self) -> str: ...  # noqa: D102
    @property
    def dropout(self) -> float: ...  # noqa: D102
    @property
    def attention_dropout(self) -> float: ...  # noqa: D102
    @property
    def eps(self) -> float: ...  # noqa: D102
    @property
    def dtype(self) -> Any: ...  # noqa: D102


def check(config: BlockConfig) -> None:
    """Refuse a config with a field that has no meaning.

    Args:
        config: any config of blocks.

    Raises:
        ValueError: a choice that does not exist, heads that do not divide the width, or a rate
            outside [0, 1).
    """
    for name, allowed in _CHOICES.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name}={getattr(config, name)!r}; choose one of {allowed}")
    if config.width % config.heads:
        raise ValueError(f"width {config.width} is not a multiple of heads {config.heads}")
    for name in ("dropout", "attention_dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} is not in [0, 1)")
    if config.attention == "fused" and config.attention_dropout:
        raise ValueError('attention="fused" has no dropout inside; set attention_dropout=0')


def check_length(shape: tuple[int, ...], mask: Array | None, max_len: int) -> None:
    """Refuse a sequence longer than the model, or a mask of another shape.

    Args:
        shape: of the tokens, ``[..., time]``.
        mask: ``[..., time]`` or None.
        max_len: the longest sequence accepted.

    Raises:
        ValueError: either of them.
    """
    if shape[-1] > max_len:
        raise ValueError(f"{shape[-1]} tokens, but the model has max_len={max_len} positions")
    if mask is not None and mask.shape != shape:
        raise ValueError(f"mask has shape {mask.shape}, tokens {shape}")
