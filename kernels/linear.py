"""linear: out = x W^T for at most 32 rows of x, with one to three weights side by side in one launch.

Every weight must be read once, at the bandwidth of the memory. A program computes BLOCK_M rows of one weight and loops
over K; a step is SLICES slices of BLOCK_K columns, which are multiplied separately on the tensor cores, in a batched
product of [BLOCK_M, BLOCK_K] and [BLOCK_K, TOKENS]; the slices are added at the end. So all warps work on a tile of
only 16 rows, and the 2304 rows of the narrowest weight still make 144 programs.

Bytes in flight: copies to shared memory are asynchronous and stages - 1 steps deep. At latencies near 600 ns an A100
needs 11 KB in flight for each multiprocessor (2.0 TB/s over 108), an H100 15 KB (3.35 TB/s over 132), a B200 33 KB
(8 TB/s over 148); a step of 16 rows is 16 KB of weight. Every program reads all of x, from the L2 cache: at 8 tokens
half a byte for each byte of 16 rows of weight, at 32 tokens two bytes, about as much as a multiprocessor can get.

While the kernel before ends, a program requests the first columns of its rows of weight, see PREFETCHED.

Bits: the sum of an output runs over the same columns in the same order, whatever the other rows of x, their count and
the other weights: a row of x gives the same bits alone and among 32. FMA outside of the dot is off.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dependent_launch
from .target import TRITON, configuration

SLICES = 4

# Stages by the size of a step: at most 32 KB, or more. Shared memory as compiled is (stages - 1) * (rows + TOKENS) KB
# of bf16. With 3 stages, of which 2 are buffers, the 99 KB of sm_86, sm_89 and sm_120 hold two programs of 16 rows or
# one of 32, and the 163 KB of sm_80 three or two. With 4, the 227 KB of sm_90 and sm_100 hold three programs of 16
# rows, and with 3 two larger ones. A program that is alone on a multiprocessor, as when 148 of them share 144 programs,
# then has 32 to 48 KB of weight in flight, as does each of two programs of 32 rows.
STAGES = {
    "sm_80": {32: 3, 48: 3},
    "sm_90": {32: 4, 48: 3},
    "sm_120": {32: 3, 48: 3},
    "gfx942": {32: 2, 48: 2},
}


# Lines of 128 bytes of each row of weight that a program brings into the L2 cache before it waits for earlier kernels:
# one step of the loop over K in bfloat16. The launch for q, k and v of 2.6B requests 4 MB so, that for gate and up at
# most 13 MB, as much as an H100 reads in 1.3 and 3.8 us; the norms before them take as long.
PREFETCHED = tl.constexpr(8)


@triton.jit
def prefetch_rows(weight_ptr, row, rows, K, LINES: tl.constexpr):
    """Bring the first LINES lines of rows of a weight into the L2 cache, those past its end from its last element."""
    ELEMENTS: tl.constexpr = dependent_launch.LINE // (weight_ptr.dtype.element_ty.primitive_bitwidth // 8)
    first = tl.minimum(row, rows - 1).to(tl.int64)[:, None] * K
    dependent_launch.prefetch(weight_ptr + first + tl.minimum(tl.arange(0, LINES) * ELEMENTS, K - 1)[None, :])


@triton.jit
def products(
    weight_ptr,
    other_ptr,
    row,
    rows,
    x_ptr,
    tokens,
    K,
    TOKENS: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The products of rows of a weight, and of another weight of the same shape or None, with the rows of x.

    It waits for earlier kernels, before which nothing but the weights is requested from memory.

    Returns two of [rows, TOKENS] float32; the second is zero if there is no other weight.
    """
    prefetch_rows(weight_ptr, row, rows, K, PREFETCHED)
    if other_ptr is not None:
        prefetch_rows(other_ptr, row, rows, K, PREFETCHED)
    dependent_launch.wait()
    token = tl.arange(0, TOKENS)
    slice_start = tl.arange(0, SLICES)[:, None, None] * BLOCK_K
    column = slice_start + tl.arange(0, BLOCK_K)[None, None, :]
    x_column = slice_start + tl.arange(0, BLOCK_K)[None, :, None]
    weight_offsets = row.to(tl.int64)[None, :, None] * K + column
    x_ptrs = x_ptr + token[None, None, :] * K + x_column
    rows_within = (row < rows)[None, :, None]
    tokens_within = (token < tokens)[None, None, :]
    sums = tl.zeros((SLICES, row.shape[0], TOKENS), tl.float32)
    other_sums = tl.zeros((SLICES, row.shape[0], TOKENS), tl.float32)
    for start in range(0, K, SLICES * BLOCK_K):
        within = rows_within & (start + column < K)
        x = tl.load(x_ptrs + start, mask=tokens_within & (start + x_column < K), other=0.0)
        weight = tl.load(weight_ptr + weight_offsets + start, mask=within, other=0.0)
        sums = tl.dot(weight, x, sums, input_precision="ieee")
        if other_ptr is not None:
            other = tl.load(other_ptr + weight_offsets + start, mask=within, other=0.0)
            other_sums = tl.dot(other, x, other_sums, input_precision="ieee")
    return tl.sum(sums, axis=0), tl.sum(other_sums, axis=0)


