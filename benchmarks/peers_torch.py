"""Meta-gradients of ``benchmarks.peers`` in PyTorch: by hand, torch.func, higher and torchopt.

The networks are PyTorch's own operations in its own layout; ``flat`` turns kernels back. Only
under ``torch.func.vmap`` batch norm is written out: PyTorch's own is twice differentiated wrongly.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.peers_problems import Given

ROWS = ("torch.autograd", "torch.func", "higher", "torchopt")
NEEDS = {"higher": "higher", "torchopt": "torchopt"}  # rows -> the package beside torch

Params = dict[str, Any]


def build(made: Given, row: str, dtype: str) -> Callable[[], Params]:
    """Prepare one row.

    Args:
        made: the problem.
        row: one of ``ROWS``.
        dtype: ``float32`` or ``float64``.

    Returns:
        A function that runs one meta-gradient to its end.
    """
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(os.cpu_count())
    kind = getattr(torch, dtype)

    def tensor(name: str, array: np.ndarray) -> Any:
        made_of = torch.from_numpy(np.ascontiguousarray(_to_torch(name, array)))
        return made_of.to(kind) if array.dtype.kind == "f" else made_of.long()

    params = {n: tensor(n, a).requires_grad_() for n, a in made.params.items()}
    support, query = (
        {n: tensor("images" if n == "x" else n, a) for n, a in part.items()}
        for part in (made.support, made.query)
    )
    mapped = row == "torch.func" and made.tasks > 1
    loss = _loss(torch, made, _batch_norm(torch, written_out=mapped))
    make = {"torch.autograd": _autograd, "torch.func": _func, "higher": _higher,
            "torchopt": _torchopt}[row]  # fmt: skip
    return make(torch, made, loss, params, support, query)


def flat(grads: Params) -> dict[str, np.ndarray]:
    """A gradient as NumPy, in jmeta's layout."""
    return {name: _from_torch(name, g.detach().numpy()) for name, g in grads.items()}


def _to_torch(name: str, array: np.ndarray) -> np.ndarray:
    if name.startswith("block") and array.ndim == 4:  # a 3x3 kernel: HWIO to OIHW
        return array.transpose(3, 2, 0, 1)
    if name == "images" and array.ndim == 5:  # [tasks, n, H, W, C] to [tasks, n, C, H, W]
        return array.transpose(0, 1, 4, 2, 3)
    return array


def _from_torch(name: str, array: np.ndarray) -> np.ndarray:
    if name.startswith("block") and array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array


def _batch_norm(torch: Any, written_out: bool) -> Callable[[Any, Any, Any], Any]:
    """By the batch's own statistics, as all frameworks here do it."""

    def by_hand(x: Any, scale: Any, bias: Any) -> Any:
        centred = x - x.mean((0, 2, 3), keepdim=True)
        variance = (centred * centred).mean((0, 2, 3), keepdim=True)
        gain = torch.rsqrt(variance + 1e-5) * scale[:, None, None]
        return centred * gain + bias[:, None, None]

    def built_in(x: Any, scale: Any, bias: Any) -> Any:
        return torch.nn.functional.batch_norm(x, None, None, scale, bias, training=True)

    return by_hand if written_out else built_in


def _loss(torch: Any, made: Given, batch_norm: Any) -> Callable[[Params, Params], Any]:
    functional = torch.nn.functional

    def sinusoid(p: Params, batch: Params) -> Any:
        x = batch["x"]
        for i in range(3):
            x = x @ p[f"layer{i}/kernel"] + p[f"layer{i}/bias"]
            x = torch.relu(x) if i < 2 else x
        return functional.mse_loss(x, batch["y"])

    def omniglot(p: Params, batch: Params) -> Any:
        x = batch["x"]
        for i in range(4):
            x = functional.conv2d(x, p[f"block{i}/kernel"], padding=1)
            x = batch_norm(x, p[f"block{i}/scale"], p[f"block{i}/bias"])
            x = functional.max_pool2d(torch.relu(x), 2)
        logits = x.flatten(1) @ p["head/kernel"] + p["head/bias"]
        return functional.cross_entropy(logits, batch["y"])

    def norm(x: Any, p: Params, name: str, layer: int | None = None) -> Any:
        scale, bias = p[f"{name}/scale"], p[f"{name}/bias"]
        if layer is not None:
            scale, bias = scale[layer], bias[layer]
        return functional.layer_norm(x, x.shape[-1:], scale, bias)

    def decoder(p: Params, batch: Params) -> Any:
        tokens = batch["x"]
        n, time = tokens.shape
        x = functional.embedding(tokens, p["embed/tokens"]) + p["embed/positions"][:time]
        width = x.shape[-1]
        hidden = torch.triu(torch.ones(time, time, dtype=torch.bool), 1)
        for i in range(len(p["blocks/attn/qkv"])):
            joined = norm(x, p, "blocks/ln1", i) @ p["blocks/attn/qkv"][i]
            q, k, v = joined.view(n, time, 3, made.heads, -1).permute(2, 0, 3, 1, 4)
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            mixed = (weights @ v).transpose(1, 2).reshape(n, time, width)
            x = x + mixed @ p["blocks/attn/out"][i]
            up = norm(x, p, "blocks/ln2", i) @ p["blocks/mlp/up"][i]
            x = x + functional.gelu(up, approximate="tanh") @ p["blocks/mlp/down"][i]
        states = norm(x, p, "ln_f")[:, :-1].reshape(-1, width)
        return functional.cross_entropy(states @ p["embed/tokens"].T, tokens[:, 1:].reshape(-1))

    return {"sinusoid": sinusoid, "omniglot": omniglot, "decoder": decoder}[made.kind]


