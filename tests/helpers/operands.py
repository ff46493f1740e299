"""Tensors as the native operations see them, and their results compared bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from arcmerge import _C

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CODES = {BF16: 0, F16: 1, F32: 2}
every_variant = pytest.mark.parametrize("variant", _C.variants())


@contextmanager
def using(variant: str) -> Iterator[None]:
    """One variant of the native code, then again the one before it."""
    before = _C.variant()
    _C.use_variant(variant)
    try:
        yield
    finally:
        _C.use_variant(before)


def operand(tensor: Tensor, cast: torch.dtype | None = None) -> _C.Operand:
    return _C.Operand(tensor.data_ptr(), CODES[tensor.dtype], -1 if cast is None else CODES[cast])


def gathered(rows: list[Tensor], cast: torch.dtype | None = None) -> tuple[_C.Operand, Tensor]:
    """The operand whose rows lie where `rows` do, and the array of addresses to keep alive."""
    addresses = torch.tensor([row.data_ptr() for row in rows])
    code = -1 if cast is None else CODES[cast]
    return _C.Operand(0, CODES[rows[0].dtype], code, addresses.data_ptr(), len(rows[0])), addresses


def at_offset(tensor: Tensor, nbytes: int) -> Tensor:
    """A buffer of bytes that holds the tensor's elements from byte `nbytes` on. Keep it alive, give out its address."""
    buffer = torch.empty(nbytes + tensor.numel() * tensor.element_size(), dtype=torch.uint8)
    buffer[nbytes:] = tensor.contiguous().view(torch.uint8)
    return buffer


def normal(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def any_bits(count: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Every kind of value with the probability of its bit patterns: denormals, infinities and NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == F32:
        return torch.randint(-(2**31), 2**31, (count,), dtype=torch.int32, generator=generator).view(F32)
    return torch.randint(-(2**15), 2**15, (count,), dtype=torch.int16, generator=generator).view(dtype)


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """Equal, with equal signs of zero, NaN where NaN is expected (its sign and payload differ between processors)."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    nan = expected.isnan()
    equal = actual.view(integers) == expected.view(integers)
    return bool((torch.where(nan, actual.isnan(), equal)).all())
