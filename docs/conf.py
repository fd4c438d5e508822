"""Sphinx configuration: `make docs`."""

from typing import Any

import jmeta

project = "jmeta"
author = "the jmeta authors"
version = release = jmeta.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {"description": release, "fixed_sidebar": True}
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Source", "Reference"]


def _skip_fields(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    # The fields of a NamedTuple are described in its docstring.
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app: Any) -> None:
    """Connect what Sphinx calls while it builds."""
    app.connect("autodoc-skip-member", _skip_fields)
