"""Philox-4x32-10, the counter-based random numbers of all ops: they depend on nothing but a key and a counter."""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 2**32 - 1


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of Philox-4x32-10 (Salmon et al. 2011).

    Args:
        counter: four int64 tensors of values below 2^32, of one shape.
        key: 64 bits, the low 32 first.

    Returns:
        Four int64 tensors of values below 2^32.
    """
    c0, c1, c2, c3 = counter
    low, high = key & MASK, key >> 32 & MASK
    for _ in range(10):
        # A product beyond 63 bits wraps and a shift extends the sign; the 32 bits that the mask keeps are right.
        first, third = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = (third >> 32 & MASK) ^ c1 ^ low, third & MASK
        c2, c3 = (first >> 32 & MASK) ^ c3 ^ high, first & MASK
        low, high = (low + 0x9E3779B9) & MASK, (high + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def uniform16(key: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Uniform whole numbers from 0 to 65535 for elements 0 to count - 1, int32 [count].

    Element e has 16 of the 128 bits of the block of counter (low of e // 8, high of e // 8, 0, 0): the half e % 2, the
    lower first, of the word e % 8 // 2.
    """
    block = torch.arange(-(-count // 8), device=device)
    zero = torch.zeros_like(block)
    words = torch.stack(philox((block & MASK, block >> 32, zero, zero), key), dim=-1)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1)
    return halves.flatten()[:count].to(torch.int32)
