"""The rounding of a GPU, in numpy: bfloat16, TF32 and sums that round once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


def widen(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 codes to float32, exactly: bfloat16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to_bfloat16(values: Floats) -> NDArray[np.uint16]:
    """float32 or float64 to the nearest bfloat16 codes, ties to even; NaN to 0x7fff, as NVIDIA's GPUs do."""
    if values.dtype == np.float64:
        values = narrow_to_odd(values)
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(values.shape)
    below_half = np.uint32(0x7FFF)
    with np.errstate(over="ignore"):  # the codes of negative NaN
        rounded = (bits + below_half + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def cut_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 to bfloat16 codes towards zero; NaN to 0x7fff."""
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
    return np.where(np.isnan(values), 0x7FFF, bits >> 16).astype(np.uint16)


def cut_to_tf32(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 without its last 13 bits, towards zero: the bits of a float32 that a tensor core reads."""
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
    return np.where(np.isnan(values), values, (bits & np.uint32(0xFFFFE000)).view(np.float32))


def narrow_to_odd(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """float64 to float32, to the neighbour with an odd last bit where inexact: rounding that again rounds as if once.

    Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008.
    """
    values = np.asarray(values)
    with np.errstate(over="ignore", under="ignore"):
        nearest = np.asarray(values.astype(np.float32))
    even = (nearest.view(np.uint32) & 1) == 0
    beyond = np.where(values > nearest, np.float32(np.inf), np.float32(-np.inf))
    return np.where(even & (values != nearest) & ~np.isnan(values), np.nextafter(nearest, beyond), nearest)


def multiply_add(x: Floats, y: Floats, z: Floats) -> NDArray[np.float64]:
    """x * y + z of float32 values, such that rounding it to float32 or less rounds the exact result once.

    The product of two float32 is exact in float64, Knuth's two-sum yields the error of the addition, and where there
    is one, the sum is rounded to odd.
    """
    product = np.multiply(x, y, dtype=np.float64)
    addend = np.asarray(z, dtype=np.float64)
    total = np.asarray(product + addend)
    addend_part = total - product
    error = (product - (total - addend_part)) + (addend - addend_part)
    inexact = np.isfinite(total) & (error != 0) & ((total.view(np.uint64) & 1) == 0)
    return np.where(inexact, np.nextafter(total, np.copysign(np.inf, error)), total)
