"""consensus_combine: adds to a base the differences that are kept and that agree on a sign, elementwise.

Every operation is rounded to float32, from left to right, and the result once to the dtype of the output (nearest
even): the same bits as the reference. Reads each input and the base once and writes the output once. One program a
segment. FMA is off, as in combine.

Where a cut lies among equal magnitudes, the rank of an element among its equals decides. A first launch then counts the
equals of each segment; the sums over the segments before it, and in the program over the elements before it, are ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .cuts import between, equals_before, read_cuts, tile_of
from .segments import launches, read_first, read_row, store
from .selection import Choice, kept_at_random, read_tile
from .target import enough_registers


@triton.jit
def _sum(terms, K: tl.constexpr):
    """From left to right."""
    total = terms[0]
    for i in tl.static_range(1, K):
        total += terms[i]
    return total


@triton.jit
def _agreeing(kept, factors, K: tl.constexpr, ELECTION: tl.constexpr, ZERO_IS_NEGATIVE: tl.constexpr):
    """Which of the differences agree with the sign that they elect."""
    agree = ()
    if ELECTION == "none":
        for i in tl.static_range(K):
            agree += (kept[i] != 0,)
    else:
        votes = ()
        ballots = ()
        for i in tl.static_range(K):
            vote = factors[4 * i] * kept[i]
            votes += (vote,)
            if ELECTION == "count":
                vote = (vote > 0).to(tl.float32) - (vote < 0).to(tl.float32)
            ballots += (vote,)
        total = _sum(ballots, K)
        if ZERO_IS_NEGATIVE:
            negative = total <= 0
        else:
            negative = total < 0
        for i in tl.static_range(K):
            agree += (tl.where(negative, votes[i] < 0, votes[i] > 0),)
    return agree


@triton.jit
def _mean(kept, agree, factors, floor, K: tl.constexpr):
    """The sum of the values of the inputs that agree, over the sum of their shares."""
    voters = agree[0].to(tl.int32)
    for i in tl.static_range(1, K):
        voters += agree[i].to(tl.int32)
    parts = ()
    shares = ()
    for i in tl.static_range(K):
        value = tl.where(voters == 1, factors[4 * i + 3], factors[4 * i + 1])
        parts += (tl.where(agree[i], value * kept[i], 0.0),)
        shares += (tl.where(agree[i], factors[4 * i + 2], 0.0),)
    share = _sum(shares, K)
    if floor is None:
        share = tl.where(share == 0, 1.0, share)
    else:
        share = tl.where(share < floor, floor, share)
    return tl.div_rn(_sum(parts, K), share)


@triton.jit
def _write_tile(
    left,
    addresses,
    cuts,
    keys_ptr,
    limits,
    scales,
    factors,
    floor,
    rows_ptr,
    start,
    first,
    count,
    DTYPES: tl.constexpr,
    K: tl.constexpr,
    RANKED: tl.constexpr,
    ELECTION: tl.constexpr,
    ZERO_IS_NEGATIVE: tl.constexpr,
    JOINT: tl.constexpr,
    ROUNDED: tl.constexpr,
    TILE: tl.constexpr,
    VECTORED: tl.constexpr,
):
    """Write a tile. Returns 1 for each element that is not finite, and the equals that are left then."""
    base, found, codes, inside = read_tile(
        addresses, rows_ptr, start, first, count, DTYPES, K, JOINT, ROUNDED, TILE, VECTORED
    )
    finite = inside
    kept = ()
    left_then = ()
    for i in tl.static_range(K):
        # A comparison with NaN is false.
        finite = finite & (tl.abs(found[i]) < float("inf"))
        chosen, own = between(
            codes[0 if JOINT else i], inside, cuts[2 * i], cuts[2 * i + 1], left[2 * i : 2 * i + 2], RANKED
        )
        left_then += own
        chosen = kept_at_random(chosen, keys_ptr + i, limits[i], first + start, TILE)
        difference = found[i]
        if len(scales) > 0:
            difference *= scales[i]
        kept += (tl.where(chosen, difference, 0.0),)
    agree = _agreeing(kept, factors, K, ELECTION, ZERO_IS_NEGATIVE)
    out = tl.where(finite, base + _mean(kept, agree, factors, floor, K), float("nan"))
    offsets = start + tl.arange(0, TILE)
    return store(addresses[K + 1], offsets, count, out, DTYPES[K + 1], VECTORED), left_then


@triton.jit
def _consensus_kernel(
    table_ptr,
    factors_ptr,
    cuts_ptr,
    before_ptr,
    keys_ptr,
    limits_ptr,
    scales_ptr,
    starts_ptr,
    rows_ptr,
    nonfinite_ptr,
    floor,
    DTYPES: tl.constexpr,
    K: tl.constexpr,
    ELECTION: tl.constexpr,
    ZERO_IS_NEGATIVE: tl.constexpr,
    JOINT: tl.constexpr,
    ROUNDED: tl.constexpr,
    TILE: tl.constexpr,
):
    RANKED: tl.constexpr = before_ptr is not None
    segment = tl.program_id(0).to(tl.int64)
    table_ptr += segment * (K + 5)
    addresses, count, vectored, group = read_row(table_ptr, K + 2, TILE)
    first = tl.load(starts_ptr + group) + read_first(table_ptr, K + 2)
    if rows_ptr is not None:
        rows_ptr += group * 2
    if RANKED:
        before_ptr += segment * K * 2
    cuts, left = read_cuts(cuts_ptr + group * K * 4, before_ptr, K)
    factors = ()
    for i in tl.static_range(4 * K):
        factors += (tl.load(factors_ptr + group * K * 4 + i),)
    keys_ptr += group * K
    limits = ()
    scales = ()
    for i in tl.static_range(K):
        limits += (tl.load(limits_ptr + group * K + i),)
        if scales_ptr is not None:
            scales += (tl.load(scales_ptr + group * K + i),)
    nonfinite = tl.zeros((TILE,), tl.int32)
    for start in range(0, vectored, TILE):
        found, left = _write_tile(
            left,
            addresses,
            cuts,
            keys_ptr,
            limits,
            scales,
            factors,
            floor,
            rows_ptr,
            start,
            first,
            count,
            DTYPES,
            K,
            RANKED,
            ELECTION,
            ZERO_IS_NEGATIVE,
            JOINT,
            ROUNDED,
            TILE,
            True,
        )
        nonfinite += found
    for start in range(vectored, count, TILE):
        found, left = _write_tile(
            left,
            addresses,
            cuts,
            keys_ptr,
            limits,
            scales,
            factors,
            floor,
            rows_ptr,
            start,
            first,
            count,
            DTYPES,
            K,
            RANKED,
            ELECTION,
            ZERO_IS_NEGATIVE,
            JOINT,
            ROUNDED,
            TILE,
            False,
        )
        nonfinite += found
    total = tl.sum(nonfinite, axis=0)
    if total > 0:
        # The sum of integers does not depend on the order of the programs.
        tl.atomic_add(nonfinite_ptr + group, total.to(tl.int64), sem="relaxed")


def consensus_combine(
    outs: Sequence[Tensor],
    groups: Sequence[Sequence[Tensor]],
    bases: Sequence[Tensor],
    factors: Tensor,
    cuts: Tensor,
    choice: Choice,
    nonfinite: Tensor,
    *,
    scales: Tensor | None = None,
    election: str = "none",
    zero_is_negative: bool = False,
    floor: float = 0.0,
    ranked: bool = True,
) -> None:
    """Fill outs[g] with the consensus of the k tensors of groups[g], k = 1 to 8, as the op consensus_combine has it.

    Args:
        outs: one tensor a group.
        groups: G groups of k tensors. A group, its base and its output are contiguous, of one length and each bf16, f16
            or f32; groups may differ in length and dtype.
        bases: a tensor for each group.
        factors: [G, k, 4] float32, the vote, value, share and alone of each input.
        cuts: [G, k, 4] int64. A rank counts from the first element of a group: in a part of a tensor it is the rank in
            the tensor less the equals of the parts before (see count_equals).
        choice: with keys and limits [G, k].
        nonfinite: [G] int64; the count of values written that are infinite or NaN is added to it.
        scales: [G, k] float32, the factors of the differences that are kept; None for differences as they are.
        election, zero_is_negative, floor: as in the op.
        ranked: False promises that no cut lies among equals: that every rank is at most 0 or as large as the group. It
            saves a launch that reads all tensors once more.
    """
    operands = [(*group, base, out) for group, base, out in zip(groups, bases, outs, strict=True)]
    for launch in launches(operands):
        k = len(launch.dtypes) - 2
        tile, warps = tile_of(k, ranked)
        _consensus_kernel[(len(launch.table),)](
            launch.table,
            factors,
            cuts,
            equals_before(launch, cuts, choice) if ranked else None,
            choice.keys,
            choice.limits,
            scales,
            choice.starts,
            choice.rows,
            nonfinite,
            floor or None,
            DTYPES=launch.dtypes,
            K=k,
            ELECTION=election,
            ZERO_IS_NEGATIVE=zero_is_negative,
            JOINT=choice.joint,
            ROUNDED=choice.rounded,
            TILE=tile,
            num_warps=warps,
            enable_fp_fusion=False,
            **enough_registers(nonfinite.device),
        )
