"""Sphinx: `sphinx-build -W docs docs/_build/html` makes the site.

JPK_DOCS_OFFLINE=1 leaves out the links to the documentation of Python, JAX and optax, whose
inventories are fetched.
"""

from __future__ import annotations

import os
import pathlib
import sys
import tomllib

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "_ext")]

with open(HERE.parent / "pyproject.toml", "rb") as file:
    _project = tomllib.load(file)["project"]

project = "jax_privacy_kernels"
author = "the authors of jax_privacy_kernels"
copyright = author
version = release = _project["version"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_design",
    "site_pages",
]
exclude_patterns = ["_build", "jupyter_execute", "**/.ipynb_checkpoints"]

# Pages are executed, and an error in one is an error of the build.
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 180
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables that cells make
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
# What docstrings put between single backticks is a name.
default_role = "py:obj"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # autodoc describes attributes, too
python_maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"

intersphinx_mapping = (
    {}
    if os.environ.get("JPK_DOCS_OFFLINE")
    else {
        "python": ("https://docs.python.org/3", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
    }
)

html_theme = "sphinx_book_theme"
html_title = "jax_privacy_kernels"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "repository_url": _project["urls"]["Source"],
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_issues_button": True,
    "navbar_persistent": [],  # the search stands in the sidebar
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "home_page_in_toc": True,
}

# The address is that of the first release; until then nobody answers there.
linkcheck_ignore = [_project["urls"]["Source"] + ".*"]
linkcheck_anchors_ignore_for_url = [r"https://github\.com/.*"]
linkcheck_retries = 3
