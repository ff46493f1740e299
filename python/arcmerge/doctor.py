"""Versions, processors, GPUs and the backend of every op."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from typing import Any

from arcmerge import _C, __version__

_PACKAGES = ("torch", "triton", "safetensors", "numpy", "tokenizers", "huggingface_hub", "matplotlib")


def examine() -> Mapping[str, Any]:
    """The findings as plain data. Imports torch."""
    import torch

    import arcmerge.ops  # noqa: F401 - registers the ops
    from arcmerge.dispatch.registry import backends

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
        "gpu": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else [],
        # As Options resolves "auto".
        "device": {
            "of a merge to disk": "cpu",
            "of a model in memory": f"cuda:{torch.cuda.current_device()}" if cuda else "cpu",
        },
        "ops": {f"on {device}": backends(device) for device in ("cpu", "cuda")},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