@triton.jit
def _linear_kernel(
    out_ptr,
    x_ptr,
    weight0_ptr,
    weight1_ptr,
    weight2_ptr,
    rows0,
    rows1,
    rows2,
    tokens,
    K,
    BLOCK_M: tl.constexpr,
    TOKENS: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    block = tl.program_id(0)
    # By `where`: Triton 3.6 stops at pointers that nested branches choose, on AMD (CanonicalizePointers).
    blocks0, blocks1 = tl.cdiv(rows0, BLOCK_M), tl.cdiv(rows1, BLOCK_M)
    second, third = block >= blocks0, block >= blocks0 + blocks1
    weight_ptr = tl.where(third, weight2_ptr, tl.where(second, weight1_ptr, weight0_ptr))
    rows = tl.where(third, rows2, tl.where(second, rows1, rows0))
    block -= tl.where(third, blocks0 + blocks1, tl.where(second, blocks0, 0))
    first = tl.where(third, rows0 + rows1, tl.where(second, rows0, 0))
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.arange(0, TOKENS)
    sums, _ = products(weight_ptr, None, row, rows, x_ptr, tokens, K, TOKENS, SLICES, BLOCK_K)
    out_ptrs = out_ptr + token[None, :] * (rows0 + rows1 + rows2) + (first + row)[:, None]
    tl.store(out_ptrs, sums, mask=(row < rows)[:, None] & (token < tokens)[None, :])


def tiling(x: Tensor, weights: Sequence[Tensor], rows: int) -> dict[str, int | bool]:
    """The meta-parameters and options of a kernel that calls `products`.

    rows: of both weights of a program, 16 or 32; 64 in steps of a quarter of the columns, for more than 16 rows of x.
    """
    nvidia = configuration({"sm_80": True, "gfx942": False}, x.device)
    # mma has at least 8 columns, mfma 16; with 8, mfma would become scalar products, in 296 registers.
    padded_tokens = max(8 if nvidia else 16, triton.next_power_of_2(x.shape[0]))
    # Asynchronous copies and vector loads need aligned rows. Other rows are loaded element by element, into registers,
    # and tensor cores of NVIDIA take no float32: in both cases large tiles would spill.
    aligned = x.shape[1] % 16 == 0 and not any(tensor.data_ptr() % 16 for tensor in (x, *weights))
    streamed = aligned and x.dtype == torch.bfloat16
    meta: dict[str, int | bool] = {
        "TOKENS": padded_tokens,
        # With four slices, the sums of 64 rows would take all registers.
        "SLICES": SLICES if rows < 64 else SLICES // 2,
        "BLOCK_K": (128 if rows < 64 else 64) if streamed else 16,
        # Shared memory is swizzled along the rows of a tile, and free of bank conflicts, only if all warps together
        # copy fewer rows at a time than the tile has: 2 warps copy 4 rows of 128 columns, 4 warps copy 8.
        "num_warps": 2 if streamed and padded_tokens == 8 else 4,
        "num_stages": configuration(STAGES, x.device)[32 if rows + padded_tokens <= 32 else 48],
        "enable_fp_fusion": False,
        **dependent_launch.options(x.device),
    }
    # By default ptxas aims at 64 registers and spills, although shared memory allows at most 8 warps anyway. But 2
    # warps with 32 rows take 206 by default and, with the ptxas of Triton before 3.8, all that they may, and spill.
    if nvidia and not (TRITON < (3, 8) and rows == 32 and meta["num_warps"] == 2):
        meta["maxnreg"] = 255
    return meta


def linear(out: Tensor, x: Tensor, weights: Sequence[Tensor]) -> None:
    """Fill out [T, M_0 + M_1 + ...] with x [T, K] times the transposes of one to three weights [M_i, K].

    T is at most 32. All tensors are contiguous and of one dtype, bf16 or f32.
    """
    BLOCK_M = 16
    absent = 3 - len(weights)
    rows = [*[weight.shape[0] for weight in weights], *[0] * absent]
    _linear_kernel[(sum(triton.cdiv(count, BLOCK_M) for count in rows),)](
        out,
        x,
        *[*weights, *[weights[0]] * absent],
        *rows,
        *x.shape,
        BLOCK_M=BLOCK_M,
        **tiling(x, weights, BLOCK_M),
    )
