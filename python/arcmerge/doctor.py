"""What is installed, what this machine can do, and which backend serves which op."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from typing import Any

from arcmerge import _C, __version__

_PACKAGES = ("torch", "triton", "safetensors", "numpy", "tokenizers", "huggingface_hub", "matplotlib")


def examine() -> Mapping[str, Any]:
    """Versions, processor, GPU and backends as plain data. Imports torch."""
    import torch

    from arcmerge.ops import backends

    cuda = torch.cuda.is_available()
    return {
        "arcmerge": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": {
            "cores": len(os.sched_getaffinity(0)),
            "variant": _C.variant(),
            "variants": _C.variants(),
        },
        "gpu": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())] if cuda else [],
        "merge device": "cuda" if cuda else "cpu",
        "gram and combine": {f"on {device}": why for device, why in backends().items()},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def print_findings(findings: Mapping[str, Any]) -> None:
    """Print them as a table of two columns."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for key, value in _flat(findings):
        table.add_row(key, value)
    Console().print(table, highlight=False)


def _flat(findings: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in findings.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{before}{key} ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value or "not installed")
            rows.append((before + str(key), text or "none"))
    return rows
