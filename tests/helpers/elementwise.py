"""Kernels that map a function of blocks over tensors, for tests of what the interpreter makes of it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _map(x_ptr, out_ptr, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, FUNCTION(tl.load(x_ptr + offsets)))


@triton.jit
def _map_pairs(x_ptr, y_ptr, out_ptr, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, FUNCTION(tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)))


@triton.jit
def _map_triples(x_ptr, y_ptr, z_ptr, out_ptr, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x, y, z = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets), tl.load(z_ptr + offsets)
    tl.store(out_ptr + offsets, FUNCTION(x, y, z))


def interpret(function: Any, *operands: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What `function` makes of blocks: of all elements of the operands, padded to a power of two."""
    count = operands[0].numel()
    block = triton.next_power_of_2(count)
    padded = [torch.cat([operand, operand.new_ones(block - count)]) for operand in operands]
    out = torch.zeros(block, dtype=dtype or operands[0].dtype)
    {1: _map, 2: _map_pairs, 3: _map_triples}[len(operands)][(1,)](*padded, out, FUNCTION=function, BLOCK=block)
    return out[:count]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """The same bits, the sign of zero included; any NaN is as good as another."""
    assert actual.dtype == expected.dtype
    code = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    same = (actual.view(code) == expected.view(code)) | (actual.isnan() & expected.isnan())
    assert same.all(), f"{(~same).sum()} differ, as {actual[~same][0]} and {expected[~same][0]}"
