"""Kernels in CUDA C++: compiled by nvcc, checked by ptxas, executed as PTX behind the interface of the driver."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

from arcmerge.cuda.driver import Kernel
from arcmerge.cuda.slerp import SHARED, THREADS, launch, prepared
from arcmerge.cuda.targets import TARGETS
from arcmerge.kernels.segments import SEGMENT, launches
from paths import ROOT

from .dependence import dependent_loads
from .driver import Driver, Launch
from .ptx.counts import Counts
from .ptx.memory import GlobalMemory
from .roofline import Code, work

FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-ptx")


def compiler() -> str | None:
    """The path of nvcc, if it is installed: named by NVCC, by PATH, or by the extra `nvcc` of this project."""
    packaged = (Path(folder, "nvidia", "cu13", "bin", "nvcc") for folder in sys.path)
    return os.environ.get("NVCC") or shutil.which("nvcc") or next((str(p) for p in packaged if p.exists()), None)


@cache
def ptx(source: str, target: str, folder: Path = ROOT / "csrc" / "cuda") -> str:
    """The PTX of a source, compiled as setup.py does."""
    nvcc = compiler()
    assert nvcc is not None
    architecture = target.replace("sm_", "compute_")
    command = [nvcc, *FLAGS, f"-arch={architecture}", str(folder / source), "-o", "-"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def usage(code: str, target: str, folder: Path) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack and of spills, as ptxas reports them."""
    nvcc = compiler()
    assert nvcc is not None
    file = folder / f"{target}.ptx"
    file.write_text(code)
    ptxas = Path(nvcc).resolve().parent / "ptxas"
    command = [str(ptxas if ptxas.exists() else "ptxas"), "-v", f"--gpu-name={target}", str(file), "-o", os.devnull]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    patterns = {
        "registers": r"Used (\d+) registers",
        "stack": r"(\d+) bytes stack frame",
        "spills": r"(\d+) bytes spill stores",
    }
    return {name: int(found[1]) for name, pattern in patterns.items() if (found := re.search(pattern, report))}


def slerp_work(folder: Path) -> dict[str, dict[str, Any]]:
    """The code of csrc/cuda/slerp.cu and its work for a pair of four segments, by target. Nothing without nvcc.

    Code counts the accesses to memory that wait for one another in one batch. One block does the work, because the
    polls of several at a barrier depend on their order.
    """
    if compiler() is None:
        return {}
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4 * SEGMENT, generator=generator).to(torch.bfloat16) for _ in range(2))
    found = {}
    for target in TARGETS:
        text, out = ptx("slerp.cu", target), torch.empty_like(a)
        (table,) = launches([(a, b, out)])
        arguments = prepared(table, [out], torch.tensor([0.3], dtype=torch.float64), False, cache_bytes=1)
        driver = FakeDriver([a, b, out, *(value for value in arguments if isinstance(value, torch.Tensor))])
        launch(Kernel(driver, text.encode(), "slerp"), arguments, resident=1, stream=0)
        code = Code(
            warps=THREADS // 32,
            registers=usage(text, target, folder)["registers"],
            shared=SHARED,
            in_flight=SHARED * 3 // 4,  # all but the stage in use
            dependent_loads=dependent_loads(text),
            parts=THREADS / 128,
        )
        found[target] = {"elements": len(a), "code": asdict(code), "work": asdict(work(driver.counts, 1, 1))}
    return found


class FakeDriver(Driver):
    """Executes a kernel in the emulator at once.

    Attributes:
        counts: of the last launch.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], seed: int = 0) -> None:
        """tensors: all that kernels may touch."""
        super().__init__()
        self._memory = GlobalMemory([(f"tensor {number}", tensor) for number, tensor in enumerate(tensors)])
        self._seed = seed
        self.counts = Counts()

    def launch(self, launch: Launch, stream: int) -> None:
        self.counts = launch.execute(self._memory, self._seed)
