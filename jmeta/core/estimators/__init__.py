"""Estimators of the meta-gradient, all with one signature."""

from jmeta.core.estimators.evolution import evolution
from jmeta.core.estimators.forward import forward
from jmeta.core.estimators.implicit import cg, identity, implicit, neumann, proximal
from jmeta.core.estimators.reptile import reptile
from jmeta.core.estimators.unrolled import first_order, mixed_mode, truncated, unrolled

__all__ = [
    "cg",
    "evolution",
    "first_order",
    "forward",
    "identity",
    "implicit",
    "mixed_mode",
    "neumann",
    "proximal",
    "reptile",
    "truncated",
    "unrolled",
]
