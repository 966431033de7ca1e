"""Configuration of the Sphinx site; the commands are in contributing.rst."""

import doctest
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# the package of this tree, whether or not it is installed; this site's extensions; the backend of backends.rst;
# what the pictures share
sys.path[:0] = [
    str(HERE.parent),
    str(HERE.parent / "backends"),
    str(HERE / "_ext"),
    str(HERE / "examples"),
    str(HERE / "pictures"),
]

import subquad  # noqa: E402

project = "subquad"
author = "The subquad developers"
copyright = "The subquad developers"  # noqa: A001 - the name that Sphinx reads
version = release = subquad.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "matplotlib.sphinxext.plot_directive",
    "numpydoc",
    "docstrings",
    "mathml",
    "command_help",
    "library_table",
    "method_table",
    "restriction_table",
    "results",
]
exclude_patterns = ["_build"]
smartquotes = False  # a method's name in quotes is code
default_role = "py:obj"  # `name` links where the name is documented, and is code where it is not
highlight_language = "text"  # a block after "::" is a formula

autodoc_typehints = "none"  # numpydoc's Parameters give them
autodoc_member_order = "bysource"
autosummary_generate = False
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

doctest_test_doctest_blocks = "default"
# those of pytest; the default would not compare the messages of exceptions
doctest_default_flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.DONT_ACCEPT_TRUE_FOR_1
doctest_global_setup = """
import importlib.util
import numpy as np, subquad


def is_absent(library):
    return importlib.util.find_spec(library) is None
"""

# `.. plot:: /pictures/favor.py` runs the program while the site is built and shows its picture
plot_formats = ["svg"]
plot_html_show_formats = False
plot_html_show_source_link = False
plot_apply_rcparams = True
plot_rcparams = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "image.interpolation": "nearest",
    "savefig.facecolor": "white",
    "svg.hashsalt": "subquad",
}

html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"subquad {release}"
html_static_path = ["_static"]
html_css_files = ["subquad.css"]
html_copy_source = False
html_show_sphinx = False
