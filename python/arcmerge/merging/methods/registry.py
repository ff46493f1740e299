"""All merge methods by name. To add a file of methods, add its name to `_FILES`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from arcmerge.errors import ArcmergeError
from arcmerge.merging.methods.method import Method
from arcmerge.merging.recipe.yaml_document import did_you_mean

# Files of this folder. Each has a tuple METHODS of its methods; error messages list the methods in this order.
_FILES = (
    "spherical",
    "linear",
    "task_vectors",
    "selective",
    "delerp",
    "geometric_median",
    "elementwise",
)

METHODS: Mapping[str, Method] = {
    method.name: method for file in _FILES for method in import_module(f"{__package__}.{file}").METHODS
}


def get(name: str) -> Method:
    """Return the method that a recipe calls `name`; ArcmergeError if there is none."""
    if name in METHODS:
        return METHODS[name]
    names = ", ".join(METHODS)
    raise ArcmergeError(f"'merge_method' must be one of {names}, got '{name}'{did_you_mean(name.lower(), METHODS)}")
