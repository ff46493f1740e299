"""The Sphinx configuration of the documentation: `make docs` builds it into build/docs."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.ext.napoleon.docstring import GoogleDocstring
from sphinx.util.docutils import SphinxDirective

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

# The package resolves its names when they are first asked for; autodoc lists names that exist, in this order.
FIRST = ("merge", "plan", "inspect", "sweep", "slerp", "merge_state_dicts", "Options", "MergeReport", "ArcmergeError")
arcmerge.__all__ = [name for name in FIRST if name in arcmerge.__all__] + [
    name for name in arcmerge.__all__ if name not in FIRST
]
for name in arcmerge.__all__:
    setattr(arcmerge, name, getattr(arcmerge, name))


def returns_section(docstring: GoogleDocstring, preprocess_types: bool = False) -> list[tuple[str, str, list[str]]]:
    """The `Returns:` section as text alone: napoleon would read the words before a colon as a type."""
    lines = docstring._dedent(docstring._consume_to_next_section())
    return [("", "", lines)] if lines else []


GoogleDocstring._consume_returns_section = returns_section  # type: ignore[method-assign]


FIELD = re.compile(r"\w+(, \w+)*: ")


class CommandHelp(SphinxDirective):
    """The text that `arcmerge COMMAND --help` prints."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        program = "import sys; from arcmerge.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", program, self.arguments[0], "--help"]
        done = subprocess.run(command, env={**os.environ, "COLUMNS": "86"}, check=True, capture_output=True, text=True)
        block = nodes.literal_block(done.stdout, done.stdout.replace("usage: -c", "usage: arcmerge"))
        block["language"] = "text"
        return [block]


def setup(app: Sphinx) -> None:
    """The page of the API has an introduction of its own in place of the docstrings of modules.

    A paragraph of `field: text` in the docstring of a class becomes a list of its arguments.
    """

    def prepare(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
        if what == "module":
            lines.clear()
        start = next((index for index, line in enumerate(lines) if FIELD.match(line) and not lines[index - 1]), 0)
        if what in ("class", "exception") and start:
            end = next((index for index in range(start, len(lines)) if not lines[index]), len(lines))
            if all(FIELD.match(line) or line.startswith("    ") for line in lines[start:end]):
                lines[start:end] = ["Args:", *("    " + line for line in lines[start:end])]

    app.add_directive("command-help", CommandHelp)
    app.connect("autodoc-process-docstring", prepare, priority=400)  # before napoleon
