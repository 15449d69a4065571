"""The site: `sphinx-build -W --keep-going -n docs docs/_build`. Needs no network."""

import inspect
import os
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import docstrings
import jax
import pages
from sphinx.util.typing import stringify_annotation

import jax_unlearn

GENERATED = HERE / "_generated"
pages.write(GENERATED)
TARGETS = pages.targets()
ARRAY_LIKE = stringify_annotation(jax.typing.ArrayLike, "smart")

project = "jax_unlearn"
author = "The jax_unlearn authors"
version = release = jax_unlearn.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "gallery", "_generated/gallery/*.ipynb"]
nitpicky = True
# Types in signatures that users have no need to name.
nitpick_ignore = [
    ("py:class", "jax_unlearn.problem.Evaluate"),
    ("py:class", "jax_unlearn.models.unet_2d.UNet2DConfig"),
]
smartquotes = False
default_role = "code"
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autosummary_generate = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
viewcode_line_numbers = True

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "_generated/gallery",
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "write_computation_times": False,
    "abort_on_example_error": True,
}

html_theme = "furo"
html_title = f"jax_unlearn {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False


def _as_rst(app, what, name, thing, options, lines):
    """Docstrings are Markdown with sections."""
    if not name.startswith("jax_unlearn"):
        return
    taken = list(getattr(thing, "_fields", ()))
    if inspect.isroutine(thing):
        taken += inspect.signature(thing).parameters
    lines[:] = docstrings.as_rst(lines, lambda text: pages.resolve(text, name, TARGETS, taken))


def _shorten(app, what, name, thing, options, signature, returns):
    """One name for all that JAX takes as an array."""
    return tuple(
        text and text.replace(ARRAY_LIKE, "~jax.typing.ArrayLike") for text in (signature, returns)
    )


def _skip_fields(app, what, name, thing, skip, options):
    """Fields of NamedTuples stand in the docstring of their class."""
    return True if type(thing).__name__ == "_tuplegetter" else None


def _resolve(app, env, node, contnode):
    """Types by the path that they are documented under; other libraries' are not linked."""
    target = node.get("reftarget", "")
    if target in TARGETS:
        domain = env.domains["py"]
        return domain.resolve_xref(
            env, node["refdoc"], app.builder, "obj", TARGETS[target], node, contnode
        )
    return None if target.startswith("jax_unlearn") else contnode


def setup(app):
    """Docstrings, and types in signatures."""
    app.connect("autodoc-process-docstring", _as_rst)
    app.connect("autodoc-process-signature", _shorten)
    app.connect("autodoc-skip-member", _skip_fields)
    app.connect("missing-reference", _resolve)
