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
            "threads": _C.threads(),
            "variant": _C.variant(),
            "variants": _C.variants(),
        },
        "gpu": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())] if cuda else [],
        "merge device": "cuda" if cuda else "cpu",
        "ops": {f"on {device}": backends(device) for device in ("cpu", "cuda")},
    }


def _grouped(backends: Mapping[str, str]) -> dict[str, str]:
    """Ops that are served alike, and by what: {"gram, combine": "native"}."""
    alike: dict[str, list[str]] = {}
    for op, why in backends.items():
        alike.setdefault(why, []).append(op)
    return {", ".join(ops): why for why, ops in alike.items()}


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
    ops = {device: _grouped(served) for device, served in findings["ops"].items()}
    for key, value in _flat({**findings, "ops": ops}):
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
