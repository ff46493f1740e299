"""Arrows, points and curves in the plane, which the drawings of the methods are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import pyplot, rcParams
from numpy.typing import NDArray

rcParams.update({"backend": "Agg", "svg.hashsalt": "arcmerge", "font.size": 10, "mathtext.fontset": "dejavusans"})

Vector = NDArray[np.float64]
FIRST, SECOND, THIRD, RESULT, BASE, FAINT = "#2a6fbb", "#d9822b", "#3c9a5f", "#b3261e", "#222222", "#999999"


def direction(degrees: float, length: float = 1.0) -> Vector:
    angle = np.radians(degrees)
    return length * np.array([np.cos(angle), np.sin(angle)])


def plane(title: str = "", size: tuple[float, float] = (5.6, 4.2)) -> tuple[Any, Any]:
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_title(title, fontsize=10)
    return figure, axes


def arrow(axes: Any, start: Vector, end: Vector, color: str, style: str = "-", width: float = 1.8) -> None:
    axes.annotate(
        "",
        end,
        start,
        arrowprops={"arrowstyle": "-|>", "color": color, "lw": width, "linestyle": style, "shrinkA": 0, "shrinkB": 0},
    )
    axes.plot(*np.array([start, end]).T, alpha=0)  # annotations do not widen the limits, points do


def label(axes: Any, point: Vector, text: str, color: str = BASE, offset: tuple[float, float] = (8, 4)) -> None:
    axes.annotate(text, point, xytext=offset, textcoords="offset points", color=color, ha="center", va="center")


def dot(axes: Any, point: Vector, color: str, size: float = 7) -> None:
    axes.plot(*point, "o", color=color, markersize=size, zorder=4)


def path(axes: Any, points: Any, color: str, style: str = "-", name: str | None = None, width: float = 2.0) -> None:
    axes.plot(*np.array(points).T, style, color=color, lw=width, label=name)


def arc(axes: Any, radius: float, first: float, last: float, center: Vector | None = None) -> None:
    origin = np.zeros(2) if center is None else center
    angles = np.linspace(first, last, 61)
    path(axes, [origin + direction(angle, radius) for angle in angles], FAINT, ":", width=1)
