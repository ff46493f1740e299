"""Number formats: what the bits of a register mean, and rounding to a format in every direction.

float32 and float64 are numpy's. The halves, bf16 and f16, are kept as their 16-bit codes and computed with in float64.
Packed types are several of a format in one register.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

PACKED = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32"}
_BITS = {"pred": np.bool_, "f16": np.uint16, "bf16": np.uint16, "f32": np.float32, "tf32": np.uint32, "f64": np.float64}
_BITS |= {"f16x2": np.uint32, "bf16x2": np.uint32, "f32x2": np.uint64}
_CODES = {"f16": np.uint16, "bf16": np.uint16, "f32": np.uint32, "f64": np.uint64}


def dtype_of(kind: str) -> np.dtype[Any]:
    """numpy's dtype for values of a PTX type; KeyError if there is none."""
    if kind in _BITS:
        return np.dtype(_BITS[kind])
    return np.dtype({"b": "u", "u": "u", "s": "i"}[kind[0]] + {"8": "1", "16": "2", "32": "4", "64": "8"}[kind[1:]])


def is_float(kind: str) -> bool:
    return kind in _CODES


def decode(values: Array, kind: str) -> Array:
    """Values of a float type as float64, exactly."""
    if kind == "bf16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    elif kind == "f16":
        values = values.view(np.float16)
    return values.astype(np.float64)


def encode(values: Array, kind: str, mode: str = "rn") -> Array:
    """float64 to a float type. mode: rn nearest even, rz to zero, rm down, rp up. A NaN becomes the one of the GPU."""
    codes = _nearest(values, kind)
    if mode != "rn":
        rounded = decode(codes.view(dtype_of(kind)), kind)
        negative = np.signbit(values)
        # Codes are sign and magnitude: one less is one step to zero.
        outward = {"rz": np.zeros_like(negative), "rm": negative, "rp": ~negative}[mode]
        too_large = np.abs(rounded) > np.abs(values)
        too_small = np.abs(rounded) < np.abs(values)
        one = codes.dtype.type(1)
        codes = np.where(too_large & ~outward, codes - one, np.where(too_small & outward, codes + one, codes))
    nan = np.isnan(values)
    if nan.any() and kind != "f64":
        codes = np.where(nan, codes.dtype.type(0x7FFFFFFF if kind == "f32" else 0x7FFF), codes)
    return codes.view(dtype_of(kind))


def canonical(values: Array) -> Array:
    """float32 results of arithmetic: every NaN is 0x7fffffff. float64 ones as they are."""
    if values.dtype == np.float32:
        nan = np.isnan(values)
        if nan.any():
            return np.where(nan, np.uint32(0x7FFFFFFF), values.view(np.uint32)).view(np.float32)
    return values


def flush(values: Array) -> Array:
    """.ftz: subnormal float32 values become zeros of their sign."""
    return np.where(np.abs(values) < np.float32(2.0**-126), np.copysign(np.float32(0), values), values)


def fused(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in float64, rounded to odd, so that a second rounding, to float32 or less, is the only one.

    a * b must be exact in float64, as it is for float32 values and less. To odd: what is inexact gets an odd last bit
    (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", 2008).
    """
    product = a * b
    total = product + c
    # Only totals whose last 28 bits are zero can be a tie of the second rounding, which takes away 29 or more.
    if not ((total.view(np.uint64) & 0x0FFFFFFF) == 0).any():
        return total
    part = total - product
    error = (product - (total - part)) + (c - part)
    inexact = np.isfinite(total) & (error != 0) & (total.view(np.uint64) & 1 == 0)
    return np.where(inexact, np.nextafter(total, np.copysign(np.inf, error)), total)


def round_tf32(values: Array, mode: str) -> Array:
    """float32 to tf32, of 10 bits of fraction: rn nearest even, rna nearest and ties away from zero, rz to zero."""
    bits = values.view(np.uint32)
    if mode == "rz":
        return bits & np.uint32(0xFFFFE000)
    half = np.uint32(0x1000) if mode == "rna" else np.uint32(0x0FFF) + ((bits >> 13) & 1)
    return np.where(np.isnan(values), np.uint32(0x7FFFFFFF), (bits + half) & np.uint32(0xFFFFE000))


def _nearest(values: Array, kind: str) -> Array:
    if kind == "bf16":
        codes = _to_odd_float32(values)
        return ((codes + (np.uint32(0x7FFF) + ((codes >> 16) & 1))) >> 16).astype(np.uint16)
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    return values.astype(dtype_of(kind)).view(_CODES[kind])


def _to_odd_float32(values: Array) -> Array:
    """Codes of float32 that keep a trace of what was dropped, so that rounding once more is rounding once."""
    rounded = values.astype(np.float32)
    codes = rounded.view(np.uint32)
    if (rounded == values).all():
        return codes
    inexact = rounded.astype(np.float64) != values
    toward_zero = codes - (np.abs(rounded) > np.abs(values))
    return np.where(inexact & ~np.isnan(values), toward_zero | np.uint32(1), codes).astype(np.uint32)
