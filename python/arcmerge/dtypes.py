"""The element types of a checkpoint, under the three names they go by."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class DType:
    """name: as torch and config.json say it; code: as safetensors does; itemsize: bytes.

    native: the number by which csrc knows a type that can be merged, -1 for one that can only be copied.
    largest: the largest finite number of a type that can be merged.
    """

    name: str
    code: str
    itemsize: int
    native: int = -1
    largest: float = math.nan

    @property
    def mergeable(self) -> bool:
        return self.native >= 0


BF16 = DType("bfloat16", "BF16", 2, 0, (2 - 2**-7) * 2.0**127)
F16 = DType("float16", "F16", 2, 1, 65504.0)
F32 = DType("float32", "F32", 4, 2, (2 - 2**-23) * 2.0**127)

MERGEABLE = (BF16, F16, F32)
_COPIED = (
    DType("float64", "F64", 8),
    DType("int64", "I64", 8),
    DType("int32", "I32", 4),
    DType("int16", "I16", 2),
    DType("int8", "I8", 1),
    DType("uint8", "U8", 1),
    DType("bool", "BOOL", 1),
    DType("float8_e4m3fn", "F8_E4M3", 1),
    DType("float8_e5m2", "F8_E5M2", 1),
)

BY_CODE = {dtype.code: dtype for dtype in (*MERGEABLE, *_COPIED)}
BY_NAME = {dtype.name: dtype for dtype in (*MERGEABLE, *_COPIED)}


def promote(dtypes: Iterable[DType]) -> DType:
    """The smallest mergeable type that holds every value of `dtypes` (torch's promotion rule)."""
    distinct = set(dtypes)
    return distinct.pop() if len(distinct) == 1 else F32
