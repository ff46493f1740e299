"""The candidates of a sweep: sets of merge parameters."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from itertools import product
from typing import Any

from arcmerge.errors import ArcmergeError
from arcmerge.merging.methods import registry
from arcmerge.merging.recipe.changes import Key, find_parameter
from arcmerge.merging.recipe.parameters import Kind, Parameter, convert
from arcmerge.merging.recipe.recipe import Recipe

MAX_CANDIDATES = 100_000

# Numbers; or a text as "0:1:0.1" or "0,0.3,1".
Values = str | float | Sequence[float]


@dataclass(frozen=True)
class Candidate:
    """Merge parameters to try.

    Args:
        name: the name in tables and plots.
        parameters: the parameters, by the keys of `changed_recipe`.
        varied: the numbers that set this candidate apart from the others, by name.
        proposed: whether an optimizer proposed it.
    """

    name: str
    parameters: Mapping[str, Any]
    varied: Mapping[str, float] = field(default_factory=dict)
    proposed: bool = False

    @property
    def key(self) -> str:
        """A text that is equal for equal parameters."""
        return json.dumps(self.parameters, sort_keys=True)


def read_values(given: Values, name: str, kind: Kind = float) -> list[float]:
    """Numbers or switches, from a text or from a list of them.

    Args:
        given: "first:last:step" as in "0:1:0.1", in decimal steps so that 0.3 is 0.3; values separated by commas as in
            "0,0.5,1" or "true,false"; or the values themselves.
        name: what the values are for, in the message of an error.
        kind: float, int or bool.

    Raises:
        ArcmergeError: for anything else.
    """
    try:
        if not isinstance(given, str):
            values: Sequence[Any] = given if isinstance(given, Sequence) else [given]
        elif ":" not in given:
            values = given.split(",")
        else:
            first, last, step = (Decimal(part.strip()) for part in given.split(":"))
            if not step or not 0 <= (last - first) / step <= MAX_CANDIDATES:
                raise ValueError
            values = [float(first + step * index) for index in range(int((last - first) / step) + 1)]
        return [convert(value, kind, name) for value in values]
    except (InvalidOperation, ValueError, TypeError, OverflowError, ArcmergeError) as error:
        numbers = "whole numbers" if kind is int else "numbers"
        rule = "true, false or true,false" if kind is bool else f"first:last:step as 0:1:0.1, or {numbers} as 0,0.5,1"
        raise ArcmergeError(f"'{name}' must be {rule}, got {given!r:.80}") from error


def read_key(text: str, recipe: Recipe) -> tuple[Key, Parameter]:
    """The key that a text names, and its parameter. A text that names no parameter is a filter of `t`.

    Raises:
        ArcmergeError: if the method has neither such a parameter nor `t`, or the recipe has no such model.
    """
    names = [parameter.name for parameter in registry.get(recipe.method).parameters]
    filters = "t" in names and not any(text.partition(mark)[0] in names for mark in "[:")
    key = Key("t", filter=text) if filters else Key.read(text)
    return key, find_parameter(recipe, key)


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
        axes: for each parameter its values, by the keys of `changed_recipe`; a text that names no parameter is a filter
            of `t`. What no key names keeps the values of the recipe.
        recipe: the recipe that is varied.

    Raises:
        ArcmergeError: for wrong values, for more than 100,000 combinations, and as `read_key` does.
    """
    if not axes:
        return []
    read: dict[str, list[float]] = {}
    for text, given in axes.items():
        key, parameter = read_key(text, recipe)
        if str(key) in read:
            raise ArcmergeError(f"'grid {text}' must be given once, got {key} twice; join the values by commas")
        read[str(key)] = read_values(given, f"grid {text}", parameter.kind)
    if (total := math.prod(map(len, read.values()))) > MAX_CANDIDATES:
        raise ArcmergeError(f"'grid' must have at most {MAX_CANDIDATES} combinations, got {total}; take fewer values")
    found = []
    for combination in product(*read.values()):
        parameters = dict(zip(read, combination, strict=True))
        label = ", ".join(f"{name}={_shown(value)}" for name, value in parameters.items())
        found.append(Candidate(label, parameters, {name: float(value) for name, value in parameters.items()}))
    return found


def _shown(value: float) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"
