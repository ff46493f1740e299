"""The candidates of a sweep: sets of merge parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from itertools import product
from typing import Any

from arcmerge.errors import ArcmergeError
from arcmerge.merging.recipe.recipe import Recipe

MAX_CANDIDATES = 100_000

Values = str | float | Sequence[float]


@dataclass(frozen=True)
class Candidate:
    """Merge parameters to try.

    Args:
        name: the name in tables and plots.
        parameters: the parameters as under `parameters:` in a recipe.
        varied: the numbers that set this candidate apart from the others, by name.
        proposed: whether an optimizer proposed it.
    """

    name: str
    parameters: Mapping[str, Any]
    varied: Mapping[str, float] = field(default_factory=dict)
    proposed: bool = False


def read_values(given: Values, name: str) -> list[float]:
    """Numbers, from a text or from a list of them.

    Args:
        given: "first:last:step" as in "0:1:0.1", in decimal steps so that 0.3 is 0.3; numbers separated by commas as in
            "0,0.5,1"; or the numbers themselves.
        name: what the numbers are for, in the message of an error.

    Raises:
        ArcmergeError: for anything else.
    """
    try:
        if not isinstance(given, str):
            return [_finite(value) for value in (given if isinstance(given, Sequence) else [given])]
        if ":" not in given:
            return [_finite(part) for part in given.split(",")]
        first, last, step = (Decimal(part.strip()) for part in given.split(":"))
        if not step or not 0 <= (last - first) / step <= MAX_CANDIDATES:
            raise ValueError
        return [float(first + step * index) for index in range(int((last - first) / step) + 1)]
    except (InvalidOperation, ValueError, TypeError, OverflowError) as error:
        raise ArcmergeError(
            f"'{name}' must be first:last:step as 0:1:0.1, or numbers as 0,0.5,1, got {given!r:.80}"
        ) from error


def of_numbers(values: Sequence[float]) -> list[Candidate]:
    """A candidate for each number: that `t` for the whole model."""
    return [Candidate(f"t={value:g}", {"t": value}, {"t": value}) for value in values]


def parents(recipe: Recipe) -> list[Candidate]:
    """The two parents of a slerp, which are its ends; an empty list for other methods, where no `t` gives a parent."""
    return of_numbers([0.0, 1.0]) if recipe.method == "slerp" else []


def of_curves(curves: Mapping[str, Values]) -> list[Candidate]:
    """A candidate for each curve: its numbers are a gradient of `t` over the layers."""
    return [Candidate(name, {"t": read_values(values, f"curve {name}")}) for name, values in curves.items()]


def of_grid(axes: Mapping[str, Values], recipe: Recipe) -> list[Candidate]:
    """A candidate for each combination of values.

    Args:
        axes: for each filter the values of `t` for the tensors whose names match it. Other tensors keep the `t` of the
            recipe.
        recipe: the recipe that is varied.

    Raises:
        ArcmergeError: for wrong values, for more than 100,000 combinations, and as `rules` does.
    """
    if not axes:
        return []
    values = [read_values(given, f"grid {name}") for name, given in axes.items()]
    if (total := math.prod(map(len, values))) > MAX_CANDIDATES:
        raise ArcmergeError(f"'grid' must have at most {MAX_CANDIDATES} combinations, got {total}; take fewer values")
    rest = rules(recipe)
    found = []
    for combination in product(*values):
        varied = dict(zip(axes, combination, strict=True))
        filters = [{"filter": name, "value": value} for name, value in varied.items()]
        label = ", ".join(f"{name}={value:g}" for name, value in varied.items())
        found.append(Candidate(label, {"t": [*filters, *rest]}, varied))
    return found


def rules(recipe: Recipe) -> list[dict[str, Any]]:
    """The recipe's `t` for the whole model as a list of `{filter, value}`; an empty list if it sets none.

    Raises:
        ArcmergeError: if the recipe sets `t` in other places too, because these values would be lost.
    """
    if any("t" in part.rules for part in (recipe.module_parameters, *(slice.parameters for slice in recipe.slices))):
        raise ArcmergeError(
            "'t' must be set under the recipe's own 'parameters' to be varied, got values under a slice or a module; "
            "move them there"
        )
    return [
        {**({"filter": rule.filter} if rule.filter is not None else {}), "value": list(rule.values)}
        for rule in recipe.parameters.rules.get("t", ())
        if rule.values
    ]


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    return number
