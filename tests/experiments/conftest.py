"""What experiments' tests share."""

import pytest


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder of caches that only this file's tests see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JMETA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
