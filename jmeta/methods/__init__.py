"""Published methods, one file each, named as their papers name them."""

from jmeta.methods.anil import anil, learned_body
from jmeta.methods.cavia import cavia, learned_context
from jmeta.methods.imaml import imaml, proximal_start
from jmeta.methods.maml import fomaml, learned_start, maml, reptile
from jmeta.methods.maml_plus_plus import annealed, maml_plus_plus, maml_plus_plus_init
from jmeta.methods.meta_sgd import learned_rates, meta_sgd, meta_sgd_init

__all__ = [
    "anil",
    "annealed",
    "cavia",
    "fomaml",
    "imaml",
    "learned_body",
    "learned_context",
    "learned_rates",
    "learned_start",
    "maml",
    "maml_plus_plus",
    "maml_plus_plus_init",
    "meta_sgd",
    "meta_sgd_init",
    "proximal_start",
    "reptile",
]
