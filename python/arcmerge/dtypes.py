"""The element types of a checkpoint, with their names in torch, in safetensors and in the native code."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class DType:
    """An element type.

    Attributes:
        name: the name in torch and in config.json.
        code: the name in safetensors.
        itemsize: the size of an element in bytes.
        native: the number of the type in csrc; -1 for types that can be copied but not merged.
        largest: the largest finite value of a type that can be merged.
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
    """The smallest mergeable type that represents every value of `dtypes`, as torch promotes types."""
    distinct = set(dtypes)
    return distinct.pop() if len(distinct) == 1 else F32
