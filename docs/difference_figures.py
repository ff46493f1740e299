"""The drawings of the methods that keep a part of each difference, from made-up differences of heavy tails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from drawing import BASE, FAINT, FIRST, RESULT, SECOND, THIRD, Vector
from matplotlib import pyplot

from arcmerge.merging.methods.masks import mask_key
from arcmerge.ops.philox import uniform16

TRIMMED = "#dddddd"


def differences(count: int) -> Vector:
    """Elements of a difference: most are small, a few are large."""
    return np.asarray(np.random.default_rng(5).standard_t(4, count))


def chart(width: float = 5.6, height: float = 3.4) -> tuple[Any, Any]:
    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def magnitudes(first: float, last: float) -> tuple[Any, Any, Vector]:
    """A histogram of magnitudes in which the share from `first` to `last` of the largest is kept, and its two cuts."""
    figure, axes = chart()
    sizes = np.sort(np.abs(differences(40_000)))[::-1]
    cuts = np.array([sizes[int(share * (sizes.size - 1))] for share in (first, last)])
    edges = np.unique([*np.linspace(0, 6, 61), *cuts])
    heights = np.histogram(sizes, edges)[0] / np.diff(edges) / sizes.size
    axes.stairs(heights, edges, fill=True, color=TRIMMED)
    axes.stairs(np.where((edges[:-1] >= cuts[1]) & (edges[:-1] < cuts[0]), heights, 0), edges, fill=True, color=FIRST)
    axes.set_yscale("log")
    axes.set_xlim(0, 6)
    axes.set_ylim(1e-3, 2)
    axes.set_yticks([])
    axes.minorticks_off()
    axes.set_xlabel("|d|, the magnitude of an element of a difference")
    axes.set_ylabel("how many elements have it (log)")
    return figure, axes, cuts


def cut_line(axes: Any, cut: float, text: str) -> None:
    axes.axvline(cut, color=RESULT, lw=1.5)
    axes.annotate(text, (cut, 1.6), xytext=(6, 0), textcoords="offset points", va="top", color=RESULT)


def draw_ties() -> Any:
    figure, axes, (_, cut) = magnitudes(0.0, 0.2)
    cut_line(axes, cut, "the threshold at density 0.2")
    axes.annotate("80 %\ntrimmed", (cut / 2, 0.05), ha="center", color=BASE)
    axes.annotate("20 % kept", (2.2, 0.01), color="white")
    return figure


def draw_breadcrumbs() -> Any:
    figure, axes, (upper, lower) = magnitudes(0.02, 0.42)
    cut_line(axes, upper, "gamma 0.02:\nthe largest 2 %\nare removed")
    cut_line(axes, lower, "density 0.4")
    axes.annotate("58 %\nremoved", (lower / 2, 0.02), ha="center", color=BASE)
    axes.annotate("40 % kept", ((upper + lower) / 2, 0.02), ha="center", color="white")
    return figure


def elements(values: Vector, used: Vector, results: Vector, notes: list[str], ylabel: str) -> Any:
    """A row of elements, each with the values of three models, hollow where they are not used, and the result."""
    figure, axes = chart(6.2)
    depth = min(values.min(), results.min(), 0.0)
    for model, color in enumerate((FIRST, SECOND, THIRD)):
        places = np.arange(len(values)) + 0.2 * (model - 1.5)
        fills = [color if one else "white" for one in used[:, model]]
        axes.bar(places, values[:, model], 0.17, color=fills, edgecolor=color)
        axes.bar(0, 0, 0, color=color, label=f"model {model + 1}")
    axes.bar(np.arange(len(values)) + 0.3, results, 0.17, color=RESULT, label="result")
    for element, note in enumerate(notes):
        axes.annotate(note, (element, depth - 0.1), ha="center", va="top", fontsize=9)
    axes.axhline(0, color=BASE, lw=0.8)
    axes.set_xticks(range(len(values)), [f"element {element + 1}" for element in range(len(values))])
    axes.xaxis.set_ticks_position("top")
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_yticks([])
    axes.set_ylabel(ylabel)
    axes.set_ylim(depth - (0.5 if any(notes) else 0.1), max(values.max(), results.max()) + 0.1)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, frameon=False, fontsize=9)
    return figure


def draw_election() -> Any:
    votes = np.array([[0.8, 0.5, 0.7], [0.9, -0.4, 0.3], [-0.9, 0.5, 0.0], [0.4, -0.8, -0.3]])
    sums = votes.sum(1)
    agrees = votes * np.where(sums >= 0, 1, -1)[:, None] > 0
    results = np.array([value[one].mean() for value, one in zip(votes, agrees, strict=True)])
    notes = [f"sum {total:+.1f}\nelects {'+' if total >= 0 else '-'}" for total in sums]
    return elements(votes, agrees, results, notes, "weighted difference")


def draw_ram() -> Any:
    """The counts of the tensor are made up: models 1 to 3 share 10, 20 and 40 % of what they have changed alone."""
    values = np.array([[0.8, 0.5, 0.0], [0.0, 0.9, 0.0], [-0.7, 0.5, -0.4], [0.0, 0.0, 0.6]])
    changed = values != 0
    alone = changed.sum(1) == 1
    factors = 1 + 0.1 * np.clip([0.1, 0.2, 0.4], 0, 0.2)
    results = np.where(alone, values @ factors, values.sum(1) / changed.sum(1))
    notes = ["of one model:\nadded, amplified" if one else "of several:\ntheir mean" for one in alone]
    return elements(values, changed, results, notes, "difference")


def draw_magmax() -> Any:
    values = np.array([[0.8, 0.5, 0.7], [0.5, -0.9, 0.3], [-0.3, 0.5, 0.2], [-0.4, -0.6, -0.2]])
    largest = np.abs(values) == np.abs(values).max(1, keepdims=True)
    return elements(values, largest, values[largest], [""] * 4, "difference")


def draw_median() -> Any:
    values = np.array([[0.8, 0.5, 0.7], [0.3, -0.9, 0.4], [-0.3, 0.5, 0.4], [-0.4, -0.5, 0.9]])
    results = np.median(values, axis=1)
    return elements(values, values == results[:, None], results, [""] * 4, "value")


def draw_sce() -> Any:
    """The variance of twelve elements over three models; the largest third is selected."""
    figure, axes = chart(6.2, 3.0)
    inputs = np.random.default_rng(8).standard_t(4, (12, 3))
    places, variances = np.arange(12), inputs.var(axis=1)
    selected = variances >= np.sort(variances)[-4]
    axes.bar(places, variances / variances.max(), 0.8, color=np.where(selected, RESULT, TRIMMED), zorder=0)
    axes.axhline(0, color=BASE, lw=0.8)
    for model, color in enumerate((FIRST, SECOND, THIRD)):
        axes.plot(places, inputs[:, model] / 6 - 1, "o", color=color, markersize=5, label=f"model {model + 1}")
    axes.vlines(places, inputs.min(1) / 6 - 1, inputs.max(1) / 6 - 1, color=FAINT, lw=0.8, zorder=0)
    axes.set_xticks([])
    axes.set_yticks([-1, 0.5], ["differences", "their variance"])
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xlabel("12 elements of a tensor; select_topk 0.34 takes the 4 of the largest variance")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.15), ncols=3, frameon=False, fontsize=9)
    return figure


def draw_arcee_fusion() -> Any:
    figure, axes = chart()
    sizes = np.sort(np.abs(differences(40_000)) * np.abs(np.random.default_rng(6).normal(size=40_000)))
    first, middle, third = (sizes[int(q * (sizes.size - 1))] for q in (0.25, 0.5, 0.75))
    threshold = middle + 1.5 * (third - first)
    edges = np.unique([*np.linspace(0, 4, 81), threshold])
    heights = np.histogram(sizes, edges)[0] / np.diff(edges)
    axes.stairs(heights, edges, fill=True, color=TRIMMED)
    axes.stairs(np.where(edges[:-1] >= threshold, heights, 0), edges, fill=True, color=FIRST)
    top = heights.max()
    axes.axvspan(first, third, ymax=0.9, color=SECOND, alpha=0.25, lw=0)
    axes.axvline(middle, ymax=0.9, color=SECOND, lw=1.5)
    axes.annotate(
        "the middle half of all\nelements, and the median",
        (third, 0.75 * top),
        xytext=(4, 0),
        textcoords="offset points",
        color=SECOND,
    )
    axes.axvline(threshold, ymax=0.6, color=RESULT, lw=1.5)
    axes.annotate(
        "median + 1.5 times the width\nof the middle half: from here on\nthe other model is taken",
        (threshold, 0.45 * top),
        xytext=(4, 0),
        textcoords="offset points",
        color=RESULT,
    )
    axes.set_xlim(0, 4)
    axes.set_yticks([])
    axes.set_xlabel("importance of an element")
    axes.set_ylabel("how many elements have it")
    return figure


def draw_keep() -> Any:
    """The probability that an element is kept, by its rank, in four methods of density 0.5."""
    figure, axes = chart()
    for ranks, chances, color, style, name in (
        ([0, 0.5, 0.5, 1], [0, 0, 1, 1], FIRST, "-", "ties"),
        ([0, 0.4, 0.4, 0.9, 0.9, 1], [0, 0, 1, 1, 0, 0], THIRD, "--", "breadcrumbs, gamma 0.1"),
        ([0, 1], [0.5, 0.5], SECOND, "-", "dare"),
        ([0, 1], [0.2, 0.8], RESULT, "-", "della, epsilon 0.3"),
    ):
        axes.plot(ranks, chances, style, color=color, lw=2, label=name)
    axes.set_xlabel("rank of |d|, from the smallest (0) to the largest (1)")
    axes.set_ylabel("probability to be kept")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    return figure


def draw_dare() -> Any:
    figure, axes = chart(6.2, 3.0)
    values = differences(40)
    kept = uniform16(mask_key(0, "example", 0), values.size).numpy() < 65536 * 0.3
    ratio = np.abs(values).sum() / np.abs(values[kept]).sum()
    places = np.arange(values.size)
    axes.bar(places, np.where(kept, ratio * values, 0), 0.8, color=RESULT, label=f"kept, times {ratio:.1f}")
    axes.bar(places, values, 0.8, facecolor="none", edgecolor=FIRST, lw=1, label="the difference")
    axes.axhline(0, color=BASE, lw=0.8)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xlabel("elements of a tensor, density 0.3")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.15), ncols=2, frameon=False, fontsize=9)
    return figure


def draw_della() -> Any:
    figure, axes = chart()
    ranks = np.arange(1, 13)
    for epsilon, color in ((0.4, THIRD), (0.15, RESULT)):
        chances = 0.5 - epsilon + 2 * epsilon * (ranks - 1) / (ranks.size - 1)
        axes.plot(ranks, chances, "o-", color=color, lw=1, markersize=5, label=f"della, epsilon {epsilon:g}")
    axes.axhline(0.5, color=SECOND, lw=1.5, linestyle="--", label="dare")
    axes.annotate("density", (1, 0.5), xytext=(2, 5), textcoords="offset points", color=SECOND)
    axes.set_ylim(0, 1)
    axes.set_xticks(ranks)
    axes.set_xlabel("rank of |d| in a row of 12 elements")
    axes.set_ylabel("probability to be kept")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    return figure


def draw_masks() -> Any:
    """The masks of one tensor at nine densities."""
    figure, axes = chart(6.4, 2.8)
    numbers = uniform16(mask_key(0, "model.norm.weight", 0), 48).numpy()
    densities = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    masks = [numbers + 0.5 < 65536 * density for density in densities]
    axes.imshow(masks, cmap="Blues", vmax=1.3, aspect="auto", interpolation="nearest", origin="lower")
    for line in range(len(densities)):
        axes.axhline(line + 0.5, color="white", lw=1.5)
    axes.set_yticks(range(len(densities)), [f"{density:g}" for density in densities])
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xlabel("elements of a tensor: kept where blue")
    axes.set_ylabel("density")
    return figure


DRAWINGS: dict[str, Callable[[], Any]] = {
    "keep": draw_keep,
    "election": draw_election,
    "ties": draw_ties,
    "breadcrumbs": draw_breadcrumbs,
    "dare": draw_dare,
    "della": draw_della,
    "masks": draw_masks,
    "sce": draw_sce,
    "ram": draw_ram,
    "arcee_fusion": draw_arcee_fusion,
    "magmax": draw_magmax,
    "median": draw_median,
}
