"""What a sweep tries: parameters of a merge, by name, with the few numbers in which they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from itertools import product
from typing import Any

from arcmerge.errors import ArcmergeError
from arcmerge.merging.recipe.recipe import Recipe

MOST_CANDIDATES = 100_000


@dataclass(frozen=True)
class Candidate:
    """name: in tables and plots. parameters: as under `parameters:`. varied: the numbers that set it apart, by name.

    proposed: by an optimiser.
    """

    name: str
    parameters: Mapping[str, Any]
    varied: Mapping[str, float] = field(default_factory=dict)
    proposed: bool = False


def read_values(text: str) -> list[float]:
    """The numbers of `0:1:0.1` (first, last, step) or `0,0.5,1`. Raises ArcmergeError for anything else.

    Steps are decimal, so that 0.3 is 0.3.
    """
    try:
        if ":" not in text:
            return [_number(part) for part in text.split(",")]
        first, last, step = (Decimal(part.strip()) for part in text.split(":"))
        if not step or not (last - first) / step >= 0 or (last - first) / step > MOST_CANDIDATES:
            raise ValueError
        return [float(first + step * number) for number in range(int((last - first) / step) + 1)]
    except (InvalidOperation, ValueError, OverflowError) as error:
        raise ArcmergeError(
            f"values must be first:last:step as 0:1:0.1, or numbers as 0,0.5,1, got '{text}'"
        ) from error


def of_numbers(values: Sequence[float]) -> list[Candidate]:
    """One t for the whole model each."""
    return [Candidate(f"t={value:g}", {"t": value}, {"t": value}) for value in values]


def parents(recipe: Recipe) -> list[Candidate]:
    """The two ends of a slerp, which are its parents; none of other methods, where no t gives a parent."""
    return of_numbers([0.0, 1.0]) if recipe.method == "slerp" else []


def of_curve(text: str) -> Candidate:
    """The gradient of `name=0,0.5,1`. Raises ArcmergeError for anything else."""
    name, equals, values = text.partition("=")
    if not equals or not name.strip():
        raise ArcmergeError(f"a curve must be a name and its numbers, as v=0,0.5,1,0.5,0, got '{text}'")
    return Candidate(name.strip(), {"t": read_values(values)})


def of_grid(axes: Sequence[str], recipe: Recipe) -> list[Candidate]:
    """Every combination of `filter=0:1:0.5`, one t for the tensors with each filter in their names.

    Other tensors keep the t of the recipe. Raises ArcmergeError for anything else, see also `rules`.
    """
    names, values = [], []
    for text in axes:
        name, equals, numbers = text.partition("=")
        if not equals or not name.strip() or name.strip() in names:
            raise ArcmergeError(
                f"an axis must be a filter of its own and its values, as self_attn=0:1:0.25, got '{text}'"
            )
        names.append(name.strip())
        values.append(read_values(numbers))
    total = 1
    for one in values:
        total *= len(one)
    if total > MOST_CANDIDATES:
        raise ArcmergeError(f"a grid may have {MOST_CANDIDATES} candidates, got {total}; take fewer values")
    rest = rules(recipe)
    found = []
    for combination in product(*values):
        varied = dict(zip(names, combination, strict=True))
        own = [{"filter": name, "value": value} for name, value in varied.items()]
        label = ", ".join(f"{name}={value:g}" for name, value in varied.items())
        found.append(Candidate(label, {"t": [*own, *rest]}, varied))
    return found


def rules(recipe: Recipe) -> list[dict[str, Any]]:
    """What the recipe says of t for all of the model, as a list of `{filter, value}`; an empty one if it is silent.

    Raises ArcmergeError if it says more of it elsewhere, which would be lost.
    """
    if any("t" in part.rules for part in (recipe.module_parameters, *(piece.parameters for piece in recipe.slices))):
        raise ArcmergeError("`t` must stand under the recipe's own `parameters:` to be varied, not under a slice's")
    return [
        {**({"filter": rule.filter} if rule.filter is not None else {}), "value": list(rule.values)}
        for rule in recipe.parameters.rules.get("t", ())
        if rule.values
    ]


def _number(text: str) -> float:
    number = float(text)
    if not abs(number) < float("inf"):
        raise ValueError(text)
    return number
