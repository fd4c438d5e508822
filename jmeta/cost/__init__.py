"""What a meta-gradient costs: measured here, or compiled for machines that are not there.

``table`` runs estimators on a problem of yours; ``plan`` compiles the sharded meta step for a TPU
topology without a TPU, and says what fits; ``collectives`` reads the communication of a program.
``fastest`` finds the quickest exact estimator that fits a memory, and ``auto`` is that estimator.
"""

from jmeta.cost.choice import Choice, explain, in_words
from jmeta.cost.choosing import DoesNotFitError, auto, fastest
from jmeta.cost.compiled import Program, compile_program, flops
from jmeta.cost.hlo import Collective, collectives, wire_bytes
from jmeta.cost.measured import (
    Cost,
    compile_estimate,
    double,
    estimators,
    exact_reference,
    fast_bytes,
    gradient_error,
    interleave,
    markdown,
    median,
    table,
    turn,
)
from jmeta.cost.planner import plan
from jmeta.cost.rows import Candidate, Row, choose, plan_markdown
from jmeta.cost.shapes import Setting
from jmeta.cost.topology import TopologyError
from jmeta.cost.variants import Trial, Variant, build

__all__ = [
    "Candidate",
    "Choice",
    "Collective",
    "Cost",
    "DoesNotFitError",
    "Program",
    "Row",
    "Setting",
    "TopologyError",
    "Trial",
    "Variant",
    "auto",
    "build",
    "choose",
    "collectives",
    "compile_estimate",
    "compile_program",
    "double",
    "estimators",
    "exact_reference",
    "explain",
    "fast_bytes",
    "fastest",
    "flops",
    "gradient_error",
    "in_words",
    "interleave",
    "markdown",
    "median",
    "plan",
    "plan_markdown",
    "table",
    "turn",
    "wire_bytes",
]
