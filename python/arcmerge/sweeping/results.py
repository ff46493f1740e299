"""The results of a sweep: the best candidate, the Pareto front and the tables."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from arcmerge.sweeping.journal import Scored
from arcmerge.sweeping.scores import Scoring

TABLES = ("results.csv", "results.json")


def best_of(scored: Sequence[Scored], minimize: bool) -> Scored | None:
    """The first candidate with the best score, or None if no candidate has one. Stopped candidates have none."""
    found = [one for one in scored if one.score == one.score and not one.stopped]
    key = (lambda one: one.score) if minimize else (lambda one: -one.score)
    return min(found, key=key) if found else None


def front_of(scored: Sequence[Scored], scoring: Scoring) -> list[Scored]:
    """The Pareto front: the candidates that no other one equals or beats in every score, and beats in one."""
    signs = [1 if score.minimize else -1 for score in scoring.scores]
    losses = [[sign * score for sign, score in zip(signs, _scores(one, scoring), strict=True)] for one in scored]
    whole = [loss for loss in losses if not any(map(math.isnan, loss))]

    def is_beaten(loss: list[float]) -> bool:
        return any(other != loss and all(b <= a for a, b in zip(loss, other, strict=True)) for other in whole)

    return [one for one, loss in zip(scored, losses, strict=True) if loss in whole and not is_beaten(loss)]


def write_tables(scored: Sequence[Scored], scoring: Scoring, recipe_of: Callable[[Scored], str], folder: Path) -> None:
    """Write results.csv, with a row per candidate, and results.json, with all parameters and the recipes of the front.

    Args:
        scored: the candidates.
        scoring: how they were scored.
        recipe_of: gives the recipe of a candidate.
        folder: the folder of the tables.
    """
    names = list(dict.fromkeys(name for one in scored for name in one.varied))
    front = front_of(scored, scoring) if len(scoring.scores) > 1 else []
    rows, entries = [], []
    for one in scored:
        found = _results(one, scoring, one in front)
        numbers = {name: one.varied.get(name, "") for name in names}
        rows.append({"candidate": one.name, **numbers, **found, "seconds": f"{one.seconds:.2f}"})
        entry = {key: getattr(one, key) for key in ("name", "parameters", "varied", "proposed", "seconds")} | found
        if one in front:
            entry["recipe"] = recipe_of(one)
        entries.append({key: None if value != value else value for key, value in entry.items()})  # JSON has no NaN
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: str(value).lower() if isinstance(value, bool) else value for key, value in row.items()} for row in rows
    )
    write_whole(folder / TABLES[0], table.getvalue())
    write_whole(folder / TABLES[1], json.dumps(entries, indent=2) + "\n")


def _results(one: Scored, scoring: Scoring, in_front: bool) -> dict[str, Any]:
    """What the tables say about the scores of a candidate, by column."""
    found: dict[str, Any] = {"score": one.score}
    if len(scoring.scores) > 1:
        found |= {
            score.title: value for score, value in zip(scoring.scores[1:], _scores(one, scoring)[1:], strict=True)
        }
        found["front"] = in_front
    if scoring.seeds:
        found["deviation"] = one.deviation if one.by_seed else math.nan
        by_seed = _padded(one.by_seed, len(scoring.seeds))
        found |= {f"seed {seed}": value for seed, value in zip(scoring.seeds, by_seed, strict=True)}
    if scoring.unit:
        found |= {scoring.unit: one.amount, "stopped": one.stopped}
    return found


def _scores(one: Scored, scoring: Scoring) -> list[float]:
    return _padded(one.scores, len(scoring.scores))


def _padded(values: Sequence[float], count: int) -> list[float]:
    """`count` values, NaN for those that a candidate does not have, as a stopped one or one of a damaged journal."""
    return [*values, *[math.nan] * count][:count]


def write_whole(file: Path, text: str) -> None:
    """Replace a file atomically."""
    new = file.with_name(f".{file.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(file)
