"""magnitude_histogram: how many elements of a difference have each magnitude, by the upper 15 bits of its code.

Reads the tensor and its base once: 4 bytes an element of a bf16 pair. A program counts the elements of a tile in shared
memory and adds the bins that are not empty to the result. All sums are of integers, which no order changes. 32,768 bins
of 32 bits would fit the shared memory of sm_80, sm_90 and sm_100 alone. So shared memory has a window of bins, which
fits everywhere: with 8,192 bins those of magnitudes from 2^-63 to 2, and one for zeros. The few elements outside are
added to the result one by one, and so are the lower 16 bits of codes, where they are not 0: for the difference of two
bf16 values of one sign within a factor of two, they are.

tl.histogram increments shared memory from Triton 3.8 on. Older versions compare each element with every bin; with them
the window is small, most elements are added one by one, and the kernel is slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .segments import launches, read_first, read_row
from .selection import ALL, Choice, kept_at_random, read_tile
from .target import TRITON, configuration

BINS = tl.constexpr(32768)
END = tl.constexpr(16384)  # one past the last bin of the window, that of magnitudes from 2 on


@triton.jit
def _codes(
    addresses,
    rows_ptr,
    start,
    first,
    count,
    vectored,
    DTYPES: tl.constexpr,
    K: tl.constexpr,
    JOINT: tl.constexpr,
    ROUNDED: tl.constexpr,
    TILE: tl.constexpr,
):
    """The codes of a tile, and which of its elements exist."""
    if start < vectored:
        _, _, codes, inside = read_tile(addresses, rows_ptr, start, first, count, DTYPES, K, JOINT, ROUNDED, TILE, True)
    else:
        _, _, codes, inside = read_tile(
            addresses, rows_ptr, start, first, count, DTYPES, K, JOINT, ROUNDED, TILE, False
        )
    return codes[0], inside


@triton.jit
def _add(out_ptr, spots, values, chosen):
    """Add values one by one, if there are any."""
    if tl.max(chosen.to(tl.int32), axis=0) > 0:
        # 32 bits are less to exchange between threads than addresses.
        tl.atomic_add(out_ptr + spots.to(tl.int64), values.to(tl.int64), mask=chosen, sem="relaxed")


@triton.jit
def _segments_kernel(
    table_ptr,
    keys_ptr,
    limits_ptr,
    starts_ptr,
    rows_ptr,
    out_ptr,
    DTYPES: tl.constexpr,
    K: tl.constexpr,
    JOINT: tl.constexpr,
    ROUNDED: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
):
    BEFORE: tl.constexpr = END - WINDOW  # the bin whose place in the window zeros have
    table_ptr += tl.program_id(0).to(tl.int64) * (K + 4)
    addresses, count, vectored, group = read_row(table_ptr, K + 1, TILE)
    first = tl.load(starts_ptr + group) + read_first(table_ptr, K + 1)
    limit = tl.load(limits_ptr + group)
    if rows_ptr is not None:
        rows_ptr += group * 2
    out_ptr += group * BINS * (2 if ROUNDED else 4)
    place = tl.arange(0, WINDOW)
    place = tl.where(place == 0, 0, place + BEFORE)
    for start in range(0, count, TILE):
        codes, inside = _codes(addresses, rows_ptr, start, first, count, vectored, DTYPES, K, JOINT, ROUNDED, TILE)
        kept = kept_at_random(inside, keys_ptr + group, limit, first + start, TILE)
        bins = codes >> 16
        windowed = ((bins > BEFORE) & (bins < END)) | (codes == 0)
        for plane in range(tl.where(limit < ALL, 0, 1), 2):
            chosen = inside & (kept == (plane == 1))
            counts = tl.histogram(tl.where(codes == 0, 0, bins - BEFORE), WINDOW, mask=chosen & windowed)
            tl.atomic_add(out_ptr + plane * BINS + place, counts.to(tl.int64), mask=counts > 0, sem="relaxed")
        spot = tl.where(kept, BINS, 0) + bins
        _add(out_ptr, spot, tl.full((TILE,), 1, tl.int32), inside & (windowed == 0))
        if not ROUNDED:
            low = codes & 0xFFFF
            _add(out_ptr + 2 * BINS, spot, low, inside & (low != 0))


@triton.jit
def _prefixes_kernel(
    table_ptr,
    starts_ptr,
    rows_ptr,
    prefixes_ptr,
    out_ptr,
    PREFIXES,
    DTYPES: tl.constexpr,
    K: tl.constexpr,
    JOINT: tl.constexpr,
    ROUNDED: tl.constexpr,
    TILE: tl.constexpr,
):
    table_ptr += tl.program_id(0).to(tl.int64) * (K + 4)
    addresses, count, vectored, group = read_row(table_ptr, K + 1, TILE)
    first = tl.load(starts_ptr + group) + read_first(table_ptr, K + 1)
    if rows_ptr is not None:
        rows_ptr += group * 2
    prefixes_ptr += group * PREFIXES
    out_ptr += group * PREFIXES * 65536
    for start in range(0, count, TILE):
        codes, inside = _codes(addresses, rows_ptr, start, first, count, vectored, DTYPES, K, JOINT, ROUNDED, TILE)
        low = codes & 0xFFFF
        counter = out_ptr
        for number in range(PREFIXES):
            found = inside & (codes >> 16 == tl.load(prefixes_ptr + number))
            # Many differences of bf16 values have no lower bits; they would all be added to one address.
            zeros = tl.sum((found & (low == 0)).to(tl.int32), axis=0)
            if zeros > 0:
                tl.atomic_add(counter, zeros.to(tl.int64), sem="relaxed")
            _add(counter, low, tl.full((TILE,), 1, tl.int32), found & (low != 0))
            counter += 65536


class Tile(NamedTuple):
    """The bins in shared memory, the elements that are counted there at once, and the warps of a program."""

    window: int
    elements: int
    warps: int


# 32 KB of shared memory a program, and 32 elements a thread: as many bytes under way as an H100 needs. Fewer elements
# would clear and read more bins than they count. gfx942 runs out of registers.
INCREMENTING = {"sm_80": Tile(8192, 8192, 16), "sm_120": Tile(8192, 4096, 8), "gfx942": Tile(4096, 4096, 8)}
COMPARING = {"sm_80": Tile(32, 2048, 4), "gfx942": Tile(64, 2048, 4)}
FIRST_INCREMENTING = (3, 8)


def magnitude_histogram(
    out: Tensor,
    groups: Sequence[Sequence[Tensor]],
    bases: Sequence[Tensor],
    choice: Choice,
    *,
    prefixes: Tensor | None = None,
) -> None:
    """Add to out[g] the counts of group g, as the op magnitude_histogram has them.

    Args:
        out: [G, 4, 32768] int64; [G, 2, 32768] if the choice is rounded; [G, P, 65536] with prefixes.
        groups: G groups of one tensor; of k = 1 to 8 if the choice is joint. The tensors of a group and its base are
            contiguous, of one length and each bf16, f16 or f32; groups may differ in length and dtype.
        bases: a tensor for each group. Groups that share one should be neighbours, which read it at the same time.
        choice: with keys and limits [G], one of each a group.
        prefixes: [G, P] int64, the bins to count by the lower 16 bits of their codes; None for all bins.
    """
    table = INCREMENTING if TRITON >= FIRST_INCREMENTING else COMPARING
    window, elements, warps = configuration(table, out.device)
    operands = [(*group, base) for group, base in zip(groups, bases, strict=True)]
    for dtypes, rows, _ in launches(operands, interleaved=True):
        # Differences of several inputs need the registers of half of the elements.
        common = {
            "DTYPES": dtypes,
            "K": len(dtypes) - 1,
            "JOINT": choice.joint,
            "ROUNDED": choice.rounded,
            "TILE": elements // (4 if choice.joint else 1),
            "num_warps": warps // 2 if choice.joint else warps,
            "enable_fp_fusion": False,
        }
        if prefixes is None:
            _segments_kernel[(len(rows),)](
                rows,
                choice.keys,
                choice.limits,
                choice.starts,
                choice.rows,
                out,
                WINDOW=window,
                **common,
            )
        else:
            _prefixes_kernel[(len(rows),)](rows, choice.starts, choice.rows, prefixes, out, prefixes.shape[1], **common)
