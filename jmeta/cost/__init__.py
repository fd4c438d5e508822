"""What a meta-gradient costs: measured here, or compiled for machines that are not there.

``table`` runs estimators on a problem of yours; ``plan`` compiles the sharded meta step for a TPU
topology without a TPU, and says what fits; ``collectives`` reads the communication of a program.
"""

from jmeta.cost.hlo import Collective, collectives, wire_bytes
from jmeta.cost.measured import (
    Cost,
    Program,
    compile_estimate,
    double,
    estimators,
    exact_reference,
    fast_bytes,
    flops,
    gradient_error,
    interleave,
    markdown,
    median,
    table,
)
from jmeta.cost.planner import plan
from jmeta.cost.rows import Candidate, Row, choose, plan_markdown
from jmeta.cost.shapes import Setting
from jmeta.cost.topology import TopologyError

__all__ = [
    "Candidate",
    "Collective",
    "Cost",
    "Program",
    "Row",
    "Setting",
    "TopologyError",
    "choose",
    "collectives",
    "compile_estimate",
    "double",
    "estimators",
    "exact_reference",
    "fast_bytes",
    "flops",
    "gradient_error",
    "interleave",
    "markdown",
    "median",
    "plan",
    "plan_markdown",
    "table",
    "wire_bytes",
]
