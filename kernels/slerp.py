"""slerp: spherical interpolation of all tensors of a model, in four launches and without a wait of the host.

    table          a row of int64 for each segment of 16,384 elements (segments.py)
    Gram matrices  of each segment, by the kernel of gram
    coefficients   one program a pair: adds the matrices of its segments, in a fixed order, and computes in float64
    combine        out = c_a a + c_b b, by the kernel of combine

Moves 10 bytes an element of a bf16 pair: both inputs twice, the output once. In addition, for each segment, its row is
written once and read twice (144 bytes) and its matrix written and read (64 bytes), 0.13 % of its 163,840 bytes.

The arithmetic of the coefficients is that of `arcmerge.geometry.slerp_coefficients`, but for arccos and sin, because
that of libdevice keeps an array in local memory. With x = tan(θ/2) = sqrt((1 - cos θ) / (1 + cos θ)), four times
x := x / (1 + sqrt(1 + x²)) halves the angle, until the series of arctan converges; and sin(π u) is the series of
sin(π f), with u = n + f and |f| <= 1/2, which is exact. Every operation is one of + - * / sqrt and floor, rounded to
nearest, so that all GPUs, the interpreter and the emulator have the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor, empty, float32

from .combine import combine_segments
from .gram import WARPS, partial_grams, sum_segments
from .segments import tabulated

PI = tl.constexpr(math.pi)
# The series end where a term is below 2^-53 of the sum, for x² <= tan(π / 32)² and (π f)² <= (π / 2)².
_ARCTAN_TERMS = tl.constexpr(9)
_SINE_TERMS = tl.constexpr(12)


@triton.jit
def _arc(cosine):
    """arccos(cosine) / π, for float64 in (-1, 1)."""
    x = tl.sqrt((1 - cosine) / (1 + cosine))
    for _ in tl.static_range(4):
        x = x / (1 + tl.sqrt(1 + x * x))
    series = x * 0
    for term in tl.static_range(_ARCTAN_TERMS):
        series = 1 / (2 * (_ARCTAN_TERMS - term) - 1) - x * x * series
    return x * series * (32 / PI)


@triton.jit
def _sine(u):
    """sin(π u), for float64."""
    whole = tl.floor(u + 0.5)
    x = (u - whole) * PI
    series = x * 0 + 1
    for term in tl.static_range(_SINE_TERMS):
        series = 1 - x * x * series * (1 / (2 * (_SINE_TERMS - term) * (2 * (_SINE_TERMS - term) + 1)))
    odd = whole - 2 * tl.floor(whole * 0.5)
    return x * series * (1 - 2 * odd)


@triton.jit
def _entry(sums, index: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, 4) == index, sums, 0.0), axis=0)


@triton.jit
def _coefficients_kernel(
    coefficients_ptr,
    runs_ptr,
    partial_ptr,
    t_ptr,
    NORMALIZE: tl.constexpr,
    NEARLY_PARALLEL: tl.constexpr,
    NEARLY_ZERO: tl.constexpr,
    T_STRIDE: tl.constexpr,
    RUN_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
):
    vector, sums = sum_segments(runs_ptr + tl.program_id(0).to(tl.int64) * RUN_STRIDE, partial_ptr, 4, ROWS, 4)
    t = tl.load(t_ptr + vector * T_STRIDE)
    aa, ab, bb = _entry(sums, 0), _entry(sums, 1), _entry(sums, 3)
    length_a, length_b = tl.sqrt(aa), tl.sqrt(bb)
    square_a = tl.where(length_a > NEARLY_ZERO, aa, 1.0)
    square_b = tl.where(length_b > NEARLY_ZERO, bb, 1.0)
    cosine = ab / tl.sqrt(square_a * square_b)
    cosine = tl.where(cosine > 1, 1.0, tl.where(cosine < -1, -1.0, cosine))
    linear = tl.abs(cosine) > NEARLY_PARALLEL

    arc = _arc(tl.where(linear, 0.0, cosine))
    sine = _sine(arc)
    straight_b = t.to(tl.float32)
    straight_a = (1 - straight_b).to(tl.float64)
    straight_b = straight_b.to(tl.float64)
    a = tl.where(linear, straight_a, _sine((1 - t) * arc) / sine)
    b = tl.where(linear, straight_b, _sine(t * arc) / sine)
    if NORMALIZE:
        length = (1 - t) * length_a + t * length_b
        square = (a + b * cosine) * a + (a * cosine + b) * b
        factor = length / tl.sqrt(tl.where(square > 0, square, 0.0))
        linear = (cosine < -NEARLY_PARALLEL) | (length_a <= NEARLY_ZERO) | (length_b <= NEARLY_ZERO)
        a = tl.where(linear, straight_a, factor * a / length_a)
        b = tl.where(linear, straight_b, factor * b / length_b)

    # Inputs that are not finite have no angle, but an end is a copy whatever the other input is.
    missing = tl.where(tl.abs(aa + ab + ab + bb) < float("inf"), 0.0, float("nan"))
    a = tl.where((t == 0) | (t == 1), 1 - t, a + missing)
    b = tl.where((t == 0) | (t == 1), t, b + missing)
    coefficients_ptr += vector * 2
    tl.store(coefficients_ptr, a)  # rounds to the dtype of the coefficients
    tl.store(coefficients_ptr + 1, b)


def slerp(
    outs: Sequence[Tensor],
    pairs: Sequence[tuple[Tensor, Tensor]],
    t: Tensor,
    nonfinite: Tensor,
    *,
    normalize: bool,
    nearly_parallel: float,
    nearly_zero: float,
) -> None:
    """Fill outs[i] with the point at t[i] between pairs[i]; four launches for each combination of dtypes.

    Args:
        outs: n tensors.
        pairs: n pairs. A pair and its output are contiguous, of one length and each bf16, f16 or f32.
        t: [n] or [1] float64.
        nonfinite: [n] int64; the count of values written that are infinite or NaN is added to it.
        normalize: whether lengths are interpolated linearly.
        nearly_parallel: the cosine above which the interpolation is on the straight line.
        nearly_zero: the length up to which a tensor has no direction.
    """
    coefficients = empty((len(pairs), 2), dtype=float32, device=t.device)
    for launch in tabulated([(*pair, out) for pair, out in zip(pairs, outs, strict=True)], outs[0]):
        _coefficients_kernel[(len(launch.runs),)](
            coefficients,
            launch.runs,
            partial_grams(launch, 2),
            t,
            NORMALIZE=normalize,
            NEARLY_PARALLEL=nearly_parallel,
            NEARLY_ZERO=nearly_zero,
            T_STRIDE=int(len(t) > 1),
            RUN_STRIDE=launch.runs.stride(0),
            ROWS=512,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
        combine_segments(launch, coefficients, nonfinite, skip_zeros=True)
