"""The results of a sweep: the best candidate and the tables."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from arcmerge.sweeping.journal import Scored

TABLES = ("results.csv", "results.json")


def best_of(scored: Sequence[Scored], minimize: bool) -> Scored | None:
    """The first candidate with the best score, or None if no candidate has one."""
    found = [one for one in scored if one.score == one.score]
    key = (lambda one: one.score) if minimize else (lambda one: -one.score)
    return min(found, key=key) if found else None


def write_tables(scored: Sequence[Scored], folder: Path) -> None:
    """Write results.csv, with a row per candidate, and results.json, with all parameters."""
    names = list(dict.fromkeys(name for one in scored for name in one.varied))
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["candidate", *names, "score", "seconds"])
    for one in scored:
        writer.writerow([one.name, *(one.varied.get(name, "") for name in names), one.score, f"{one.seconds:.2f}"])
    write_whole(folder / TABLES[0], table.getvalue())
    entries = [{**vars(one), "score": one.score if one.score == one.score else None} for one in scored]
    write_whole(folder / TABLES[1], json.dumps(entries, indent=2) + "\n")


def write_whole(file: Path, text: str) -> None:
    """Replace a file atomically."""
    new = file.with_name(f".{file.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(file)
