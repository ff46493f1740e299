"""The plot of a sweep says what was best and what the parents have, whatever was varied."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arcmerge.sweeping.journal import Scored
from arcmerge.sweeping.plots import MAX_ROWS, plot, plot_front
from arcmerge.sweeping.scores import Scoring

PARENTS = [Scored(f"t={t}", {"t": t}, {"t": t}, score=9.0 + t) for t in (0, 1)]
LINE = [Scored(f"t={t}", {"t": t}, {"t": t}, score=8 + (t - 0.5) ** 2) for t in (0.25, 0.5, 0.75)]
AXIS = [Scored(f"t:mlp={t}", {"t:mlp": t}, {"t:mlp": t}, score=8 + t) for t in (0, 0.5, 1)]
GRID = [
    Scored(f"weight[0]={a}, density={b}", one, one, score=a + b)
    for a in (0, 0.5, 1)
    for b in (0, 1)
    for one in [{"weight[0]": a, "density": b}]
]
POINTS = [
    Scored(f"trial {n}", {"t": [n / 9, n / 8]}, {"t[0]": n / 9, "t[1]": n / 8}, score=8 + n / 9, proposed=True)
    for n in range(9)
]
CURVES = [
    Scored("v", {"t": [0, 1, 0]}, {}, score=7.0),
    Scored("two", {"t": [{"filter": "mlp", "value": 1}, {"value": [0, 1]}]}),
]
TRIALS = [
    Scored(f"trial {n}", {"t": [0, n / 9, 1]}, {f"t[{k}]": n / 9 for k in range(3)}, score=8 + n % 3, proposed=True)
    for n in range(9)
]
THREE = [
    Scored(f"density={n / 9:.2f}, lambda=1, weight[1]=2", one, one, score=8.0 + n)
    for n in range(9)
    for one in [{"density": n / 9, "lambda": 1.0, "weight[1]": 2.0}]
]
MANY = [Scored(f"curve {n}", {"t": [0, n / 99]}, {}, score=8.0 + n) for n in range(MAX_ROWS + 1)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The figures that were written."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures: list[Any] = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    yield figures
    monkeypatch.undo()
    pyplot.close("all")


@pytest.mark.parametrize(
    ("scored", "x", "panels", "best"),
    [
        (LINE, "t", 1, "t=0.5"),
        ([], "t", 1, "t=0"),
        (AXIS, "t:mlp", 1, "t:mlp=0"),
        (GRID, "weight[0]", 2, "weight[0]=0, density=0"),  # the scale of colours is one
        (POINTS, "t[0]", 2, "trial 0"),
        (CURVES, "perplexity", 2, "v"),
        (TRIALS, "candidate", 2, "trial 0"),
        ([*LINE, *CURVES], "perplexity", 2, "v"),
        (MANY, "candidate", 2, "curve 0"),
        (THREE, "perplexity", 2, "density=0.00, lambda=1, weight[1]=2"),
    ],
)
def test_best_and_parents_are_marked(
    tmp_path: Path, drawn: list[Any], scored: list[Scored], x: str, panels: int, best: str
) -> None:
    plot([*PARENTS, *scored], [one.name for one in PARENTS], "perplexity", True, tmp_path / "scores.png")
    assert (tmp_path / "scores.png").stat().st_size > 5000
    (figure,) = drawn
    axes = figure.axes
    assert len(axes) == panels
    assert axes[0].get_xlabel() == x
    assert f" ({best});  parents: 9 (t=0), 10 (t=1)" in figure.get_suptitle()
    values = {value for one in axes for line in one.lines for value in [*line.get_xdata(), *line.get_ydata()]}
    assert len(axes[0].images) + len(axes[0].collections) > 0 or {9.0, 10.0} <= values


@pytest.mark.parametrize("scored", [LINE, GRID, CURVES, TRIALS])
def test_without_parents_or_scores(tmp_path: Path, drawn: list[Any], scored: list[Scored]) -> None:
    none = [Scored(one.name, one.parameters, one.varied, score=math.nan, proposed=one.proposed) for one in scored]
    plot(none, [], "accuracy", False, tmp_path / "none.png")
    plot(scored, [], "accuracy", False, tmp_path / "some.png")
    assert [figure.get_suptitle()[:4] for figure in drawn] == ["no s", "best"]


@pytest.mark.parametrize("scored", [LINE, GRID, [CURVES[0], replace(CURVES[1], score=7.5)], TRIALS])
def test_stopped_candidates_are_hollow_and_seeds_have_bars(
    tmp_path: Path, drawn: list[Any], scored: list[Scored]
) -> None:
    marked = [
        replace(one, stopped=number == 0, by_seed=[one.score, one.score + 1] if number else ())
        for number, one in enumerate(scored)
    ]
    plot([*(replace(one, stopped=True) for one in PARENTS), *marked], ["t=0", "t=1"], "loss", True, tmp_path / "a.png")
    none = Scored("no number", {}, score=math.nan, by_seed=[math.nan, 1.0])
    plot([*marked, none], [], "loss", True, tmp_path / "b.png")
    assert math.isnan(none.deviation)
    figure = drawn[0]
    assert " ± 0.71 (" in figure.get_suptitle()
    assert scored[0].name not in figure.get_suptitle()
    axes = figure.axes[0]
    if scored is GRID:
        assert [text.get_text() for text in axes.texts[:2]] == ["(0)", "0.5\n± 0.7"]
    else:
        hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
        assert scored[0].score in [value for line in hollow for value in (*line.get_xdata(), *line.get_ydata())]
        assert len(axes.collections) == len(scored) - 1  # the bars


@pytest.mark.parametrize("others", [1, 2])
def test_the_front_is_drawn(tmp_path: Path, drawn: list[Any], others: int) -> None:
    class Lower:
        title, minimize, identity = "lower", True, ""

    points = [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0), (3.0, 3.0), (math.nan, 0.0)]
    scored = [Scored(str(n), {}, score=a, also=[b] * others) for n, (a, b) in enumerate(points)]
    plot_front(scored, Scoring([Lower()] * (1 + others)), tmp_path / "front.png")  # type: ignore[list-item]
    (figure,) = drawn
    assert figure.get_suptitle() == "Pareto front: 3 of 5 candidates"
    assert len(figure.axes) == others
    front = figure.axes[0].lines[1]
    assert list(front.get_xdata()) == [1, 2, 3]
    assert (front.get_linestyle() == "-") == (others == 1)
    assert [text.get_text() for text in figure.axes[0].texts] == ["0", "1", "2"]
