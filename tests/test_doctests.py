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


@pytest.fixture(autouse=True)
def defaults():
    """What a user's interpreter has: jax's own promotion, float32."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", ["jmeta", *(name for name in MODULES if name not in ELSEWHERE)])
def test_doctests(name):
    check(name)


def check(name):
    result = doctest.testmod(importlib.import_module(name), report=True)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples of {name} failed"
