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
    "nearswap",
    "task_vectors",
)

METHODS: Mapping[str, Method] = {
    method.name: method for file in _FILES for method in import_module(f"{__package__}.{file}").METHODS
}

# mergekit's methods that elect signs, sort, sample or compare element by element.
_NOT_SUPPORTED = (*("sce", "ram", "ramplus_tl", "arcee_fusion"),)


def get(name: str) -> Method:
    """Return the method that a recipe calls `name`; ArcmergeError if there is none."""
    if name in METHODS:
        return METHODS[name]
    hint = "; arcmerge does not support this method" if name in _NOT_SUPPORTED else did_you_mean(name.lower(), METHODS)
    raise ArcmergeError(f"'merge_method' must be one of {', '.join(METHODS)}, got '{name}'{hint}")
