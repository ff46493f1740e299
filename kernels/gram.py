"""gram: the float64 matrix of dot products of k tensors, G[i, j] = sum_e x_i[e] * x_j[e].

Reads each input once: 4 bytes an element of a bf16 pair. Two kernels: the first has one program a segment, which writes
k * k partial sums; the second has one program a vector, which adds the partial sums of its segments in a fixed order.
There are no atomics, so a result has the same bits in every run.

The product of two bf16 or f16 values is exact in float32. Eight such products, which one thread holds, are summed in
float32 by Knuth's two-sum, which also yields the error of every addition; sums and errors are then added in float64.
That takes few float64 instructions, for GPUs with one float64 unit for 64 of float32. The errors matter: the square of
an odd significand is 1 modulo 8, so rounding seldom drops more than half a unit, and without the errors every squared
norm would be 6e-9 too small, for any count of elements. With a float32 input, or a base, products are not exact
in float32: they are computed and summed in float64, as are those of more than four operands, which lack registers.

The matrix of more than eight inputs is filled by launches for all pairs of groups of four, each of which reads eight
inputs. An entry has the same bits in each launch that computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product

import triton
import triton.language as tl
from torch import Tensor, empty, float64

from .segments import Launch, launches, load, read_row
from .target import enough_registers

WARPS = 4
MOST = 8  # inputs of a launch


@triton.jit
def _halves(values):
    return tl.split(tl.reshape(values, [values.shape[0] // 2, 2]))


@triton.jit
def _sum_runs(products, LEVELS: tl.constexpr, WIDE: tl.constexpr):
    """Sums of 2^LEVELS neighbours each, in float64; sums in float32 include the errors of their additions (two-sum)."""
    if WIDE:
        for _ in tl.static_range(LEVELS):
            a, b = _halves(products)
            products = a + b
        sums = products
    else:
        errors = tl.zeros_like(products)
        for _ in tl.static_range(LEVELS):
            a, b = _halves(products)
            error_of_a, error_of_b = _halves(errors)
            products = a + b
            b_part = products - a
            errors = ((a - (products - b_part)) + (b - b_part)) + (error_of_a + error_of_b)
        sums = products.to(tl.float64) + errors.to(tl.float64)
    return sums


@triton.jit
def _add_tile(
    sums,
    addresses,
    start,
    count,
    DTYPES: tl.constexpr,
    K: tl.constexpr,
    BASE: tl.constexpr,
    WIDE: tl.constexpr,
    LEVELS: tl.constexpr,
    TILE: tl.constexpr,
    VECTORED: tl.constexpr,
):
    offsets = start + tl.arange(0, TILE)
    if BASE:
        base = load(addresses[K], offsets, count, DTYPES[K], VECTORED)
    inputs = ()
    for i in tl.static_range(K):
        values = load(addresses[i], offsets, count, DTYPES[i], VECTORED)
        if BASE:
            values = values - base
        if WIDE:
            values = values.to(tl.float64)
        inputs += (values,)
    totals = ()
    for i in tl.static_range(K):
        for j in tl.static_range(i, K):
            totals += (sums[len(totals)] + _sum_runs(inputs[i] * inputs[j], LEVELS, WIDE),)
    return totals


@triton.jit
def _segments_kernel(
    table_ptr,
    partial_ptr,
    DTYPES: tl.constexpr,
    K: tl.constexpr,
    BASE: tl.constexpr,
    WIDE: tl.constexpr,
    LEVELS: tl.constexpr,
    TILE: tl.constexpr,
    OPERANDS: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    addresses, count, vectored, _ = read_row(table_ptr + segment * (OPERANDS + 3), OPERANDS, TILE)
    sums = ()
    for _ in tl.static_range(K * (K + 1) // 2):
        sums += (tl.zeros((TILE >> LEVELS,), tl.float64),)
    for start in range(0, vectored, TILE):
        sums = _add_tile(sums, addresses, start, count, DTYPES, K, BASE, WIDE, LEVELS, TILE, True)
    for start in range(vectored, count, TILE):
        sums = _add_tile(sums, addresses, start, count, DTYPES, K, BASE, WIDE, LEVELS, TILE, False)
    partial_ptr += segment * K * K
    for i in tl.static_range(K):
        for j in tl.static_range(i, K):
            total = tl.sum(sums[i * K - i * (i + 1) // 2 + j], axis=0)
            tl.store(partial_ptr + i * K + j, total)
            if i != j:
                tl.store(partial_ptr + j * K + i, total)


@triton.jit
def sum_segments(run_ptr, partial_ptr, ENTRIES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A vector, by a row of `runs`, and the sums of its segments' entries."""
    first = tl.load(run_ptr)
    last = tl.load(run_ptr + 1)
    vector = tl.load(run_ptr + 2)
    entry = tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), tl.float64)
    for start in range(first, last, ROWS):
        segment = start + tl.arange(0, ROWS)
        inside = (segment < last)[:, None] & (entry < ENTRIES)[None, :]
        sums += tl.load(partial_ptr + segment[:, None] * ENTRIES + entry[None, :], mask=inside, other=0.0)
    return vector, tl.sum(sums, axis=0)


