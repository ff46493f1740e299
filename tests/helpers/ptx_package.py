"""A package that was built with nvcc: the PTX of csrc/cuda for the fake devices."""

from __future__ import annotations

from pathlib import Path

import pytest

import arcmerge.cuda
from emulation import nvcc
from paths import ROOT

needs_nvcc = pytest.mark.skipif(nvcc.compiler() is None, reason="nvcc is not installed")


def build(patch: pytest.MonkeyPatch, folder: Path, sources: Path = ROOT / "csrc" / "cuda") -> None:
    """Put the PTX for sm_80 into a folder, which the package then has."""
    (folder / "slerp.sm_80.ptx").write_text(nvcc.ptx("slerp.cu", "sm_80", sources))
    patch.setattr(arcmerge.cuda, "FOLDER", folder)