def _task(part: Params, index: int) -> Params:
    return {name: array[index] for name, array in part.items()}


def _mean(params: Params, tasks: int, one: Callable[[int], Any]) -> Params:
    """The mean over tasks, whose graphs do not outlive them."""
    total = None
    for index in range(tasks):
        grads = one(index)
        total = grads if total is None else [t + g for t, g in zip(total, grads, strict=True)]
    assert total is not None
    return {name: t / tasks for name, t in zip(params, total, strict=True)}


def _autograd(torch: Any, made: Given, loss: Any, params: Params, support: Any, query: Any) -> Any:
    """By hand: ``torch.autograd.grad(create_graph=True)``, a Python loop over tasks."""

    def one(index: int) -> Any:
        fast = dict(params)
        for _ in range(made.steps):
            value = loss(fast, _task(support, index))
            grads = torch.autograd.grad(value, list(fast.values()), create_graph=True)
            fast = {n: p - made.rate * g for (n, p), g in zip(fast.items(), grads, strict=True)}
        return torch.autograd.grad(loss(fast, _task(query, index)), list(params.values()))

    return lambda: _mean(params, made.tasks, one)


def _func(torch: Any, made: Given, loss: Any, params: Params, support: Any, query: Any) -> Any:
    """``torch.func.grad`` of a function that trains, tasks by ``torch.func.vmap``."""
    frozen = {name: p.detach() for name, p in params.items()}

    def outer(p: Params, support: Params, query: Params) -> Any:
        for _ in range(made.steps):
            grads = torch.func.grad(loss)(p, support)
            p = {name: p[name] - made.rate * grads[name] for name in p}
        return loss(p, query)

    if made.tasks == 1:
        alone = _task(support, 0), _task(query, 0)
        return lambda: torch.func.grad(outer)(frozen, *alone)
    over_tasks = torch.func.vmap(outer, in_dims=(None, 0, 0))
    mean = torch.func.grad(lambda p: over_tasks(p, support, query).mean())
    return lambda: mean(frozen)


def _module(torch: Any, params: Params, loss: Any) -> Any:
    """The parameters as a module, whose output is the loss of a batch."""

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, p in params.items():
                self.register_parameter(name.replace("/", "_"), torch.nn.Parameter(p.detach()))

        def forward(self, batch: Params) -> Any:
            return loss({name: getattr(self, name.replace("/", "_")) for name in params}, batch)

    return Network()


def _higher(torch: Any, made: Given, loss: Any, params: Params, support: Any, query: Any) -> Any:
    """``higher.innerloop_ctx``, as its examples use it."""
    higher: Any = importlib.import_module("higher")
    network = _module(torch, params, loss)
    optimizer = torch.optim.SGD(network.parameters(), lr=made.rate)

    def one(index: int) -> Any:
        with higher.innerloop_ctx(network, optimizer, copy_initial_weights=False) as (fast, inner):
            for _ in range(made.steps):
                inner.step(fast(_task(support, index)))
            return torch.autograd.grad(fast(_task(query, index)), list(network.parameters()))

    return lambda: _mean(params, made.tasks, one)


def _torchopt(torch: Any, made: Given, loss: Any, params: Params, support: Any, query: Any) -> Any:
    """``torchopt.MetaSGD``, as its example of MAML uses it."""
    torchopt: Any = importlib.import_module("torchopt")
    network = _module(torch, params, loss)
    optimizer = torchopt.MetaSGD(network, lr=made.rate)
    start = list(network.parameters())
    weights = torchopt.extract_state_dict(network, by="reference", detach_buffers=True)
    state = torchopt.extract_state_dict(optimizer, by="reference")

    def one(index: int) -> Any:
        for _ in range(made.steps):
            optimizer.step(network(_task(support, index)))
        grads = torch.autograd.grad(network(_task(query, index)), start)
        torchopt.recover_state_dict(network, weights)
        torchopt.recover_state_dict(optimizer, state)
        return grads

    return lambda: _mean(params, made.tasks, one)
