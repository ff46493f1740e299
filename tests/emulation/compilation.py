"""Compile what launchers launch, for GPUs that are not there.

The launchers themselves are called, on CPU tensors, with a stand-in for the driver that names the target: options that
a launcher forgets are thus missing here too. Runs in a process of its own, because a process that interprets kernels
cannot compile them: `python compilation.py TARGET...` prints a JSON object for each kernel and target.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Driver:
    """As much of a driver as a launch asks before it has a kernel."""

    def __init__(self, target: str) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self._target]

    def get_current_device(self) -> str:
        return self._target

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiling_for(target: str) -> Iterator[list[CompiledKernel]]:
    """Within this context a launch compiles for `target` and runs nothing; the list gets every kernel."""
    kernels: list[CompiledKernel] = []
    run = JITFunction.run

    def compile_only(function: JITFunction[Any], *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        kernels.append(run(function, *arguments, grid=grid, warmup=True, **named))

    triton.runtime.driver.set_active(Driver(target))
    with mock.patch.object(JITFunction, "run", compile_only):
        yield kernels


def describe(kernel: CompiledKernel) -> dict[str, Any]:
    """What to assert about a kernel: counts of instructions in what the compiler wrote."""

    def count(code: str, pattern: str) -> int:
        return len(re.findall(pattern, kernel.asm[code], re.MULTILINE))

    facts = {"kernel": kernel.metadata.name, "shared_bytes": kernel.metadata.shared}
    if "ptx" in kernel.asm:
        return facts | {
            "vector_loads": count("ptx", r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64"),
            "vector_stores": count("ptx", r"st\.global\S*\.v4\.b32|st\.global\S*\.v2\.b64"),
            "fused": count("ptx", r"\bfma\.") + count("sass", r"\bFFMA2?\b"),
            "spills": count("sass", r"\b(?:LDL|STL)\b"),
            "float_atomics": count("ptx", r"(?:atom|red)\.\S*\.b?f(?:16|32|64)"),
        }
    return facts | {
        "vector_loads": count("amdgcn", r"(?:global|buffer|flat)_load_dwordx4"),
        "vector_stores": count("amdgcn", r"(?:global|buffer|flat)_store_dwordx4"),
        "fused": count("amdgcn", r"v_(?:pk_)?(?:fma|fmac|mad|mac)(?:_mix\w*)?_f(?:16|32)"),
        "spills": count("amdgcn", r"scratch_(?:load|store)"),
        "float_atomics": count("amdgcn", r"atomic_(?:pk_)?add_f"),
    }


def _gram(dtypes: list[torch.dtype]) -> None:
    from arcmerge.kernels.gram import gram

    k = len(dtypes)
    gram([[torch.empty(16, dtype=dtype) for dtype in dtypes]], torch.empty(1, k, k, dtype=torch.float64))


def _combine(dtypes: list[torch.dtype], out: torch.dtype) -> None:
    from arcmerge.kernels.combine import combine

    inputs = [torch.empty(16, dtype=dtype) for dtype in dtypes]
    coefficients = torch.empty(1, len(dtypes))
    combine([torch.empty(16, dtype=out)], [inputs], coefficients, torch.zeros(1, dtype=torch.int64))


CASES: dict[str, Callable[[], None]] = {
    "gram of 2 bf16": lambda: _gram([torch.bfloat16] * 2),
    "gram of 2 f32": lambda: _gram([torch.float32] * 2),
    "gram of 8 bf16": lambda: _gram([torch.bfloat16] * 8),
    "combine 2 bf16": lambda: _combine([torch.bfloat16] * 2, torch.bfloat16),
    "combine 8 f32 to bf16": lambda: _combine([torch.float32] * 8, torch.bfloat16),
}


if __name__ == "__main__":
    for target in sys.argv[1:]:
        for case, launch in CASES.items():
            with compiling_for(target) as kernels:
                launch()
            for kernel in kernels:
                print(json.dumps({"case": case, "target": target, **describe(kernel)}), flush=True)
