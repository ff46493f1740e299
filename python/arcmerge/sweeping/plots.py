"""The plots of a sweep: the scores of the candidates and of the parents, the curves of the parameters, the front."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arcmerge.merging.inspect.plots import load_pyplot
from arcmerge.sweeping.journal import Scored
from arcmerge.sweeping.results import best_of, front_of
from arcmerge.sweeping.scores import Score, Scoring

MAX_ROWS = 16  # candidates that get a row and a curve each
MAX_LABELS = 100  # cells of a heat map that show their score as text
MAX_NAMES = 12  # candidates of a front that have their names next to them

_STAR = {"marker": "*", "markersize": 16, "linestyle": "none", "color": "C3", "markeredgecolor": "white", "zorder": 3}


def plot(scored: Sequence[Scored], parents: Sequence[str], title: str, minimize: bool, file: Path) -> None:
    """Draw the scores of a sweep.

    One varied value gives a line, two give a heat map. Otherwise the plot has a row for each candidate or, for many
    candidates and for proposals, the scores in their order, with the curves of the parameters next to them. Bars are
    the standard deviations over the seeds. Hollow points, and numbers in parentheses, are estimates for candidates that
    a race has stopped.

    Args:
        scored: the candidates, parents included.
        parents: the names of the candidates that are parents.
        title: the name of the score.
        minimize: whether a lower score is better.
        file: the picture.

    Raises:
        ArcmergeError: if matplotlib is not installed.
    """
    pyplot = load_pyplot()
    best = best_of(scored, minimize)
    ends = [one for one in scored if one.name in parents]
    others = [one for one in scored if one.name not in parents] or ends
    varied = {tuple(one.varied) for one in others}
    names = varied.pop() if len(varied) == 1 else ()
    panels = 1 if len(names) in (1, 2) else 2
    figure, axes = pyplot.subplots(1, panels, figsize=(4 + 4 * panels, 4.5), layout="constrained", squeeze=False)
    left, right = axes[0, 0], axes[0, -1]
    if len(names) == 1:
        _draw_line(left, others, ends, best, names[0])
    elif len(names) == 2:
        _draw_heat_map(figure, left, others, best, names, title, minimize)
    elif len(others) <= MAX_ROWS and not any(one.proposed for one in others):
        _draw_rows(left, others, ends, title)
        _draw_curves(right, others)
    else:
        _draw_order(left, others, ends, best, minimize)
        if best:
            _draw_curves(right, [best])
    if not left.get_ylabel() and left.get_xlabel() != title:
        left.set_ylabel(title)
    others_text = f";  parents: {', '.join(f'{one.score:.5g} ({one.name})' for one in ends)}" if ends else ""
    spread = f" ± {best.deviation:.2g}" if best and best.by_seed else ""
    figure.suptitle(f"best: {best.score:.5g}{spread} ({best.name}){others_text}" if best else "no score is a number")
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def plot_front(scored: Sequence[Scored], scoring: Scoring, file: Path) -> None:
    """Draw every other score over the first one, with the Pareto front: a line if there are two scores.

    Args:
        scored: the candidates.
        scoring: how they were scored.
        file: the picture.

    Raises:
        ArcmergeError: if matplotlib is not installed.
    """
    pyplot = load_pyplot()
    first, *others = scoring.scores
    front = sorted(front_of(scored, scoring), key=lambda one: one.score)
    best = best_of(scored, first.minimize)
    figure, axes = pyplot.subplots(1, len(others), figsize=(6 * len(others), 4.8), layout="constrained", squeeze=False)
    for index, (other, panel) in enumerate(zip(others, axes[0], strict=True), 1):
        for group, style in (([one for one in scored if one not in front], "o"), (front, "D")):
            points = [[one.scores[at] for one in group] for at in (0, index)]
            line = "-" if style == "D" and len(others) == 1 else "none"
            steps = "steps-post" if first.minimize else "steps-pre"  # nothing lies beyond the corners
            label = "Pareto front" if style == "D" else "other candidates"
            color = "C0" if style == "D" else "0.6"
            panel.plot(*points, style, linestyle=line, drawstyle=steps, color=color, label=label if group else None)
        # Names stand on the better side of their points, where no candidate is.
        right, up = (-1 if score.minimize else 1 for score in (first, other))
        for one in front[:MAX_NAMES]:
            panel.annotate(
                one.name,
                (one.score, one.scores[index]),
                xytext=(6 * right, 4 * up),
                textcoords="offset points",
                fontsize=8,
                ha="right" if right < 0 else "left",
                va="top" if up < 0 else "bottom",
            )
        panel.margins(0.12)
        if best is not None:
            panel.plot(best.score, best.scores[index], **_STAR, label="best by the first score")
        panel.set_xlabel(_with_direction(first))
        panel.set_ylabel(_with_direction(other))
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    figure.suptitle(f"Pareto front: {len(front)} of {len(scored)} candidates")
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _with_direction(score: Score) -> str:
    return f"{score.title} ({'lower' if score.minimize else 'higher'} is better)"


def _draw_line(axes: Any, scored: Sequence[Scored], ends: Sequence[Scored], best: Scored | None, name: str) -> None:
    """The score over one value. Parents are points if the value is t, and horizontal lines otherwise."""
    on_line = [*scored, *ends] if name == "t" else scored
    axes.plot(*zip(*sorted({(one.varied[name], one.score) for one in on_line}), strict=True), "o-", color="C0")
    _draw_marks(axes, [one.varied[name] for one in scored], scored, ["C0"] * len(scored))
    if name == "t":
        for one, label in zip(ends, ("parents", None), strict=False):
            face = "white" if one.stopped else "black"
            axes.plot(one.varied[name], one.score, "s", color="black", markerfacecolor=face, zorder=3, label=label)
    else:
        _draw_parents(axes, ends)
    if best is not None and best in on_line:
        axes.plot(best.varied[name], best.score, **_STAR, label="best")
    axes.set_xlabel(name)
    axes.grid(alpha=0.3)
    if ends or best is not None:
        axes.legend()


def _draw_heat_map(
    figure: Any,
    axes: Any,
    scored: Sequence[Scored],
    best: Scored | None,
    names: Sequence[str],
    title: str,
    minimize: bool,
) -> None:
    """The score over two values, brighter is better: cells for a grid, points for the proposals of an optimizer."""
    columns, rows = (sorted({one.varied[name] for one in scored}) for name in names)
    colours = "viridis_r" if minimize else "viridis"
    star = [best.varied[name] for name in names] if best is not None and best in scored else []
    if len(columns) * len(rows) > 4 * len(scored):
        points = [[one.varied[name] for one in scored] for name in names]
        drawn = axes.scatter(*points, c=[one.score for one in scored], cmap=colours)
    else:
        values = np.full((len(rows), len(columns)), np.nan)
        labels = {}
        for one in scored:
            place = rows.index(one.varied[names[1]]), columns.index(one.varied[names[0]])
            values[place] = one.score
            spread = f"\n± {one.deviation:.1g}" if one.by_seed else ""
            labels[place] = f"({one.score:.4g})" if one.stopped else f"{one.score:.4g}{spread}"
        drawn = axes.imshow(np.ma.masked_invalid(values), cmap=colours, origin="lower", aspect="auto")
        axes.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
        axes.set_yticks(range(len(rows)), [f"{value:g}" for value in rows])
        if values.size <= MAX_LABELS:
            for (row, column), value in np.ndenumerate(values):
                bright = sum(drawn.cmap(drawn.norm(value))[:3]) > 1.5
                axes.text(
                    column,
                    row,
                    labels.get((row, column), ""),
                    ha="center",
                    va="center",
                    color="black" if bright else "white",
                )
        star = star and [columns.index(star[0]), rows.index(star[1]) + 0.3]  # above the number
    axes.plot(*([value] for value in star), **_STAR) if star else None
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    figure.colorbar(drawn, ax=axes, label=title)


def _draw_rows(axes: Any, scored: Sequence[Scored], ends: Sequence[Scored], title: str) -> None:
    """A row for each candidate, the first on top."""
    for index, one in enumerate(scored):
        axes.plot(one.score, index, "o", color=f"C{index}", markersize=9)
    colors = [f"C{index}" for index in range(len(scored))]
    _draw_marks(axes, range(len(scored)), scored, colors, sideways=True)
    rows = range(len(scored) + len(ends))
    axes.plot([one.score for one in ends], rows[len(scored) :], "s", color="black", markersize=9)
    axes.set_yticks(rows, [one.name for one in (*scored, *ends)])
    axes.invert_yaxis()
    axes.set_xlabel(title)
    axes.grid(alpha=0.3)
    if any(one.stopped for one in scored):
        axes.legend()


def _draw_order(
    axes: Any, scored: Sequence[Scored], ends: Sequence[Scored], best: Scored | None, minimize: bool
) -> None:
    """The scores in their order, and the best score so far."""
    scores = [one.score for one in scored]
    numbers = range(1, len(scored) + 1)
    axes.plot(numbers, scores, "o", color="C0", label="candidates")
    _draw_marks(axes, numbers, scored, ["C0"] * len(scored))
    so_far = (np.fmin if minimize else np.fmax).accumulate([np.nan if one.stopped else one.score for one in scored])
    axes.plot(numbers, so_far, drawstyle="steps-post", color="C1", label="best so far")
    _draw_parents(axes, ends)
    if best is not None and best in scored:
        axes.plot(scored.index(best) + 1, best.score, **_STAR, label="best")
    axes.set_xlabel("candidate")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_parents(axes: Any, ends: Sequence[Scored]) -> None:
    for one, style in zip(ends, ("--", ":"), strict=False):
        axes.axhline(one.score, color="black", linewidth=1, linestyle=style, label=f"parent, {one.name}")


def _draw_marks(
    axes: Any, places: Iterable[float], scored: Sequence[Scored], colors: Sequence[str], sideways: bool = False
) -> None:
    """The standard deviations over the seeds as bars, and stopped candidates as hollow points, once in the legend."""
    label: str | None = "stopped early (estimate)"
    for place, one, color in zip(places, scored, colors, strict=True):
        point = (one.score, place) if sideways else (place, one.score)
        if one.by_seed:
            bar = {"xerr" if sideways else "yerr": one.deviation}
            axes.errorbar(*point, **bar, fmt="none", ecolor=color, capsize=3)
        if one.stopped:
            axes.plot(*point, "o", color=color, markerfacecolor="white", zorder=3, label=label)
            label = None


def _draw_curves(axes: Any, scored: Sequence[Scored]) -> None:
    """The parameters over the layers, with a colour for each candidate and a line style for each of its values."""
    for index, one in enumerate(scored):
        curves = list(_curves(one.parameters))
        for (name, values), style in zip(curves, ("-", "--", "-.", ":") * len(curves), strict=False):
            heights = values if len(values) > 1 else values * 2
            label = one.name if len(curves) == 1 else f"{one.name}: {name}"
            axes.plot(np.linspace(0, 1, len(heights)), heights, style, marker="o", color=f"C{index}", label=label)
    axes.set_xticks([0, 1], ["first layer", "last layer"])
    names = {key.partition(":")[0] for one in scored for key in one.parameters}
    axes.set_ylabel(names.pop() if len(names) == 1 else "value")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -0.05), max(high, 1.05))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _curves(parameters: Mapping[str, Any]) -> Iterator[tuple[str, list[float]]]:
    """The name and the numbers of each curve of a candidate: a parameter has one, or one for each filter."""
    for key, value in parameters.items():
        entries = value if isinstance(value, list) and any(isinstance(entry, dict) for entry in value) else [value]
        for entry in entries:
            numbers = entry["value"] if isinstance(entry, dict) else entry
            if numbers is not None:
                name = f"{key}:{entry.get('filter') or 'others'}" if isinstance(entry, dict) else key
                yield name, list(numbers) if isinstance(numbers, list | tuple) else [numbers]