@triton.jit
def _vectors_kernel(runs_ptr, partial_ptr, out_ptr, ENTRIES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    run_ptr = runs_ptr + tl.program_id(0).to(tl.int64) * 3
    vector, sums = sum_segments(run_ptr, partial_ptr, ENTRIES, ROWS, COLUMNS)
    entry = tl.arange(0, COLUMNS)
    tl.store(out_ptr + vector * ENTRIES + entry, sums, mask=entry < ENTRIES)


def gram(
    groups: Sequence[Sequence[Tensor]], out: Tensor, *, bases: Sequence[Tensor] | None = None, rows: int = 1
) -> None:
    """Fill out with the Gram matrices of groups of k tensors.

    Args:
        groups: G groups. The tensors of a group are contiguous, of one length and each bf16, f16 or f32; groups may
            differ in length and dtype.
        out: [G * rows, k, k] float64.
        bases: a tensor for each group, which is subtracted from its inputs in float32.
        rows: how many vectors of equal length follow one another in every tensor, each with its own matrix:
            out[g * rows + row].
    """
    k = len(groups[0])
    if k > MOST:
        parts = [slice(first, min(first + MOST // 2, k)) for first in range(0, k, MOST // 2)]
        for a, b in combinations(parts, 2):
            of_both = [[*group[a], *group[b]] for group in groups]
            both = empty((len(out), len(of_both[0]), len(of_both[0])), dtype=float64, device=out.device)
            gram(of_both, both, bases=bases, rows=rows)
            places = [(a, slice(0, MOST // 2)), (b, slice(MOST // 2, None))]
            for (i, from_i), (j, from_j) in product(places, places):
                out[:, i, j] = both[:, from_i, from_j]
        return
    operands = groups if bases is None else [(*group, base) for group, base in zip(groups, bases, strict=True)]
    for launch in launches(operands, rows):
        partial = partial_grams(launch, k, bases is not None)
        columns = triton.next_power_of_2(k * k)
        _vectors_kernel[(len(launch.runs),)](
            launch.runs,
            partial,
            out,
            ENTRIES=k * k,
            ROWS=2048 // columns,
            COLUMNS=columns,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


def partial_grams(launch: Launch, k: int, base: bool = False) -> Tensor:
    """The Gram matrix of the first k operands in each segment, [segments, k * k] float64.

    Args:
        launch: a table of at least k operands; operand k is the base, if there is one.
        k: at most MOST.
        base: whether a base is subtracted.
    """
    dtypes = launch.dtypes[: k + base]
    crowded = len(dtypes) > 4
    # A thread loads 16 bytes of an input at a time, twice that where inputs are few, and sums runs of these 16 bytes:
    # longer runs would cross threads. More than four operands and their sums would not fit into registers. Their runs
    # have four elements, in float64, which has no errors to keep (up to 226 registers).
    levels = 2 if tl.float32 in dtypes or crowded else 3
    partial = empty((len(launch.table), k * k), dtype=float64, device=launch.table.device)
    _segments_kernel[(len(launch.table),)](
        launch.table,
        partial,
        DTYPES=dtypes,
        K=k,
        BASE=base,
        WIDE=base or tl.float32 in dtypes or crowded,
        LEVELS=levels,
        TILE=32 * WARPS * 2**levels * (2 if k <= 2 else 1),
        OPERANDS=len(launch.dtypes),
        num_warps=WARPS,
        enable_fp_fusion=False,
        **enough_registers(partial.device),
    )
    return partial
