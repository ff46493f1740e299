"""combine: out = round(sum_i c_i * x_i), elementwise.

Every product and every sum is rounded to float32, from left to right, and the total once to the dtype of the output
(nearest even): the same bits as the reference. Reads each input and writes the output once: 6 bytes an element of a
bf16 pair. One program a segment.

More than eight inputs take several launches, for lack of registers. Each but the last adds seven or eight of them to
the sum so far, which is kept in float32; to multiply it by 1 is exact, so the bits are those of one sum. A launch more
moves 8 bytes an element more.

FMA is off, because the compiler would fuse depending on the position of an element. The ptxas of Triton 3.6 fuses
nevertheless for sm_100 (compiled and inspected, not run); that of 3.9 does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor, cat, empty_like, float32, ones_like, zeros_like

from .segments import Launch, launches, load, read_row, store

MOST = 8  # inputs of a launch


@triton.jit
def _weighted(values, coefficient, SKIP_ZEROS: tl.constexpr):
    product = values * coefficient
    if SKIP_ZEROS:
        # x + -0 has the bits of x, also where x is +0 or NaN. A constant -0.0 would be +0 in Triton.
        negative_zero = tl.full((), 1, tl.int32) << 31
        product = tl.where(coefficient == 0, negative_zero.to(tl.float32, bitcast=True), product)
    return product


@triton.jit
def _write_tile(
    addresses,
    coefficients,
    start,
    count,
    DTYPES: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
    SKIP_ZEROS: tl.constexpr,
    VECTORED: tl.constexpr,
):
    offsets = start + tl.arange(0, TILE)
    total = _weighted(load(addresses[0], offsets, count, DTYPES[0], VECTORED), coefficients[0], SKIP_ZEROS)
    for i in tl.static_range(1, K):
        total += _weighted(load(addresses[i], offsets, count, DTYPES[i], VECTORED), coefficients[i], SKIP_ZEROS)
    return store(addresses[K], offsets, count, total, DTYPES[K], VECTORED)


@triton.jit
def _combine_kernel(
    table_ptr,
    coefficients_ptr,
    nonfinite_ptr,
    DTYPES: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
    SKIP_ZEROS: tl.constexpr,
):
    addresses, count, vectored, vector = read_row(table_ptr + tl.program_id(0).to(tl.int64) * (K + 4), K + 1, TILE)
    coefficients = ()
    for i in tl.static_range(K):
        coefficients += (tl.load(coefficients_ptr + vector * K + i),)
    nonfinite = tl.zeros((TILE,), tl.int32)
    for start in range(0, vectored, TILE):
        nonfinite += _write_tile(addresses, coefficients, start, count, DTYPES, K, TILE, SKIP_ZEROS, True)
    for start in range(vectored, count, TILE):
        nonfinite += _write_tile(addresses, coefficients, start, count, DTYPES, K, TILE, SKIP_ZEROS, False)
    found = tl.sum(nonfinite, axis=0)
    if found > 0:
        # The sum of integers does not depend on the order of the programs.
        tl.atomic_add(nonfinite_ptr + vector, found.to(tl.int64), sem="relaxed")


def combine(
    outs: Sequence[Tensor],
    groups: Sequence[Sequence[Tensor]],
    coefficients: Tensor,
    nonfinite: Tensor,
    *,
    rows: int = 1,
) -> None:
    """Fill outs[g] with the sum of the k tensors of groups[g] times coefficients[g].

    Args:
        outs: one tensor a group.
        groups: G groups of k tensors. A group and its output are contiguous, of one length and each bf16, f16 or f32;
            groups may differ in length and dtype.
        coefficients: [G * rows, k] float32.
        nonfinite: [G * rows] int64; the count of values written that are infinite or NaN is added to it.
        rows: how many vectors of equal length follow one another in every tensor, each with its own coefficients and
            count: coefficients[g * rows + row].
    """
    if coefficients.shape[1] > MOST:
        for index, (out, group) in enumerate(zip(outs, groups, strict=True)):
            vectors = slice(index * rows, (index + 1) * rows)
            _combine_many(out, group, coefficients[vectors], nonfinite[vectors], rows)
        return
    for launch in launches([(*group, out) for group, out in zip(groups, outs, strict=True)], rows):
        combine_segments(launch, coefficients, nonfinite)


def combine_segments(launch: Launch, coefficients: Tensor, nonfinite: Tensor, *, skip_zeros: bool = False) -> None:
    """Fill the last operand of each segment with the weighted sum of the others.

    Args:
        launch: a table of k + 1 operands, k at most MOST.
        coefficients: [vectors, k] float32.
        nonfinite: [vectors] int64; the count of values written that are infinite or NaN is added to it.
        skip_zeros: whether an input with the coefficient zero has no effect, whatever values it has.
    """
    _combine_kernel[(len(launch.table),)](
        launch.table,
        coefficients,
        nonfinite,
        DTYPES=launch.dtypes,
        K=len(launch.dtypes) - 1,
        TILE=2048,
        SKIP_ZEROS=skip_zeros,
        num_warps=4,
        enable_fp_fusion=False,
    )


def _combine_many(out: Tensor, group: Sequence[Tensor], coefficients: Tensor, nonfinite: Tensor, rows: int) -> None:
    """The same for one group of more than MOST tensors. One group at a time, because of the memory for its sum."""
    one, ignored = ones_like(coefficients[:, :1]), zeros_like(nonfinite)
    while len(group) > MOST:
        total = empty_like(out, dtype=float32)
        combine([total], [group[:MOST]], coefficients[:, :MOST].contiguous(), ignored, rows=rows)
        group, coefficients = [total, *group[MOST:]], cat([one, coefficients[:, MOST:]], dim=1)
    combine([out], [group], coefficients, nonfinite, rows=rows)
