"""Every Example in a public docstring runs as it is printed."""

import doctest
import importlib
import pkgutil

import jax
import pytest

import jmeta

MODULES = [
    m.name for m in pkgutil.walk_packages(jmeta.__path__, "jmeta.") if "__main__" not in m.name
]


@pytest.fixture(autouse=True)
def defaults():
    """What a user's interpreter has: jax's own promotion, float32."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", ["jmeta", *MODULES])
def test_doctests(name):
    result = doctest.testmod(importlib.import_module(name), report=True)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples of {name} failed"
