"""Functions of libdevice and inline PTX, which the interpreter does not know, in numpy.

Functions take float64 and may return float64: the interpreter rounds to the type of the call. A GPU approximates
where these are exact; `tanh.approx.f32` is off by up to 2^-11 of the value, `ex2.approx.f32` by 2^-22.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .rounding import multiply_add

Function = Callable[..., NDArray[Any]]

_SMALLEST_NORMAL = 2.0**-126

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _flushed(values: NDArray[Any]) -> NDArray[Any]:
    """.ftz: subnormal values become zeros of their sign."""
    return np.where(np.abs(values) < _SMALLEST_NORMAL, np.copysign(0.0, values), values)


def _reciprocal_root(values: NDArray[Any]) -> NDArray[Any]:
    return 1 / np.sqrt(values)


_OF_BOTH_FLOATS: dict[str, Function] = {
    "acos": np.arccos,
    "asin": np.arcsin,
    "atan": np.arctan,
    "atan2": np.arctan2,
    "ceil": np.ceil,
    "cos": np.cos,
    "erf": _erf,
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "fabs": np.abs,
    "floor": np.floor,
    "log": np.log,
    "log1p": np.log1p,
    "log2": np.log2,
    "pow": np.power,
    "rint": np.rint,
    "rsqrt": _reciprocal_root,
    "sin": np.sin,
    "sqrt": np.sqrt,
    "tanh": np.tanh,
    "trunc": np.trunc,
}

LIBDEVICE: dict[str, Function] = {
    **{f"__nv_{name}{suffix}": function for name, function in _OF_BOTH_FLOATS.items() for suffix in ("", "f")},
    "__nv_fmaf": multiply_add,
    "__nv_fast_expf": np.exp,
    "__nv_fast_logf": np.log,
    "__nv_fast_log2f": np.log2,
    "__nv_fast_sinf": np.sin,
    "__nv_fast_cosf": np.cos,
    "__nv_isnanf": np.isnan,
    "__nv_isnand": np.isnan,
    "__nv_isinff": np.isinf,
    "__nv_isinfd": np.isinf,
}

INLINE_ASM: dict[str, Function] = {
    "tanh.approx.f32 $0, $1;": np.tanh,
    "ex2.approx.f32 $0, $1;": np.exp2,
    "ex2.approx.ftz.f32 $0, $1;": lambda values: _flushed(np.exp2(_flushed(values))),
    "lg2.approx.f32 $0, $1;": np.log2,
    "rsqrt.approx.f32 $0, $1;": _reciprocal_root,
    # A wait for stores, which are complete at once here, and a copy.
    "s_waitcnt vmcnt(0) v_mov_b32 $0, $1": np.array,
}
