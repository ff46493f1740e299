"""Kernels in CUDA C++, from csrc/cuda: kept as PTX, and loaded through the driver."""

from __future__ import annotations

from pathlib import Path

# Where a build with nvcc puts the PTX of each kernel and target.
FOLDER = Path(__file__).parent


def has_ptx() -> bool:
    """Whether the package was built with nvcc."""
    return any(FOLDER.glob("*.ptx"))
