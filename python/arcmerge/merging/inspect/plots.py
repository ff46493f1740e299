"""The two plots: the curve of a recipe over the layers, and the angles between two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arcmerge.errors import ArcmergeError, needed
from arcmerge.merging.inspect.relations import Pair, relation


def load_pyplot() -> Any:
    """matplotlib.pyplot, for files alone. Raises ArcmergeError where it is not installed."""
    with needed("matplotlib", by="a plot", extra="plot"):
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

    return pyplot


def plot_curve(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw t, or else the coefficient of each further input, over the layers, one line per module."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    inside = [row for row in rows if row["layer"] is not None]
    for number, module in enumerate(dict.fromkeys(row["module"] for row in inside)):
        points = {(row["layer"], height) for row in inside if row["module"] == module for height in _heights(row)}
        one_each = len(points) == len({layer for layer, _ in points})
        # Modules that share a curve would hide each other: their markers shrink, so that all of them show.
        size = 9 - 2 * min(number, 3)
        line = "-" if one_each else "none"
        axes.plot(*zip(*sorted(points), strict=True), "osv^"[number % 4], linestyle=line, markersize=size, label=module)
    outside: dict[float, list[str]] = {}
    for row in (row for row in rows if row["layer"] is None):
        for height in _heights(row):
            outside.setdefault(height, []).append(row["module"])
    for (height, names), line in zip(outside.items(), (":", "--", "-.", "-"), strict=False):
        axes.axhline(height, color="grey", linewidth=1, linestyle=line, label=f"{', '.join(names)} ({height:.3g})")
    axes.set_xlabel("layer")
    axes.set_ylabel("t" if rows and "t" in rows[0]["parameters"] else "coefficient of the last input")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _heights(row: Mapping[str, Any]) -> list[float]:
    if "t" in row["parameters"]:
        return [row["parameters"]["t"]]
    return [row["coefficients"][-1]] if row["coefficients"] else []


def plot_angles(pairs: Sequence[Pair], file: Path) -> None:
    """Draw the angle of every tensor as a heat map, layers across and kinds of tensor down."""
    pyplot = load_pyplot()
    inside = [item for item in pairs if item.layer is not None]
    if not inside:
        raise ArcmergeError("there are no layers to draw: no tensor belongs to one")
    kinds = sorted(dict.fromkeys(item.kind for item in inside), key=lambda kind: ("norm" in kind, kind))
    layers = sorted({item.layer for item in inside if item.layer is not None})
    angles = np.full((len(kinds), len(layers)), np.nan)
    for item in inside:
        angles[kinds.index(item.kind), layers.index(item.layer or 0)] = relation([item]).angle
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
