"""The interpreter's conversions between float32 and bfloat16, put right.

Triton's interpreter (3.6 to 3.9) cuts float32 to bfloat16 where a GPU rounds to nearest even, and reads subnormal
bfloat16 values wrongly. Kernels that do arithmetic in float32 need nothing else to give the bits of a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widen(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 codes to float32, exactly: bfloat16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 to the nearest bfloat16 codes, ties to even; NaN to 0x7fff, as NVIDIA's GPUs do."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    below_half = np.uint32(0x7FFF)
    with np.errstate(over="ignore"):  # the codes of negative NaN
        rounded = (bits + below_half + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


@contextmanager
def nearest_even() -> Iterator[None]:
    """Within this context the interpreter converts between float32 and bfloat16 as a GPU does."""
    stock = InterpreterBuilder.cast_impl

    def cast(builder: InterpreterBuilder, source: TensorHandle, target: Any) -> TensorHandle:
        match source.dtype.scalar, target.scalar:
            case tl.float32, tl.bfloat16:
                return TensorHandle(round_to_bfloat16(source.data), tl.bfloat16)
            case tl.bfloat16, tl.float32:
                return TensorHandle(widen(source.data), tl.float32)
        return stock(builder, source, target)

    with mock.patch.object(InterpreterBuilder, "cast_impl", cast):
        yield
