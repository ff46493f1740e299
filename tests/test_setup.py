"""What the build of the package does with nvcc: PTX for every architecture, or a package without it."""

from __future__ import annotations

import runpy
import stat
from pathlib import Path
from typing import Any

import pytest
import setuptools
from pybind11.setup_helpers import build_ext

from arcmerge.cuda.slerp import TARGETS
from paths import ROOT

# Writes what it was told, and fails for one architecture.
NVCC = """\
#!/bin/sh
all="$*"
while [ "$1" != -o ]; do shift; done
echo "$all" > "$2"
case "$all" in *compute_120*) exit 1;; esac
"""


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Builds the extension without its C++; returns the folder of PTX and the warnings."""

    def build(path: Path) -> tuple[Path, list[str]]:
        warnings: list[str] = []
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(setuptools, "setup", lambda **_: None)
        monkeypatch.setattr(build_ext, "run", lambda self: None)
        monkeypatch.setenv("PATH", f"{path}:/bin")
        monkeypatch.delenv("NVCC", raising=False)
        command = runpy.run_path(str(ROOT / "setup.py"))["Build"](setuptools.Distribution())
        monkeypatch.setattr(command, "get_ext_fullpath", lambda name: str(tmp_path / "arcmerge" / "_C.so"))
        monkeypatch.setattr(command, "warn", warnings.append)
        command.run()
        return tmp_path / "arcmerge" / "cuda", warnings

    return build


def test_ptx_is_compiled_for_all_architectures_that_nvcc_knows(built: Any, tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(NVCC)
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    folder, warnings = built(tmp_path)
    files = {file.name: file.read_text() for file in folder.iterdir()}
    assert files.keys() == {f"slerp.{target}.ptx" for target in TARGETS if target != "sm_120"}
    for target in TARGETS[:-1]:
        # Products and sums that fuse would give other bits.
        assert {f"-arch={target.replace('sm_', 'compute_')}", "-fmad=false"} <= {*files[f"slerp.{target}.ptx"].split()}
    assert [warning.partition(",")[0] for warning in warnings] == [
        "slerp.sm_120.ptx must be compiled for GPUs of sm_120"
    ]


def test_without_nvcc_the_package_has_no_ptx(built: Any, tmp_path: Path) -> None:
    folder, warnings = built(tmp_path)
    assert not folder.exists()
    assert [warning.partition(",")[0] for warning in warnings] == ["nvcc must be on PATH or named by NVCC"]
