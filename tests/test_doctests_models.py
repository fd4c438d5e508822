"""Every Example in a docstring of jmeta.models runs as it is printed."""

import pytest
from test_doctests import ELSEWHERE, cases, check, defaults  # noqa: F401  (a fixture)


@pytest.mark.parametrize("name", cases(ELSEWHERE))
def test_doctests(name):
    check(name)
