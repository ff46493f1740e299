"""Draws the pictures of the documentation.

    python docs/figures.py .demo docs/img         .demo: made by examples/tiny_pair.py

angles.png, curve.png and sweep*.png are made by the command line from the models in the folder. The drawings of the
methods are computed from the formulas of their pages, with vectors of two dimensions or made-up differences.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import difference_figures
import numpy as np
from drawing import BASE, FAINT, FIRST, RESULT, SECOND, THIRD, Vector, arc, arrow, direction, dot, label, path, plane
from matplotlib import pyplot
from matplotlib.patches import FancyBboxPatch

STEPS = np.linspace(0, 1, 101)
MARKS = (0.0, 0.25, 0.5, 0.75, 1.0)

RECIPE = """\
models: [{{model: {0}/first}}, {{model: {0}/second}}]
merge_method: slerp
base_model: {0}/second
dtype: bfloat16
parameters: {{t: {1}}}
"""
ONE_CURVE = "[0, 0.5, 1, 0.5, 0]"
FILTERS = (
    "[{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}, {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}, {value: 0.5}]"
)


def slerp(a: Vector, b: Vector, t: float, normalize: bool = False) -> Vector:
    """The formulas of the slerp page."""
    norms = np.linalg.norm(a), np.linalg.norm(b)
    angle = np.arccos(a @ b / (norms[0] * norms[1]))
    weights = np.sin([(1 - t) * angle, t * angle]) / np.sin(angle)
    if not normalize:
        return np.asarray(weights[0] * a + weights[1] * b)
    unit = weights[0] * a / norms[0] + weights[1] * b / norms[1]
    return np.asarray(((1 - t) * norms[0] + t * norms[1]) * unit / np.linalg.norm(unit))


# ---- the methods


def draw_slerp() -> Any:
    figure, axes = plane()
    a, b, zero = direction(12, 1.7), direction(95, 1.0), np.zeros(2)
    for end, color, name, offset in ((a, FIRST, "a (base, t = 0)", (8, -12)), (b, SECOND, "b (t = 1)", (-34, 2))):
        arrow(axes, zero, end, color)
        label(axes, end, name, color, offset)
    path(axes, [(1 - t) * a + t * b for t in STEPS], FAINT, "--", "linear: (1 - t) a + t b")
    path(axes, [slerp(a, b, t, True) for t in STEPS], THIRD, "-.", "slerp_normalize: true")
    path(axes, [slerp(a, b, t) for t in STEPS], RESULT, "-", "slerp")
    for t in MARKS:
        dot(axes, slerp(a, b, t), RESULT, 5)
    for t in MARKS[1:-1]:
        label(axes, slerp(a, b, t), f"{t:g}", RESULT, (-8, -12))
    arc(axes, 0.3, 12, 95)
    label(axes, direction(52, 0.4), "θ")
    axes.legend(loc="upper right", frameon=False, fontsize=9)
    axes.set_xlim(-0.55, 2.05)
    axes.set_ylim(-0.1, 1.75)
    return figure


def draw_nuslerp() -> Any:
    figure, axes = plane()
    zero, c = np.zeros(2), np.array([1.15, 0.55])
    x, y = c + direction(-15, 1.0), c + direction(75, 0.75)
    for end, color, name, offset in (
        (x, FIRST, "$x_0$", (10, -4)),
        (y, SECOND, "$x_1$", (4, 10)),
        (c, BASE, "c", (-10, 6)),
    ):
        dot(axes, end, color)
        label(axes, end, name, color, offset)
    arrow(axes, c, x, FIRST)
    arrow(axes, c, y, SECOND)
    label(axes, (c + x) / 2, "$d_0$", FIRST, (-4, -12))
    label(axes, (c + y) / 2, "$d_1$", SECOND, (-14, 0))
    path(axes, [c + slerp(x - c, y - c, t) for t in STEPS], RESULT, "-", "with base_model: about c")
    path(axes, [slerp(x, y, t) for t in STEPS], THIRD, "-.", "without: about the origin")
    dot(axes, c + slerp(x - c, y - c, 1 / 3), RESULT)
    label(axes, c + slerp(x - c, y - c, 1 / 3), "weights 2 and 1:  t = 1/3", RESULT, (70, 10))
    dot(axes, zero, FAINT, 4)
    label(axes, zero, "0", FAINT, (-8, 0))
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    axes.set_xlim(-0.1, 3.1)
    axes.set_ylim(-0.1, 2.0)
    return figure


def draw_multislerp() -> Any:
    figure, axes = plane()
    zero = np.zeros(2)
    inputs = [direction(5, 1.5), direction(40, 1.0), direction(110, 1.2)]
    weights, names = np.array([0.25, 0.25, 0.5]), ("$x_0$, weight 1", "$x_1$, weight 1", "$x_2$, weight 2")
    units = [x / np.linalg.norm(x) for x in inputs]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    length = sum(w * np.linalg.norm(x) for w, x in zip(weights, inputs, strict=True))
    result = length * mean / np.linalg.norm(mean)
    arc(axes, 1.0, -5, 115)
    label(axes, direction(-8), "1", FAINT, (0, 0))
    for x, unit, color, name, offset in zip(
        inputs, units, (FIRST, SECOND, THIRD), names, ((10, 12), (46, -4), (-30, 10)), strict=True
    ):
        arrow(axes, zero, x, color)
        dot(axes, unit, color, 5)
        label(axes, x, name, color, offset)
    dot(axes, mean, RESULT, 5)
    label(axes, mean, "m", RESULT, (-10, -4))
    arrow(axes, zero, result, RESULT)
    label(axes, result, "result: direction of m,\nmean length", RESULT, (52, 14))
    axes.set_xlim(-0.8, 2.0)
    axes.set_ylim(-0.2, 1.45)
    return figure


def draw_karcher() -> Any:
    figure, axes = plane()
    zero, degrees = np.zeros(2), (0.0, 20.0, 115.0)
    middle = float(np.mean(degrees))  # on a circle the Karcher mean of angles is their mean
    arc(axes, 1.0, -5, 125)
    for angle, color, name in zip(degrees, (FIRST, SECOND, THIRD), ("$u_0$", "$u_1$", "$u_2$"), strict=True):
        arrow(axes, zero, direction(angle), color)
        label(axes, direction(angle, 1.1), name, color, (0, 0))
    for radius, angle, color in zip((0.45, 0.65, 0.55), degrees, (FIRST, SECOND, THIRD), strict=True):
        path(axes, [direction(one, radius) for one in np.linspace(middle, angle, 41)], color, width=3)
        label(axes, direction(angle + (middle - angle) / 4, radius + 0.1), f"{angle - middle:+.0f}°", color, (0, 0))
    chord = sum(direction(angle) for angle in degrees)
    dot(axes, chord / np.linalg.norm(chord), FAINT)
    label(axes, chord / np.linalg.norm(chord), "normalised sum: the start", FAINT, (84, 2))
    arrow(axes, zero, direction(middle), RESULT)
    label(axes, direction(middle), "Karcher mean: the arcs sum to 0", RESULT, (84, 14))
    axes.set_xlim(-0.6, 2.0)
    axes.set_ylim(-0.1, 1.2)
    return figure


def draw_delerp() -> Any:
    figure, axes = plane()
    a, b, zero = direction(12, 1.7), direction(95, 1.0), np.zeros(2)

    def delerp(t: float) -> Vector:
        mixed = (1 - t) * a + t * b
        return np.asarray(np.linalg.norm(a) * mixed / np.linalg.norm(mixed))

    for end, color, name, offset in ((a, FIRST, "a (base, t = 0)", (10, -12)), (b, SECOND, "b", (-10, 2))):
        arrow(axes, zero, end, color)
        label(axes, end, name, color, offset)
    path(axes, [(1 - t) * a + t * b for t in STEPS], FAINT, "--", "linear: (1 - t) a + t b")
    path(axes, [delerp(t) for t in STEPS], RESULT, "-", "delerp: as long as a")
    for t in MARKS:
        dot(axes, delerp(t), RESULT, 5)
        path(axes, [(1 - t) * a + t * b, delerp(t)], FAINT, ":", width=1)
    for t in MARKS[1:]:
        label(axes, delerp(t), f"{t:g}", RESULT, (8, 8))
    axes.legend(loc="lower left", frameon=False, fontsize=9)
    axes.set_xlim(-0.55, 2.05)
    axes.set_ylim(-0.45, 1.85)
    return figure


def draw_geometric_median() -> Any:
    figure, axes = plane()
    inputs = np.array([[0.3, 0.4], [0.9, 0.2], [0.5, 1.1], [1.2, 0.9], [4.2, 1.6]])
    median = inputs.mean(axis=0)
    for _ in range(1000):  # the iteration of the page
        pulls = 1 / np.linalg.norm(inputs - median, axis=1)
        median = pulls @ inputs / pulls.sum()
    for x in inputs:
        path(axes, [x, median], FAINT, "--", width=1)
        dot(axes, x, FIRST)
        unit = (x - median) / np.linalg.norm(x - median)
        arrow(axes, median, median + 0.25 * unit, SECOND)
    label(axes, inputs[-1], "far from all others", FIRST, (-10, 14))
    dot(axes, inputs.mean(axis=0), THIRD, 9)
    label(axes, inputs.mean(axis=0), "mean", THIRD, (24, -8))
    dot(axes, median, RESULT, 9)
    label(axes, median, "geometric median:\nthe unit vectors sum to 0", RESULT, (110, -34))
    axes.set_xlim(-0.1, 4.6)
    axes.set_ylim(-0.3, 2.0)
    return figure


def draw_linear() -> Any:
    figure, axes = plane()
    inputs = [np.array([0.2, 0.2]), np.array([2.2, 0.5]), np.array([0.9, 1.7])]
    weights = np.array([1.0, 2.0, 1.0])
    axes.fill(*np.array(inputs).T, color="#eeeeee", zorder=0)
    for x, w, color, offset in zip(
        inputs, weights, (FIRST, SECOND, THIRD), ((-42, -6), (42, -6), (0, 12)), strict=True
    ):
        dot(axes, x, color)
        label(axes, x, f"weight {w:g}", color, offset)
    result = sum(w * x for w, x in zip(weights, inputs, strict=True)) / weights.sum()
    for x, w in zip(inputs, weights, strict=True):
        path(axes, [x, result], FAINT, "--", width=0.8 * w)
    dot(axes, result, RESULT, 9)
    label(axes, result, "result", RESULT, (0, 13))
    axes.set_xlim(-0.6, 3.0)
    axes.set_ylim(-0.1, 2.0)
    return figure


def draw_task_arithmetic() -> Any:
    figure, axes = plane()
    c = np.array([0.3, 0.3])
    first, second = np.array([1.6, 0.1]), np.array([0.4, 1.3])
    weights, scale = (1.0, 0.7), 0.8
    for d, color, name, offset in ((first, FIRST, "$x_1$", (10, -6)), (second, SECOND, "$x_2$", (-12, 4))):
        arrow(axes, c, c + d, color)
        dot(axes, c + d, color, 5)
        label(axes, c + d, name, color, offset)
    label(axes, c + first / 2, "$d_1$", FIRST, (0, -10))
    label(axes, c + second / 2, "$d_2$", SECOND, (-12, 0))
    dot(axes, c, BASE)
    label(axes, c, "base c", BASE, (-8, -12))
    total = weights[0] * first + weights[1] * second
    path(axes, [c + first, c + total, c + weights[1] * second], FAINT, "--", width=1)
    arrow(axes, c, c + total, FAINT, "--", 1.2)
    label(axes, c + total, r"$c + w_1 d_1 + w_2 d_2$", FAINT, (22, 10))
    dot(axes, c + scale * total, RESULT, 9)
    label(axes, c + scale * total, "result, lambda 0.8", RESULT, (-64, 6))
    axes.set_xlim(0, 3.2)
    axes.set_ylim(0, 1.9)
    return figure


def draw_model_stock() -> Any:
    figure, axes = plane()
    c, first, second = np.array([0.2, 0.5]), np.array([2.0, 1.5]), np.array([2.2, -0.1])
    d = first - c, second - c
    cosine = d[0] @ d[1] / (np.linalg.norm(d[0]) * np.linalg.norm(d[1]))
    t = 2 * cosine / (1 + cosine)
    mean = (first + second) / 2
    arrow(axes, c, first, FIRST)
    arrow(axes, c, second, SECOND)
    path(axes, [first, second], FAINT, "--", width=1)
    path(axes, [c, mean], RESULT, ":", width=1.5)
    for point, color, name, offset in (
        (c, BASE, "base c", (-6, -14)),
        (first, FIRST, "$x_1$", (12, 4)),
        (second, SECOND, "$x_2$", (12, -4)),
        (mean, FAINT, "mean (t = 1)", (42, 0)),
    ):
        dot(axes, point, color)
        label(axes, point, name, color, offset)
    result = (1 - t) * c + t * mean
    dot(axes, result, RESULT, 9)
    label(axes, result, f"result: cos θ = {cosine:.2f}\ngives t = {t:.2f}", RESULT, (-24, -24))
    start, end = (np.degrees(np.arctan2(*one[::-1])) for one in (d[1], d[0]))
    arc(axes, 0.5, start, end, c)
    label(axes, c + direction((start + end) / 2 + 7, 0.62), "θ")
    axes.set_xlim(-0.1, 3.1)
    axes.set_ylim(-0.4, 1.8)
    return figure


def draw_nearswap() -> Any:
    figure, axes = pyplot.subplots(figsize=(5.6, 3.8), layout="constrained")
    difference, t = np.linspace(-1, 1, 401), 0.3
    axes.plot(difference, difference, "--", color=SECOND, lw=1.5, label="b")
    axes.axhline(0, color=FIRST, lw=1.5, linestyle="--", label="a (base)")
    axes.plot(difference, np.clip(difference, -t, t), color=RESULT, lw=2.5, label="result, t = 0.3")
    axes.axvspan(-t, t, color="#eeeeee", zorder=0)
    axes.annotate("near: b itself", (0, -0.75), ha="center", color=BASE)
    axes.annotate("far: a, moved\nby t towards b", (0.68, -0.3), ha="center", color=BASE)
    axes.set_xlabel("b - a, for one value")
    axes.set_ylabel("result - a")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", frameon=False)
    return figure


def draw_passthrough() -> Any:
    figure, axes = pyplot.subplots(figsize=(5.6, 4.0), layout="constrained")
    axes.axis("off")
    sources = {"A": (0.0, FIRST, 6), "B": (3.8, SECOND, 6)}

    def box(x: float, y: float, text: str, color: str) -> None:
        axes.add_patch(
            FancyBboxPatch((x, y), 1.2, 0.62, boxstyle="round,pad=0.02", facecolor=color, alpha=0.25, edgecolor=color)
        )
        axes.text(x + 0.6, y + 0.31, text, ha="center", va="center", fontsize=9)

    for name, (x, color, count) in sources.items():
        axes.text(x + 0.6, -0.25, f"model {name}", ha="center", va="top")
        for layer in range(count):
            box(x, layer, f"{name}{layer}", color)
    chosen = [("A", layer) for layer in range(4)] + [("B", layer) for layer in range(2, 6)]
    axes.text(2.5, -0.25, "result", ha="center", va="top")
    for place, (name, layer) in enumerate(chosen):
        x, color, _ = sources[name]
        y = place * 0.75
        box(1.9, y, f"{place}  ({name}{layer})", color)
        start = x + 1.22 if name == "A" else x - 0.02
        end = 1.88 if name == "A" else 3.12
        axes.plot([start, end], [layer + 0.31, y + 0.31], color=color, lw=1, alpha=0.6)
    axes.set_xlim(-0.1, 5.1)
    axes.set_ylim(-0.7, 6.1)
    return figure


def draw_gradient() -> Any:
    """The values that `t: [0, 0.5, 1, 0.5, 0]` and a list with filters give to 26 layers."""
    figure, axes = pyplot.subplots(figsize=(6.8, 3.4), layout="constrained")
    layers = np.arange(26)
    depth = layers / 25
    whole = [0, 0.5, 1, 0.5, 0]
    attention = [0, 0.25, 0.5, 0.75, 1]
    for values, style, color, name in (
        (whole, "o-", RESULT, "t: [0, 0.5, 1, 0.5, 0]"),
        (attention, "s--", FIRST, "{filter: self_attn, value: [0, 0.25, 0.5, 0.75, 1]}"),
        ([0.3, 0.3], "^:", THIRD, "{value: 0.3}"),
    ):
        found = np.interp(depth * (len(values) - 1), range(len(values)), values)
        axes.plot(layers, found, style, color=color, markersize=4, lw=1, label=name)
    axes.set_xlabel("layer of 26")
    axes.set_ylabel("t")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(0.0, 1.12), ncols=2, frameon=False)
    return figure


DRAWINGS: dict[str, Callable[[], Any]] = {
    "slerp": draw_slerp,
    "nuslerp": draw_nuslerp,
    "multislerp": draw_multislerp,
    "karcher": draw_karcher,
    "delerp": draw_delerp,
    "geometric_median": draw_geometric_median,
    "linear": draw_linear,
    "task_arithmetic": draw_task_arithmetic,
    "model_stock": draw_model_stock,
    "nearswap": draw_nearswap,
    "passthrough": draw_passthrough,
    "gradient": draw_gradient,
    **difference_figures.DRAWINGS,
}


def command(*arguments: str) -> None:
    program = "import sys; from arcmerge.cli import main; sys.exit(main(sys.argv[1:]))"
    subprocess.run([sys.executable, "-c", program, *arguments], check=True)


def main() -> None:
    models, out = (Path(argument) for argument in sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWINGS.items():
        figure = draw()
        figure.savefig(out / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
        pyplot.close(figure)
    with tempfile.TemporaryDirectory() as folder:
        recipe, filters = Path(folder) / "curve.yml", Path(folder) / "filters.yml"
        recipe.write_text(RECIPE.format(models, ONE_CURVE))
        filters.write_text(RECIPE.format(models, FILTERS))
        text, window = ("--text", f"{models}/validation.txt"), ("--window", "128")
        command("plan", str(filters), "--plot", str(out / "curve.png"), "-q")
        command("inspect", f"{models}/first", f"{models}/second", "--plot", str(out / "angles.png"), "-q")
        # The validation text has a part for each half of the topics, and each fine-tune knows one of them better.
        halves = (models / "validation.txt").read_text(encoding="utf-8")
        middle = halves.index("\n\n", len(halves) // 2)
        for name, half in (("first-half", halves[:middle]), ("second-half", halves[middle:])):
            (models / f"{name}.txt").write_text(half, encoding="utf-8")
        both = ("--text", f"{models}/first-half.txt", "--also", f"text:{models}/second-half.txt")
        sweeps = {
            "sweep": (*text, "--t", "0:1:0.05"),
            "sweep-optimize": (*text, "--optimize", "40"),
            "sweep-race": (*text, "--t", "0:1:0.05", "--race"),
            "sweep-front": (*both, "--t", "0:1:0.05"),
        }
        for name, arguments in sweeps.items():
            results = Path(folder) / name
            command("sweep", str(recipe), *window, *arguments, "--out", str(results), "-q")
            plot = "front.png" if name == "sweep-front" else "scores.png"
            (out / f"{name}.png").write_bytes((results / plot).read_bytes())


if __name__ == "__main__":
    main()
