"""Programmatic dependent launch: a kernel is started while the one before it in the stream still runs.

From sm_90 on, a kernel that is launched with `options` may start as soon as every program of the kernel before it has
called `wait`. That hides the time of a launch, which is as long as the smallest kernels of a decode step. Every kernel
that is launched so calls `wait` before it touches memory, and so before any of its programs can end. (attention_hopper
calls both instructions itself, as Gluon has no functions of Triton; its other warps start after those that wait.) Thus

- what a kernel reads and overwrites is never in use by an earlier one: `wait` returns when the kernel before has ended
  and its writes are visible, and that one had ended only after all those before it;
- a launch without `options`, such as those of torch, waits for the end of the kernel before, and so of all.

`prefetch` may come before `wait`, whoever writes the memory: it brings lines into the L2 cache, through which all
accesses of the GPU go, and returns no value. tests/emulation/compilation.py checks the compiled code for both rules.

Source: PTX ISA, griddepcontrol and prefetch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.target_info import cuda_capability_geq

from .target import configuration

LINE = tl.constexpr(128)  # bytes of a line of the L2 cache


@triton.constexpr_function
def _supported():
    """Whether the kernel is compiled for sm_90 or newer; not in the interpreter, whatever the GPU."""
    return not triton.knobs.runtime.interpret and cuda_capability_geq(9)


@triton.jit
def wait():
    """Wait until all earlier kernels of the stream have ended, and allow the next one to start."""
    if _supported():
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def prefetch(pointers):
    """Bring the lines of 128 bytes at a block of valid pointers into the L2 cache."""
    if _supported():
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
        )


def options(device: torch.device) -> dict[str, bool]:
    """The options of a launch whose kernel calls `wait`."""
    return configuration({"sm_80": {}, "sm_90": {"launch_pdl": True}, "gfx942": {}}, device)
