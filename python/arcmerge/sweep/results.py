"""What a sweep leaves: a table, a plot, and the recipe of the best."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arcmerge.errors import ArcmergeError
from arcmerge.sweep.journal import Scored


def best_of(scored: Sequence[Scored], minimize: bool) -> Scored | None:
    """The first with the best score; what has none, as NaN, is never it."""
    found = [one for one in scored if one.score == one.score]
    key = (lambda one: one.score) if minimize else (lambda one: -one.score)
    return min(found, key=key) if found else None


def write_tables(scored: Sequence[Scored], folder: Path) -> None:
    """results.csv, a line a candidate and a column a number that was varied; results.json, with whole parameters."""
    names = list(dict.fromkeys(name for one in scored for name in one.varied))
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["candidate", *names, "score", "seconds"])
        for one in scored:
            writer.writerow([one.name, *(one.varied.get(name, "") for name in names), one.score, f"{one.seconds:.2f}"])
    entries = [{**vars(one), "score": one.score if one.score == one.score else None} for one in scored]
    (folder / "results.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def plot(scored: Sequence[Scored], title: str, minimize: bool, file: Path) -> None:
    """Score over t with the parents at its ends; a heat map over two numbers; else score by candidate."""
    try:
        import matplotlib
    except ImportError as error:
        raise ArcmergeError("plots need matplotlib, which is not installed; pip install 'arcmerge[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    names = {tuple(one.varied) for one in scored}
    (only,) = names if len(names) == 1 else ((),)
    if len(only) == 1:
        _plot_line(axes, scored, only[0])
    elif len(only) == 2:
        _plot_map(figure, axes, scored, only, title)
    else:
        axes.plot(range(1, len(scored) + 1), [one.score for one in scored], "o", label="candidates")
        if len(only) > 2 or () not in names:
            better = np.fmin if minimize else np.fmax
            axes.plot(range(1, len(scored) + 1), better.accumulate([one.score for one in scored]), label="best so far")
            axes.legend()
            axes.set_xlabel("candidate")
        else:
            axes.set_xticks(range(1, len(scored) + 1), [one.name for one in scored], rotation=30, ha="right")
    if len(only) != 2:
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _plot_line(axes: Any, scored: Sequence[Scored], name: str) -> None:
    points = sorted((one.varied[name], one.score) for one in scored)
    axes.plot(*zip(*points, strict=True), "o-")
    if name == "t":
        parents = [point for point in points if point[0] in (0, 1)]
        axes.plot(*zip(*parents, strict=True), "s", color="black", label="parents") if parents else None
        axes.legend() if parents else None
    axes.set_xlabel(name)


def _plot_map(figure: Any, axes: Any, scored: Sequence[Scored], names: Sequence[str], title: str) -> None:
    columns, rows = (sorted({one.varied[name] for one in scored}) for name in names)
    if len(columns) * len(rows) > 4 * len(scored):  # points of a search, not of a grid
        drawn = axes.scatter(*([one.varied[name] for one in scored] for name in names), c=[one.score for one in scored])
    else:
        values = np.full((len(rows), len(columns)), np.nan)
        for one in scored:
            values[rows.index(one.varied[names[1]]), columns.index(one.varied[names[0]])] = one.score
        drawn = axes.imshow(np.ma.masked_invalid(values), origin="lower", aspect="auto", interpolation="nearest")
        axes.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
        axes.set_yticks(range(len(rows)), [f"{value:g}" for value in rows])
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    figure.colorbar(drawn, ax=axes, label=title)
