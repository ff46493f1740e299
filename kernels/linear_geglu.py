"""linear_geglu: out = gelu(x G^T) * (x U^T) for at most 64 rows of x, gelu in its tanh approximation.

Reads both weights once: a program computes the same 16 or 32 rows of both and combines their products before it writes.
Tiles, bits and bytes in flight are those of `linear`, except that more than 16 rows of x have other bits than fewer, in
tiles with fewer columns; gelu is that of `geglu`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .geglu import gelu
from .linear import products, tiling


@triton.jit
def _linear_geglu_kernel(
    out_ptr,
    x_ptr,
    gate_ptr,
    up_ptr,
    rows,
    tokens,
    K,
    STEPWISE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TOKENS: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    gate, up = products(gate_ptr, up_ptr, row, rows, x_ptr, tokens, K, TOKENS, SLICES, BLOCK_K)
    dtype = x_ptr.dtype.element_ty
    if STEPWISE:
        gate = gate.to(dtype).to(tl.float32)
        up = up.to(dtype).to(tl.float32)
    activated = gelu(gate)
    if STEPWISE:
        activated = activated.to(dtype).to(tl.float32)
    token = tl.arange(0, TOKENS)
    out_ptrs = out_ptr + token[None, :] * rows + row[:, None]
    tl.store(out_ptrs, activated * up, mask=(row < rows)[:, None] & (token < tokens)[None, :])


def linear_geglu(out: Tensor, x: Tensor, gate_weight: Tensor, up_weight: Tensor, stepwise: bool) -> None:
    """Fill out [T, F] from x [T, K] and two weights [F, K]; stepwise: round to their dtype after every step.

    T is at most 64. All tensors are contiguous and of one dtype, bf16 or f32.
    """
    # A multiprocessor could not get the bytes of more rows of x from the L2 cache for each 16 rows of weight.
    BLOCK_M = 16 if len(x) <= 16 else 32
    rows = gate_weight.shape[0]
    _linear_geglu_kernel[(triton.cdiv(rows, BLOCK_M),)](
        out,
        x,
        gate_weight,
        up_weight,
        rows,
        *x.shape,
        STEPWISE=stepwise,
        BLOCK_M=BLOCK_M,
        **tiling(x, (gate_weight, up_weight), 2 * BLOCK_M),
    )
