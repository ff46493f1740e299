"""Numbers in the corrected interpreter, against torch, whose bfloat16 rounds as a GPU does."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from elementwise import assert_same, interpret

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on the GPU"),
    pytest.mark.filterwarnings("error"),
]

BF16, F16, F32, I32 = torch.bfloat16, torch.float16, torch.float32, torch.int32

EVERY_BF16 = torch.arange(2**16, dtype=I32).to(torch.int16).view(BF16)
# Every bfloat16 and, above it, the next float32, those around the tie, the tie, and the last before the next bfloat16.
AROUND_BF16 = torch.cat([EVERY_BF16.float().view(I32) | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(
    F32
)


def shuffled(values: Tensor, seed: int) -> Tensor:
    return values[torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))]


# Conversions.


@triton.jit
def to_float32(x):
    return x.to(tl.float32)


@triton.jit
def to_float16(x):
    return x.to(tl.float16)


@triton.jit
def to_int32(x):
    return x.to(tl.int32)


@triton.jit
def to_bfloat16(x):
    return x.to(tl.bfloat16)


@triton.jit
def to_bfloat16_by_name(x):
    return x.to(tl.bfloat16, fp_downcast_rounding="rtne")


@triton.jit
def cut_to_bfloat16(x):
    return x.to(tl.bfloat16, fp_downcast_rounding="rtz")


@triton.jit
def identity(x):
    return x


def test_widening_every_bfloat16_keeps_its_bits() -> None:
    bits = interpret(to_float32, EVERY_BF16, dtype=F32).view(I32)
    assert torch.equal(bits, EVERY_BF16.view(torch.int16).to(I32) << 16)


@pytest.mark.parametrize("convert", [to_bfloat16, to_bfloat16_by_name, identity], ids=["to", "by name", "store"])
def test_bfloat16_is_rounded_to_nearest_even(convert: Any) -> None:
    random_bits = torch.randint(-(2**31), 2**31, (2**17,), generator=torch.Generator().manual_seed(0)).to(I32)
    values = torch.cat([AROUND_BF16, random_bits.view(F32)])
    rounded = interpret(convert, values, dtype=BF16)
    assert_same(rounded, values.to(BF16))
    assert (rounded.view(torch.int16)[rounded.isnan()] == 0x7FFF).all()


def test_bfloat16_is_truncated_on_request() -> None:
    values = AROUND_BF16[~AROUND_BF16.isnan()]
    cut = (values.view(I32) >> 16).to(torch.int16).view(BF16)
    assert_same(interpret(cut_to_bfloat16, values, dtype=BF16), cut)


def test_float64_is_rounded_once() -> None:
    # Half-way between two bfloat16, except for a part that float32 cannot hold.
    ties = (EVERY_BF16.float().view(I32) | 0x8000).view(F32).double()
    ties = ties[(ties.abs() < 3e38) & (ties.abs() > 1e-30)]
    above, below = ties * (1 + 2.0**-40), ties * (1 - 2.0**-40)
    assert_same(interpret(to_bfloat16, above, dtype=BF16), (ties * (1 + 2.0**-12)).float().to(BF16))
    assert_same(interpret(to_bfloat16, below, dtype=BF16), (ties * (1 - 2.0**-12)).float().to(BF16))


def test_bfloat16_to_and_from_other_types() -> None:
    assert_same(interpret(to_float16, EVERY_BF16, dtype=F16), EVERY_BF16.to(F16))
    halves = torch.arange(2**16, dtype=I32).to(torch.int16).view(F16)
    assert_same(interpret(to_bfloat16, halves, dtype=BF16), halves.to(BF16))
    integers = torch.arange(-(2**15), 2**15, dtype=I32) * 1001
    assert_same(interpret(to_bfloat16, integers, dtype=BF16), integers.to(BF16))
    small = EVERY_BF16[EVERY_BF16.abs() < 2**31]
    assert torch.equal(interpret(to_int32, small, dtype=I32), small.to(I32))


# Arithmetic in bfloat16.


@triton.jit
def add(x, y):
    return x + y


@triton.jit
def subtract(x, y):
    return x - y


@triton.jit
def multiply(x, y):
    return x * y


@triton.jit
def divide(x, y):
    return x / y


@triton.jit
def maximum(x, y):
    return tl.maximum(x, y)


@triton.jit
def minimum(x, y):
    return tl.minimum(x, y)


@triton.jit
def maximum_or_nan(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def double_and_one(x):
    return 2.0 * x + 1


@triton.jit
def magnitude(x):
    return tl.abs(x)


@triton.jit
def clamp(x):
    return tl.clamp(x, -1.5, 2.0)


def of_numbers(extreme: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """NaN if both are NaN, also signalling NaN, for which torch.fmax returns NaN."""
    return lambda x, y: torch.where(x.isnan(), y, torch.where(y.isnan(), x, extreme(x, y)))


PAIRS = {
    "add": (add, torch.add),
    "subtract": (subtract, torch.sub),
    "multiply": (multiply, torch.mul),
    "divide": (divide, torch.div),
    "maximum": (maximum, of_numbers(torch.maximum)),
    "minimum": (minimum, of_numbers(torch.minimum)),
    "maximum or NaN": (maximum_or_nan, torch.maximum),
}


@pytest.mark.parametrize("name", PAIRS)
def test_bfloat16_arithmetic_on_every_value(name: str) -> None:
    function, expected = PAIRS[name]
    for seed in range(4):
        other = shuffled(EVERY_BF16, seed)
        # Of zeros of both signs, either is the greater one.
        keep = ~((EVERY_BF16 == 0) & (other == 0)) if "imum" in name else slice(None)
        x, y = EVERY_BF16[keep], other[keep]
        assert_same(interpret(function, x, y, dtype=BF16), expected(x.float(), y.float()).to(BF16))


def test_bfloat16_with_constants_and_of_one_operand() -> None:
    finite = EVERY_BF16[~EVERY_BF16.isnan()]
    assert_same(interpret(magnitude, EVERY_BF16), EVERY_BF16.abs())
    assert_same(interpret(double_and_one, finite), 2 * finite + 1)
    assert_same(interpret(clamp, finite, dtype=F32), finite.float().clamp(-1.5, 2.0))


@triton.jit
def comparisons(x, y):
    flags = (x < y) + 2 * (x <= y).to(tl.int32) + 4 * (x > y).to(tl.int32)
    return flags + 8 * (x >= y).to(tl.int32) + 16 * (x == y).to(tl.int32) + 32 * (x != y).to(tl.int32)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_comparisons(dtype: torch.dtype) -> None:
    x, y = EVERY_BF16.to(dtype), shuffled(EVERY_BF16, 1).to(dtype)
    y[::3] = x[::3]
    each = [x < y, x <= y, x > y, x >= y, x == y, x != y]
    assert torch.equal(interpret(comparisons, x, y, dtype=I32), sum(flag.int() << i for i, flag in enumerate(each)))


@triton.jit
def fused(x, y, z):
    return tl.fma(x, y, z)


FUSED = {
    # Half-way between two float32 but for 2^-70, which a sum in float64 drops.
    "f32 near a tie": (F32, (2.0**-24 * (1 + 2.0**-23), 1 - 2.0**-23, 1 + 2.0**-23), 1 + 2.0**-23),
    "f32 cancelling": (F32, (1 + 2.0**-12, 1 + 2.0**-12, -(1 + 2.0**-11)), 2.0**-24),
    # 17 * 19 = 323 lies between 322 and 324, and a sum in float32 drops 2^-30.
    "bf16 near a tie": (BF16, (17.0, 19.0, -(2.0**-30)), 322.0),
    "bf16 infinite": (BF16, (3e38, 10.0, 1.0), float("inf")),
    "f16 near a tie": (F16, (3.0, 683.0, 2.0**-20), 2050.0),  # 2049 lies between 2048 and 2050
}


@pytest.mark.parametrize("name", FUSED)
def test_fma_rounds_once(name: str) -> None:
    dtype, operands, expected = FUSED[name]
    result = interpret(fused, *(torch.tensor([value], dtype=dtype) for value in operands))
    assert_same(result, torch.tensor([expected], dtype=dtype))
