"""rmsnorm: out = x * rsqrt(mean(x^2) + eps) * (1 + weight), row by row.

Float32 throughout, rounded once. Reads x and writes out once. One program a row, which stays in registers; lanes past
its end, 44 % of them at 2304 columns, issue instructions but move no bytes, and the bytes take the time.

FMA is off, so that the bits of a square do not depend on its position in a row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import dependent_launch
from .target import configuration

# Columns of a row for one warp: 16 a thread, two 16-byte accesses of bf16. A row of 2304 then has 8 warps on NVIDIA's
# GPUs, so that each has few instructions to issue: their latency is the time of a single row in decoding.
LANES_OF_A_WARP = {"sm_80": 16 * 32, "gfx942": 16 * 64}


def row_launch(x: Tensor) -> dict[str, int | bool]:
    """BLOCK and the options of the launch of a kernel, a program of which holds a row of x [T, D]."""
    block = triton.next_power_of_2(x.shape[1])
    warps = min(max(block // configuration(LANES_OF_A_WARP, x.device), 1), 16)
    return {"BLOCK": block, "num_warps": warps, "enable_fp_fusion": False, **dependent_launch.options(x.device)}


@triton.jit
def normalize(values, weight, eps, COLUMNS: tl.constexpr):
    """The norm of a row of float32 `values`, which are zero past COLUMNS; not yet rounded."""
    mean_square = tl.sum(values * values, axis=0) / COLUMNS
    return values * tl.rsqrt(mean_square + eps) * (1.0 + weight)


@triton.jit
def _rmsnorm_kernel(out_ptr, x_ptr, weight_ptr, eps, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    dependent_launch.wait()
    columns = tl.arange(0, BLOCK)
    offsets = tl.program_id(0).to(tl.int64) * COLUMNS + columns
    within = columns < COLUMNS
    x = tl.load(x_ptr + offsets, mask=within, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=within, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, normalize(x, weight, eps, COLUMNS), mask=within)


def rmsnorm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """Fill out [T, D] from x [T, D] and weight [D]; all contiguous, each bf16 or f32."""
    rows, columns = x.shape
    _rmsnorm_kernel[(rows,)](out, x, weight, eps, COLUMNS=columns, **row_launch(x))
