"""The Sphinx configuration of the documentation: `make docs` builds it into build/docs."""

from __future__ import annotations

import arcmerge

project = "arcmerge"
author = "the arcmerge authors"
copyright = "the arcmerge authors, Apache-2.0"
version = release = arcmerge.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns: list[str] = []
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "linkify"]
myst_heading_anchors = 3
myst_linkify_fuzzy_links = False

html_theme = "furo"
html_title = f"arcmerge {version}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_theme_options = {"navigation_with_keys": True}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Every cross-reference of a page must resolve. Types in signatures may be internal or of other packages.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r".*")]
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# The package resolves its names when they are first asked for; autodoc lists names that exist.
for name in arcmerge.__all__:
    setattr(arcmerge, name, getattr(arcmerge, name))
