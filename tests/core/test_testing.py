"""The helpers that every numerical test leans on."""

import math

import numpy as np
import pytest

from jmeta.testing import central_differences, relative_error


@pytest.mark.parametrize("leaf", ["a", "b", "c"])
def test_a_nan_in_any_leaf_is_no_small_error(leaf):
    expected = {name: np.ones(2, np.float32) for name in "abc"}
    assert relative_error(expected, expected) == 0
    assert math.isnan(relative_error({**expected, leaf: np.asarray([1.0, np.nan])}, expected))


def test_an_error_is_relative_to_the_largest_entry_of_all_leaves():
    expected = {"a": np.asarray([1.0, -4.0], np.float32), "b": np.asarray(2.0, np.float32)}
    assert relative_error({**expected, "b": np.asarray(3.0, np.float32)}, expected) == 0.25


def test_central_differences_are_exact_for_a_quadratic(x64):
    at = {"x": np.asarray([0.5, -1.5]), "y": np.asarray(2.0)}
    found = central_differences(lambda p: p["x"][0] * p["y"] + p["x"][1] ** 2, at)
    np.testing.assert_allclose(found["x"], [2.0, -3.0], rtol=1e-9)
    np.testing.assert_allclose(found["y"], 0.5, rtol=1e-9)
