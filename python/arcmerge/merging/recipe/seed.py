"""The seed of merge methods that draw random numbers."""

from __future__ import annotations

from typing import Any, Final

from arcmerge.errors import ArcmergeError
from arcmerge.merging.recipe.yaml_document import shown

# Fixed, so that a recipe without a seed gives the same result on every run. Recipes of published merges rely on it.
DEFAULT_SEED: Final = 0


def read_seed(value: Any, location: str) -> int:
    """`value` as a seed, DEFAULT_SEED for None; ArcmergeError if it is not a whole number from 0 to 2^63 - 1."""
    if value is None:
        return DEFAULT_SEED
    if type(value) is not int or not 0 <= value < 2**63:
        raise ArcmergeError(f"'{location}' must be a whole number from 0 to 2^63 - 1, got {shown(value)}")
    return value
