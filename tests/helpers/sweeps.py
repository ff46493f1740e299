"""What tests of sweeps share: a recipe of a tiny pair, a score that is known, the table of results."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import yaml


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
