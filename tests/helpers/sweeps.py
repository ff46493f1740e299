"""What tests of sweeps share: a recipe of a tiny pair, scores that are known, a random method, the table of results."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from arcmerge.merging.methods.linear import Linear
from arcmerge.merging.methods.method import Arguments, Array
from arcmerge.sweeping.scores import Item, MeanScore


class LeastT:
    """A score that is known: the distance of the first weight's t from 0.62; counts its calls."""

    title, minimize, identity = "distance", True, "distance"

    def __init__(self, fails_at: int | None = None) -> None:
        self.calls = 0
        self.fails_at = fails_at

    def __call__(self, model: Any) -> float:
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        self.calls += 1
        t = yaml.safe_load(model.recipe)["parameters"]["t"]
        numbers = t if isinstance(t, list) else [t]
        numbers = [entry["value"] if isinstance(entry, dict) else entry for entry in numbers]
        flat = [number for entry in numbers for number in (entry if isinstance(entry, list) else [entry])]
        return sum(abs(number - 0.62) for number in flat)


def recipe(models: Path, t: Any = 0.3) -> dict[str, Any]:
    listed = [{"model": str(models / name)} for name in ("gemma-a", "gemma-b")]
    first = listed[0]["model"]
    return {
        "merge_method": "slerp",
        "dtype": "bfloat16",
        "base_model": first,
        "models": listed,
        "parameters": {"t": t},
    }


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


class KnownLosses(MeanScore):
    """A score with items whose losses are known: they follow t and the seed in the recipe; counts what it scores.

    The loss of item i is (t - 0.62)^2 + slope_i (t - 0.62) + noise of the item, which all candidates share, and of the
    candidate.
    """

    title, minimize, identity, unit = "mean loss", True, "mean loss", "tokens"

    def __init__(self, count: int = 60, fails_at: int | None = None, block: int = 60) -> None:
        self.block = block
        generator = np.random.default_rng(1)
        self.slopes = generator.normal(size=count) * 0.5
        self.slopes -= self.slopes.mean()
        self.shared = generator.normal(size=count)
        self.scored = self.calls = 0
        self.fails_at = fails_at

    def items(self, model: Any) -> list[Item]:
        return [Item(10, (), index) for index in range(len(self.slopes))]

    def losses(self, model: Any, items: Sequence[Item]) -> list[float]:
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        self.calls += 1
        self.scored += len(items)
        document = yaml.safe_load(model.recipe)
        t = document["parameters"].get("t", document["parameters"].get("weight"))
        chosen = [item.answer for item in items]
        own = (
            np.random.default_rng([round(abs(t) * 1000), document.get("seed", 0)]).normal(size=len(self.slopes)) * 0.01
        )
        losses = self.shared + (t - 0.62) ** 2 + self.slopes * (t - 0.62) + own - own.mean()
        return [float(10 * (loss + 0.01 * document.get("seed", 0))) for loss in losses[chosen]]

    def of_mean(self, loss: float) -> float:
        return loss


class Chance(Linear):
    """A random method: the seed draws the weight of the first of two models."""

    name, title, random = "chance", "Chance", True

    def weights(self, arguments: Arguments) -> Array:
        drawn = np.random.default_rng(arguments.seed).random()
        return super().weights(arguments) * np.array([drawn, 1 - drawn])
