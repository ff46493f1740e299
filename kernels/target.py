"""Which GPU a launch is for: launchers choose tiles, warps and stages by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import triton

Configuration = TypeVar("Configuration")


def architecture() -> str:
    """Of the active driver: "sm_80" and so on, or "gfx942"; in the interpreter, which has none, "sm_80"."""
    if triton.knobs.runtime.interpret:
        return "sm_80"
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).partition(":")[0]


def configuration(table: Mapping[str, Configuration], name: str | None = None) -> Configuration:
    """The row of a launcher's table for an architecture, by default the active one.

    A row serves newer GPUs of NVIDIA too, up to the next row; sm_80 is the least that the kernels know. AMD's GPUs
    other than gfx942 take its row.
    """
    name = name or architecture()
    if not name.startswith("sm_"):
        return table["gfx942"]
    rows = sorted((int(row[3:]), row) for row in table if row.startswith("sm_"))
    return table[[row for number, row in rows if number <= int(name[3:])][-1]]
