"""Plans and inspections as rows of plain data and as tables for a terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from arcmerge.errors import ArcmergeError
from arcmerge.merging.execution.gram_pass import GramPass
from arcmerge.merging.inspect.relations import Pair, Relation, by, relation
from arcmerge.merging.merge import branch
from arcmerge.merging.plan.plan import Plan
from arcmerge.merging.plan.tensor_names import place
from arcmerge.merging.recipe.model_reference import ModelReference

Row = Mapping[str, Any]


def pair_recipe(a: str, b: str) -> Mapping[str, Any]:
    """The recipe whose Gram pass measures how `b` lies to `a`. Raises ArcmergeError if they are one model."""
    if ModelReference.parse(a) == ModelReference.parse(b):
        got = f"'{a}' twice" if a == b else f"'{a}' and '{b}', which are one folder"
        raise ArcmergeError(f"A and B must be two models, got {got}; name another one to compare")
    return {
        "merge_method": "slerp",
        "base_model": a,
        "models": [{"model": a}, {"model": b}],
        "parameters": {"t": 0.5},
    }


def plan_rows(plan: Plan, grams: GramPass) -> list[Row]:
    """One row per output tensor: its place, its parameters, and what the Gram pass made of them."""
    rows: list[Row] = []
    for number, job in enumerate(plan.jobs):
        layer, kind, module = place(job.output.name)
        coefficients = grams.coefficients.get(number)
        values = coefficients.values.tolist() if coefficients is not None and coefficients.values.ndim == 1 else []
        rows.append(
            {
                "name": job.output.name,
                "layer": layer,
                "kind": kind,
                "module": module,
                "shape": list(job.output.shape),
                "dtype": job.output.dtype.name,
                "inputs": [f"{item.model}:{item.info.name}" for item in job.inputs],
                "parameters": {**job.values.shared, **{name: list(v) for name, v in job.values.per_input.items()}},
                "branch": branch(job, grams, number),
                # None for those of vectors, and for weights that are not finite: JSON has no word for NaN.
                "coefficients": values if values and all(map(math.isfinite, values)) else None,
                "cosine": _cosine(grams, number),
            }
        )
    return rows


def _cosine(grams: GramPass, number: int) -> float | None:
    gram = grams.grams.get(number)
    if gram is None or gram.shape != (2, 2) or not gram[0, 0] > 0 or not gram[1, 1] > 0:
        return None
    return float(gram[0, 1] / math.sqrt(gram[0, 0]) / math.sqrt(gram[1, 1]))


def plan_table(plan: Plan, rows: Sequence[Row]) -> None:
    """Print what each layer and module gets: one line a layer, tensors that agree drawn together."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{plan.method.name}: {len(rows)} tensors, base {plan.donor}", title_justify="left")
    modules = list(dict.fromkeys(row["module"] for row in rows if row["layer"] is not None))
    for heading in ("layer", *modules):
        table.add_column(heading)
    for row in (row for row in rows if row["layer"] is None):
        table.add_row(row["module"], _cell([row]))
    table.add_section()
    for layer in dict.fromkeys(row["layer"] for row in rows if row["layer"] is not None):
        cells = [[row for row in rows if row["layer"] == layer and row["module"] == module] for module in modules]
        table.add_row(str(layer), *(_cell(cell) for cell in cells))
    console = Console()
    console.print(table)
    console.print(_counts(row["branch"] for row in rows), highlight=False)


def _cell(rows: Sequence[Row]) -> str:
    """The distinct settings of some tensors, as 't=0.08 slerp', with counts where they differ."""
    found = Counter(f"{_setting(row)}{row['branch']}" for row in rows)
    return "\n".join(text if len(found) == 1 else f"{text} x{times}" for text, times in found.items())


def _setting(row: Row) -> str:
    parameters = row["parameters"]
    if "t" in parameters:
        return f"t={parameters['t']:.4g} "
    if weights := parameters.get("weight"):
        return "weight=" + "/".join("base" if weight is None else f"{weight:.4g}" for weight in weights) + " "
    return ""


def _counts(branches: Iterable[str]) -> str:
    return ", ".join(f"{times} {name}" for name, times in Counter(branches).most_common())


def inspect_table(a: str, b: str, pairs: Sequence[Pair]) -> None:
    """Print angle, norm ratio and near-collinear share of each layer and module."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"a = {a}, b = {b}: angle, |b|/|a|, near-collinear", title_justify="left")
    modules = list(dict.fromkeys(item.module for item in pairs if item.layer is not None))
    table.add_column("layer", no_wrap=True)
    for module in modules:
        table.add_column(module, justify="right", no_wrap=True)
    for item in (item for item in pairs if item.layer is None):
        table.add_row(item.module, _relation(relation([item])))
    table.add_section()
    cells = by([item for item in pairs if item.layer is not None], lambda item: (item.layer, item.module))
    for layer in dict.fromkeys(item.layer for item in pairs if item.layer is not None):
        found = [cells.get((layer, module)) for module in modules]
        table.add_row(str(layer), *(_relation(cell) if cell else "" for cell in found))
    table.add_section()
    table.add_row("all", _relation(relation(pairs)))
    Console().print(table)


def _relation(found: Relation) -> str:
    angle = "zero" if math.isnan(found.angle) else f"{found.angle:.2f}°"
    ratio = "-" if math.isnan(found.ratio) else f"{found.ratio:.2f}"
    return f"{angle} {ratio:>4} {found.collinear:4.0%}"
