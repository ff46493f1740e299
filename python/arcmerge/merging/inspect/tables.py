"""Plans as rows of JSON values, and plans and relations as tables on a terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from arcmerge.errors import ArcmergeError
from arcmerge.merging.execution.statistics_pass import StatisticsPass
from arcmerge.merging.inspect.relations import Pair, Relation, relation, relations_by
from arcmerge.merging.merge import branch
from arcmerge.merging.methods.rule import Coefficients
from arcmerge.merging.plan.plan import Plan
from arcmerge.merging.plan.tensor_names import place
from arcmerge.merging.recipe.model_reference import ModelReference

Row = Mapping[str, Any]


def pair_recipe(a: str, b: str) -> Mapping[str, Any]:
    """A recipe whose statistics pass measures the relation of model `b` to model `a`.

    Raises:
        ArcmergeError: they are one model.
    """
    if ModelReference.parse(a) == ModelReference.parse(b):
        got = f"'{a}' twice" if a == b else f"'{a}' and '{b}', which are one folder"
        raise ArcmergeError(f"'A' and 'B' must be two models, got {got}; name another model to compare")
    return {
        "merge_method": "slerp",
        "base_model": a,
        "models": [{"model": a}, {"model": b}],
        "parameters": {"t": 0.5},
    }


def plan_rows(plan: Plan, statistics: StatisticsPass) -> list[Row]:
    """One row of JSON values per output tensor: its name and layer, its parameters, and its coefficients."""
    rows: list[Row] = []
    for index, job in enumerate(plan.jobs):
        layer, kind, module = place(job.output.name)
        rule = statistics.rules.get(index)
        values = rule.values.tolist() if isinstance(rule, Coefficients) and rule.values.ndim == 1 else []
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
                "branch": branch(job, statistics, index),
                # None for other rules and for coefficients per row or column, and as JSON has neither NaN nor infinity.
                "coefficients": values if values and all(map(math.isfinite, values)) else None,
                "cosine": _cosine(statistics, index),
                "seed": plan.seed,
            }
        )
    return rows


def _cosine(statistics: StatisticsPass, job: int) -> float | None:
    gram = statistics.grams.get(job)
    if gram is None or gram.shape != (2, 2) or not gram[0, 0] > 0 or not gram[1, 1] > 0:
        return None
    return float(gram[0, 1] / math.sqrt(gram[0, 0]) / math.sqrt(gram[1, 1]))


def plan_table(plan: Plan, rows: Sequence[Row]) -> None:
    """Print the parameters of every layer and module, one line per layer; equal tensors of a module are counted."""
    from rich.console import Console
    from rich.table import Table

    seed = "" if plan.seed is None else f", seed {plan.seed}"
    table = Table(title=f"{plan.method.name}: {len(rows)} tensors, base {plan.donor}{seed}", title_justify="left")
    modules = list(dict.fromkeys(row["module"] for row in rows if row["layer"] is not None))
    for heading in ("layer", *modules):
        table.add_column(heading)
    for row in (row for row in rows if row["layer"] is None):
        table.add_row(row["module"], _plan_cell([row]))
    table.add_section()
    for layer in dict.fromkeys(row["layer"] for row in rows if row["layer"] is not None):
        cells = [[row for row in rows if row["layer"] == layer and row["module"] == module] for module in modules]
        table.add_row(str(layer), *(_plan_cell(cell) for cell in cells))
    console = Console()
    console.print(table)
    console.print(_counts(row["branch"] for row in rows), highlight=False)


def _plan_cell(rows: Sequence[Row]) -> str:
    """The distinct parameters of some tensors, as "t=0.08 slerp", with counts if they differ."""
    found = Counter(f"{_parameters(row)}{row['branch']}" for row in rows)
    return "\n".join(text if len(found) == 1 else f"{text} x{times}" for text, times in found.items())


def _parameters(row: Row) -> str:
    parameters = row["parameters"]
    if "t" in parameters:
        return f"t={parameters['t']:.4g} "
    # A density of 1 keeps everything, as if there were none.
    shown = [name for name in ("weight", "density") if set(parameters.get(name, ())) - {None, 1.0} or name == "weight"]
    return "".join(f"{name}={_per_input(parameters[name])} " for name in shown if parameters.get(name))


def _per_input(values: Sequence[float | None]) -> str:
    return "/".join("base" if value is None else f"{value:.4g}" for value in values)


def _counts(branches: Iterable[str]) -> str:
    return ", ".join(f"{times} {name}" for name, times in Counter(branches).most_common())


def inspect_table(a: str, b: str, pairs: Sequence[Pair]) -> None:
    """Print the angle, the norm ratio and the near-collinear share of each layer and module."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"a = {a}, b = {b}: angle, |b|/|a|, near-collinear", title_justify="left")
    modules = list(dict.fromkeys(pair.module for pair in pairs if pair.layer is not None))
    table.add_column("layer", no_wrap=True)
    for module in modules:
        table.add_column(module, justify="right", no_wrap=True)
    for pair in (pair for pair in pairs if pair.layer is None):
        table.add_row(pair.module, _relation_cell(relation([pair])))
    table.add_section()
    cells = relations_by([pair for pair in pairs if pair.layer is not None], lambda pair: (pair.layer, pair.module))
    for layer in dict.fromkeys(pair.layer for pair in pairs if pair.layer is not None):
        found = [cells.get((layer, module)) for module in modules]
        table.add_row(str(layer), *(_relation_cell(cell) if cell else "" for cell in found))
    table.add_section()
    table.add_row("all", _relation_cell(relation(pairs)))
    Console().print(table)


def _relation_cell(found: Relation) -> str:
    angle = "zero" if math.isnan(found.angle) else f"{found.angle:.2f}°"
    ratio = "-" if math.isnan(found.ratio) else f"{found.ratio:.2f}"
    return f"{angle} {ratio:>4} {found.collinear:4.0%}"
