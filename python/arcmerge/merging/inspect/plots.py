"""Plots: the parameters of a recipe by layer, and the angles between two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arcmerge.errors import ArcmergeError, needed
from arcmerge.merging.inspect.relations import Pair, relation


def load_pyplot() -> Any:
    """matplotlib.pyplot, set up to draw into files.

    Raises:
        ArcmergeError: matplotlib is not installed.
    """
    with needed("matplotlib", by="a plot", extra="plot"):
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

    return pyplot


def plot_curve(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw t, or for methods without t the coefficient of the last input, by layer, with one line per module.

    Args:
        rows: as `tables.plan_rows` returns them.
        file: the file to write; its suffix decides the format.
    """
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    inside = [row for row in rows if row["layer"] is not None]
    for index, module in enumerate(dict.fromkeys(row["module"] for row in inside)):
        points = {(row["layer"], value) for row in inside if row["module"] == module for value in _values(row)}
        one_each = len(points) == len({layer for layer, _ in points})
        # Modules with the same curve would hide each other; with smaller and smaller markers all of them show.
        size = 9 - 2 * min(index, 3)
        line = "-" if one_each else "none"
        axes.plot(*zip(*sorted(points), strict=True), "osv^"[index % 4], linestyle=line, markersize=size, label=module)
    outside: dict[float, list[str]] = {}
    for row in (row for row in rows if row["layer"] is None):
        for value in _values(row):
            outside.setdefault(value, []).append(row["module"])
    for (value, names), line in zip(outside.items(), (":", "--", "-.", "-"), strict=False):
        axes.axhline(value, color="grey", linewidth=1, linestyle=line, label=f"{', '.join(names)} ({value:.3g})")
    axes.set_xlabel("layer")
    axes.set_ylabel("t" if rows and "t" in rows[0]["parameters"] else "coefficient of the last input")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _values(row: Mapping[str, Any]) -> list[float]:
    if "t" in row["parameters"]:
        return [row["parameters"]["t"]]
    return [row["coefficients"][-1]] if row["coefficients"] else []


def plot_angles(pairs: Sequence[Pair], file: Path) -> None:
    """Draw the angle of every pair of tensors as a heat map with a column per layer and a row per kind of tensor.

    Args:
        pairs: as `relations.pairs_of` returns them.
        file: the file to write; its suffix decides the format.

    Raises:
        ArcmergeError: no tensor belongs to a layer.
    """
    pyplot = load_pyplot()
    inside = [pair for pair in pairs if pair.layer is not None]
    if not inside:
        raise ArcmergeError(f"{file}: the plot must have layers, got no tensor that belongs to a layer")
    kinds = sorted(dict.fromkeys(pair.kind for pair in inside), key=lambda kind: ("norm" in kind, kind))
    layers = sorted({pair.layer for pair in inside if pair.layer is not None})
    angles = np.full((len(kinds), len(layers)), np.nan)
    for pair in inside:
        angles[kinds.index(pair.kind), layers.index(pair.layer or 0)] = relation([pair]).angle
    size = (max(6.0, 2.8 + 0.28 * len(layers)), 1.6 + 0.32 * len(kinds))
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    image = axes.imshow(np.ma.masked_invalid(angles), aspect="auto", cmap="viridis", interpolation="nearest", vmin=0)
    axes.set_facecolor("lightgrey")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xticks(range(0, len(layers), max(1, len(layers) // 16)))
    axes.set_xlabel("layer")
    axes.set_title("angle between the two models (degrees; grey: a zero tensor)", fontsize="medium")
    figure.colorbar(image, ax=axes)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
