"""geglu: out = gelu(gate) * up, elementwise, gelu in its tanh approximation.

As (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), gelu(g) = g / (1 + 2^z), z = g * (LINEAR + CUBIC * g^2): there is no
cancellation near zero or in the negative tail, and no tanh. Float32, rounded once, or twice if stepwise. Reads gate and
up and writes out once: 6 bytes an element of bf16. One program for BLOCK columns of a row.

FMA is off, so that bits do not depend on the position of an element.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import dependent_launch
from .target import configuration

# -2 log2(e) sqrt(2/pi); the same times 0.044715.
LINEAR = tl.constexpr(-2.302208198144325)
CUBIC = tl.constexpr(-0.1029432395800235)

# 1024 divides the 9216, 14336 and 36864 columns of Gemma-2. With these warps, of 32 or 64 lanes, a thread has 8
# columns, one 16-byte access of bf16.
BLOCK = 1024
WARPS = {"sm_80": 4, "gfx942": 2}


@triton.jit
def gelu(gate):
    """gelu of float32, with a relative error of at most 2^-22 * (2 + max(z, 0)); zero where it is below 11 * 2^-128."""
    return gate / (1.0 + tl.exp2(gate * (LINEAR + CUBIC * (gate * gate))))


@triton.jit
def _geglu_kernel(
    out_ptr,
    gate_ptr,
    up_ptr,
    columns,
    blocks,
    stride_gate,
    stride_up,
    STEPWISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dependent_launch.wait()
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offsets = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    within = offsets < columns
    gate = tl.load(gate_ptr + row * stride_gate + offsets, mask=within, other=0.0)
    up = tl.load(up_ptr + row * stride_up + offsets, mask=within, other=0.0)
    activated = gelu(gate.to(tl.float32))
    if STEPWISE:
        activated = activated.to(gate.dtype).to(tl.float32)
    tl.store(out_ptr + row * columns + offsets, activated * up.to(tl.float32), mask=within)


def geglu(out: Tensor, gate: Tensor, up: Tensor, stepwise: bool) -> None:
    """Fill out [T, F], contiguous, from gate and up [T, F], of any row stride; all bf16 or all f32."""
    rows, columns = gate.shape
    blocks = triton.cdiv(columns, BLOCK)
    _geglu_kernel[(rows * blocks,)](
        out,
        gate,
        up,
        columns,
        blocks,
        gate.stride(0),
        up.stride(0),
        STEPWISE=stepwise,
        BLOCK=BLOCK,
        num_warps=configuration(WARPS, out.device),
        enable_fp_fusion=False,
        **dependent_launch.options(out.device),
    )
