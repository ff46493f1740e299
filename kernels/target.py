"""The architecture of the GPU, by which launchers choose tiles, warps and stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import triton

Configuration = TypeVar("Configuration")


def architecture() -> str:
    """The architecture of the active driver: "sm_80" and so on, or "gfx942"; "sm_80" in the interpreter."""
    if triton.knobs.runtime.interpret:
        return "sm_80"
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).partition(":")[0]


def configuration(table: Mapping[str, Configuration], name: str | None = None) -> Configuration:
    """The row of a launcher's table for an architecture, by default the active one.

    A row is also for newer GPUs of NVIDIA, up to the next row; sm_80 is the oldest architecture that the kernels
    support. All GPUs of AMD take the row of gfx942.
    """
    name = name or architecture()
    if not name.startswith("sm_"):
        return table["gfx942"]
    rows = sorted((int(row[3:]), row) for row in table if row.startswith("sm_"))
    return table[[row for version, row in rows if version <= int(name[3:])][-1]]
