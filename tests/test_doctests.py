"""Every Example in a public docstring runs as it is printed: all but jmeta.models'."""

import doctest
import importlib
import pkgutil

import jax
import pytest

import jmeta

MODULES = [
    m.name for m in pkgutil.walk_packages(jmeta.__path__, "jmeta.") if "__main__" not in m.name
]
# A file is one worker's, and these are half of the time: test_doctests_models.py runs them.
ELSEWHERE = [name for name in MODULES if name.startswith("jmeta.models")]
# Their examples compile a network or two: half of the time of all.
LONG = {
    "jmeta.methods.aloe",
    "jmeta.methods.fast_weights",
    "jmeta.methods.fast_weights_stream",
    "jmeta.methods.token_weights",
    "jmeta.models.bert",
    "jmeta.models.cached",
    "jmeta.models.conv",
    "jmeta.models.masked_lm",
    "jmeta.models.nplm",
    "jmeta.models.pretraining",
    "jmeta.tasks.objectives",
    "jmeta.testing",
}


@pytest.fixture(autouse=True)
def defaults():
    """What a user's interpreter has: jax's own promotion, float32."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def cases(names):
    return [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in names]


@pytest.mark.parametrize("name", cases(["jmeta", *(n for n in MODULES if n not in ELSEWHERE)]))
def test_doctests(name):
    check(name)


def check(name):
    result = doctest.testmod(importlib.import_module(name), report=True)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples of {name} failed"
