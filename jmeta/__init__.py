"""jmeta: functional meta-learning for JAX, with exact second-order meta-gradients.

A ``Problem`` (two losses, a start, an optimizer) goes into an estimator, which gives a
``MetaGradient``; ``meta_trainer`` follows it.
"""

import importlib
from typing import Any

from jmeta import cost, methods
from jmeta.core import optim
from jmeta.core.autodiff import mixed_mode_grad, reverse_grad, stopped_grad
from jmeta.core.checks import NotDifferentiableError, check
from jmeta.core.estimators.evolution import evolution
from jmeta.core.estimators.forward import forward
from jmeta.core.estimators.implicit import cg, identity, implicit, neumann, proximal
from jmeta.core.estimators.reptile import reptile
from jmeta.core.estimators.unrolled import first_order, mixed_mode, truncated, unrolled
from jmeta.core.inner import final, inner_loop, multi_step, online, start
from jmeta.core.kept import keep_products
from jmeta.core.over_tasks import over_tasks
from jmeta.core.tree import merge, partition
from jmeta.core.types import Episode, Info, MetaGradient, Problem, Steps
from jmeta.cost.choosing import auto
from jmeta.runtime.evaluate import adapt, evaluate
from jmeta.runtime.train import meta_trainer, stages

__version__ = "0.1.0"

__all__ = [
    "Episode",
    "Info",
    "MetaGradient",
    "NotDifferentiableError",
    "Problem",
    "Steps",
    "adapt",
    "auto",
    "cg",
    "check",
    "cost",
    "evaluate",
    "evolution",
    "final",
    "first_order",
    "forward",
    "identity",
    "implicit",
    "inner_loop",
    "keep_products",
    "merge",
    "meta_trainer",
    "methods",
    "mixed_mode",
    "mixed_mode_grad",
    "multi_step",
    "neumann",
    "online",
    "optim",
    "over_tasks",
    "partition",
    "proximal",
    "reptile",
    "reverse_grad",
    "stages",
    "start",
    "stopped_grad",
    "truncated",
    "unrolled",
]


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `import jmeta` costs no more than jax and optax.
    if name in ("data", "models", "runtime", "tasks", "testing"):
        return importlib.import_module(f"jmeta.{name}")
    raise AttributeError(f"module 'jmeta' has no attribute {name!r}")
