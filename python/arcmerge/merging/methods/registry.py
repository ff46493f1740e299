"""All merge methods by name. A new file of methods is one more entry of `_FILES`."""

from __future__ import annotations

from collections.abc import Mapping

from arcmerge.errors import ArcmergeError
from arcmerge.merging.methods import linear, nearswap, spherical
from arcmerge.merging.methods.method import Method
from arcmerge.merging.recipe.yaml_document import did_you_mean

_FILES = (
    spherical,
    linear,
    nearswap,
)

METHODS: Mapping[str, Method] = {method.name: method for file in _FILES for method in file.METHODS}

# mergekit's methods that elect signs, sort, sample or compare element by element.
_NOT_SUPPORTED = (
    *("ties", "dare_ties", "dare_linear", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties"),
    *("sce", "ram", "ramplus_tl", "arcee_fusion"),
)


def get(name: str) -> Method:
    """Return the method that a recipe calls `name`; ArcmergeError if there is none."""
    if name in METHODS:
        return METHODS[name]
    hint = "; arcmerge does not support this method" if name in _NOT_SUPPORTED else did_you_mean(name.lower(), METHODS)
    raise ArcmergeError(f"'merge_method' must be one of {', '.join(METHODS)}, got '{name}'{hint}")
