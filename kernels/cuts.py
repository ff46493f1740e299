"""Cuts between elements in the order of their codes, as arcmerge.ops.selection.between has them.

Where a cut lies among equals, the rank of an element among them decides. A launch counts the equals of each segment;
the sums over the segments before one, and in its program over the elements before one, are ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import segments
from .segments import Launch, launches, read_first, read_row
from .selection import Choice, read_tile


def tile_of(k: int, ranked: bool) -> tuple[int, int]:
    """Elements of a tile and warps: 16 bytes of each bf16 input a thread, less where k differences need the registers.

    The compiler spills some with 4 warps and six inputs or more, with four or five that are ranked, and for sm_90 with
    four elements a thread of six inputs.
    """
    return (1024, 4) if k <= 3 else (1024, 8) if k > 6 else (512, 8 if ranked or k == 6 else 4)


@triton.jit
def _cut_code(cut_ptr):
    # No code is negative, and none has more than 31 bits.
    return tl.minimum(tl.maximum(tl.load(cut_ptr), -1), 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _packed(at_upper, at_lower):
    """Two counts in one number: a segment has less than 2^15 elements."""
    return at_upper.to(tl.int32) + (at_lower.to(tl.int32) << 16)


@triton.jit
def _count_tile(
    counts,
    addresses,
    rows_ptr,
    cuts_ptr,
    start,
    first,
    count,
    DTYPES: tl.constexpr,
    K: tl.constexpr,
    JOINT: tl.constexpr,
    ROUNDED: tl.constexpr,
    TILE: tl.constexpr,
    VECTORED: tl.constexpr,
):
    _base, _found, codes, inside = read_tile(
        addresses, rows_ptr, start, first, count, DTYPES, K, JOINT, ROUNDED, TILE, VECTORED
    )
    sums = ()
    for i in tl.static_range(K):
        at_upper = inside & (codes[0 if JOINT else i] == _cut_code(cuts_ptr + i * 4))
        at_lower = inside & (codes[0 if JOINT else i] == _cut_code(cuts_ptr + i * 4 + 2))
        sums += (counts[i] + _packed(at_upper, at_lower),)
    return sums


@triton.jit
def _equals_kernel(
    table_ptr,
    cuts_ptr,
    starts_ptr,
    rows_ptr,
    equals_ptr,
    DTYPES: tl.constexpr,
    K: tl.constexpr,
    JOINT: tl.constexpr,
    ROUNDED: tl.constexpr,
    TILE: tl.constexpr,
):
    """The equals of both cuts of each input in each segment. The operands are K inputs, a base and maybe an output."""
    OPERANDS: tl.constexpr = len(DTYPES)
    segment = tl.program_id(0).to(tl.int64)
    table_ptr += segment * (OPERANDS + 3)
    addresses, count, vectored, group = read_row(table_ptr, OPERANDS, TILE)
    first = tl.load(starts_ptr + group) + read_first(table_ptr, OPERANDS)
    cuts_ptr += group * K * 4
    if rows_ptr is not None:
        rows_ptr += group * 2
    counts = ()
    for _ in tl.static_range(K):
        counts += (tl.zeros((TILE,), tl.int32),)
    for start in range(0, vectored, TILE):
        counts = _count_tile(
            counts, addresses, rows_ptr, cuts_ptr, start, first, count, DTYPES, K, JOINT, ROUNDED, TILE, True
        )
    for start in range(vectored, count, TILE):
        counts = _count_tile(
            counts, addresses, rows_ptr, cuts_ptr, start, first, count, DTYPES, K, JOINT, ROUNDED, TILE, False
        )
    equals_ptr += segment * K * 2
    for i in tl.static_range(K):
        equals = tl.sum(counts[i], axis=0)
        tl.store(equals_ptr + 2 * i, (equals & 0xFFFF).to(tl.int64))
        tl.store(equals_ptr + 2 * i + 1, (equals >> 16).to(tl.int64))


@triton.jit
def read_cuts(cuts_ptr, before_ptr, K: tl.constexpr):
    """The cuts of K inputs for `between`: the codes, and how many equals are left until the rank of each."""
    codes = ()
    left = ()
    for i in tl.static_range(2 * K):
        code = _cut_code(cuts_ptr + 2 * i)
        rank = tl.load(cuts_ptr + 2 * i + 1)
        if before_ptr is None:
            # No cut lies among equals: either all of them are before its rank, or none is.
            if i % 2:
                code += (rank <= 0).to(tl.int32)
            else:
                code -= (rank > 0).to(tl.int32)
        else:
            # A segment has less than 2^15 elements.
            left += (tl.minimum(tl.maximum(rank - tl.load(before_ptr + i), 0), 32767).to(tl.int32),)
        codes += (code,)
    return codes, left


@triton.jit
def between(codes, inside, upper, lower, left, RANKED: tl.constexpr):
    """The elements of a tile between two cuts, and the equals that are left then."""
    if RANKED:
        at_upper = inside & (codes == upper)
        at_lower = inside & (codes == lower)
        equals = _packed(at_upper, at_lower)
        number = tl.cumsum(equals, axis=0)
        kept = ((codes < upper) | (at_upper & ((number & 0xFFFF) > left[0]))) & (
            (codes > lower) | (at_lower & ((number >> 16) <= left[1]))
        )
        total = tl.sum(equals, axis=0)
        left = (tl.maximum(left[0] - (total & 0xFFFF), 0), tl.maximum(left[1] - (total >> 16), 0))
    else:
        kept = (codes <= upper) & (codes >= lower)
    return inside & kept, left


def count_equals(
    out: Tensor, groups: Sequence[Sequence[Tensor]], bases: Sequence[Tensor], cuts: Tensor, choice: Choice
) -> None:
    """Add to out [G, k, 2] int64 how many elements have the codes of the upper and of the lower cut of each input.

    The other arguments are those of consensus_combine; of the choice, keys and limits have no effect.
    """
    for launch in launches([(*group, base) for group, base in zip(groups, bases, strict=True)]):
        equals = _equals(launch, len(launch.dtypes) - 1, cuts, choice)
        out.index_add_(0, launch.table[:, -2], equals)


def _equals(launch: Launch, k: int, cuts: Tensor, choice: Choice) -> Tensor:
    """The equals of both cuts of each input in each segment: [segments, k, 2] int64."""
    tile, warps = tile_of(k, ranked=True)
    equals = torch.empty(len(launch.table), k, 2, dtype=torch.int64, device=cuts.device)
    _equals_kernel[(len(launch.table),)](
        launch.table,
        cuts,
        choice.starts,
        choice.rows,
        equals,
        DTYPES=launch.dtypes,
        K=k,
        JOINT=choice.joint,
        ROUNDED=choice.rounded,
        TILE=tile,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return equals


def equals_before(launch: Launch, cuts: Tensor, choice: Choice) -> Tensor:
    """The equals in the segments of its group before each segment of a launch of k inputs, a base and an output.

    Returns:
        [segments, k, 2] int64.
    """
    equals = _equals(launch, len(launch.dtypes) - 2, cuts, choice)
    before = equals.cumsum(0) - equals
    segment = torch.arange(len(equals), device=equals.device)
    return before - before[segment - launch.table[:, -1] // segments.SEGMENT]
