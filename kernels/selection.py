"""The codes and the random numbers of elements, with the bits of those in ops/selection.py and ops/philox.py.

The launchers of both ops take groups: inputs and a base, which may be a part of their tensors. What a group needs
beside its tensors is a row of each of the tensors of a Choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .segments import load

ALL = tl.constexpr(65536)  # above every random number


class Choice(NamedTuple):
    """Which elements random numbers keep, and what their magnitudes are, for G groups of k inputs.

    Args:
        keys: [G, k] int64, of the random numbers.
        limits: [G, k] int32 (see `limits`); 65536 keeps all elements.
        starts: [G] int64, the index of a group's first element in its tensors, a multiple of 8.
        rows: [G, 2] int64, the address of the numbers of the rows of a group's tensors, float32, and the length of a
            row (see `rows`); None for magnitudes as they are.
        joint: whether magnitudes are the variance over the inputs.
        rounded: whether magnitudes are rounded to bfloat16.
    """

    keys: Tensor
    limits: Tensor
    starts: Tensor
    rows: Tensor | None = None
    joint: bool = False
    rounded: bool = False


def limits(probabilities: Tensor) -> Tensor:
    """int32 [*] from float64 [*]: an element of number u is kept if u is less, which is u + 0.5 < 65536 p."""
    return (65536 * probabilities - 0.5).ceil().clamp(0, 65536).to(torch.int32)


def rows(row_scales: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """The addresses of G contiguous float32 tensors, one number a row, and the lengths of the rows: [G, 2] int64."""
    addresses = [[scales.data_ptr(), length] for scales, length in zip(row_scales, lengths, strict=True)]
    return torch.tensor(addresses).to(row_scales[0].device)


@triton.jit
def numbers(key, first, TILE: tl.constexpr):
    """The random numbers of TILE elements from index `first`, a multiple of 8: int32 from 0 to 65535.

    The eight elements of a block of Philox are neighbours, which one thread loads together.
    """
    block = first // 8 + tl.arange(0, TILE // 8)
    low = block.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, low, (block >> 32).to(tl.uint32), low * 0, low * 0)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [TILE]).to(tl.int32)


@triton.jit
def kept_at_random(inside, key_ptr, limit, first, TILE: tl.constexpr):
    """The elements `inside` that random numbers keep."""
    kept = inside
    if limit < ALL:
        # Loaded here, because the compiler keeps 20 numbers that follow from a key in registers if it knows it before.
        kept = inside & (numbers(tl.load(key_ptr), first, TILE) < limit)
    return kept


@triton.jit
def differences(addresses, offsets, count, DTYPES: tl.constexpr, K: tl.constexpr, VECTORED: tl.constexpr):
    """The base and the differences of K inputs from it, float32."""
    base = load(addresses[K], offsets, count, DTYPES[K], VECTORED)
    found = ()
    for i in tl.static_range(K):
        found += (load(addresses[i], offsets, count, DTYPES[i], VECTORED) - base,)
    return base, found


@triton.jit
def row_numbers(rows_ptr, first, inside, TILE: tl.constexpr):
    """The number of the row of each of TILE elements from index `first`."""
    scales_ptr = tl.load(rows_ptr).to(tl.pointer_type(tl.float32))
    length = tl.load(rows_ptr + 1)
    # Only the first division is of 64 bits.
    lane = tl.arange(0, TILE).to(tl.uint32) + (first % length).to(tl.uint32)
    return tl.load(scales_ptr + first // length + lane // length.to(tl.uint32), mask=inside, other=0.0)


@triton.jit
def variance(values, K: tl.constexpr):
    """The population variance of K values, every operation rounded, sums from left to right."""
    total = values[0]
    for i in tl.static_range(1, K):
        total += values[i]
    mean = tl.div_rn(total, K * 1.0)
    squares = (values[0] - mean) * (values[0] - mean)
    for i in tl.static_range(1, K):
        squares += (values[i] - mean) * (values[i] - mean)
    return tl.div_rn(squares, K * 1.0)


@triton.jit
def code(magnitudes, ROUNDED: tl.constexpr):
    """The 31 bits of magnitudes, int32, that order like these; 0x7fc00000 for NaN."""
    if ROUNDED:
        magnitudes = magnitudes.to(tl.bfloat16).to(tl.float32)
    bits = magnitudes.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(magnitudes == magnitudes, bits, 0x7FC00000)


@triton.jit
def read_tile(
    addresses,
    rows_ptr,
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
    """The base, the differences and the codes of K inputs, one code with JOINT; and which elements exist."""
    offsets = start + tl.arange(0, TILE)
    inside = offsets < count
    base, found = differences(addresses, offsets, count, DTYPES, K, VECTORED)
    scales = 1.0
    if rows_ptr is not None:
        scales = row_numbers(rows_ptr, first + start, inside, TILE)
    codes = ()
    if JOINT:
        codes += (code(variance(found, K) * scales, ROUNDED),)
    else:
        for i in tl.static_range(K):
            codes += (code(tl.abs(found[i]) * scales, ROUNDED),)
    return base, found, codes, inside
