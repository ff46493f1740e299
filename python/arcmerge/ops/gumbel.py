"""Gumbel noise for sampling, the same on every backend: argmax(score + noise) has the distribution softmax(score)."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 2**32 - 1


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> Tensor:
    """The first of the four words of Philox-4x32-10 (Salmon et al. 2011).

    Args:
        counter: four int64 tensors of values below 2^32, of one shape.
        key: 64 bits, the low 32 first.

    Returns:
        int64, below 2^32.
    """
    c0, c1, c2, c3 = counter
    low, high = key & _MASK, key >> 32 & _MASK
    for _ in range(10):
        # A product beyond 63 bits wraps and a shift extends the sign; the 32 bits that the mask keeps are right.
        first, third = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = (third >> 32 & _MASK) ^ c1 ^ low, third & _MASK
        c2, c3 = (first >> 32 & _MASK) ^ c3 ^ high, first & _MASK
        low, high = (low + 0x9E3779B9) & _MASK, (high + 0xBB67AE85) & _MASK
    return c0


def uniform(seed: int, steps: Tensor, ids: Tensor) -> Tensor:
    """Uniform numbers in (0, 1): (word + 0.5) / 2^32 of the Philox word of counter (id, low of step, high of step, 0).

    They are float32, so as fine as 2^-32 near 0, from where the largest noise comes. 1, by rounding, becomes 1 - 2^-24.

    Args:
        seed: the key.
        steps, ids: int64, from 0; ids below 2^32.

    Returns:
        float32, of the shape that steps and ids broadcast to.
    """
    steps, ids = torch.broadcast_tensors(steps, ids)
    word = philox((ids, steps & _MASK, steps >> 32 & _MASK, torch.zeros_like(ids)), seed)
    return ((word.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)


def gumbel(seed: int, steps: Tensor, ids: Tensor) -> Tensor:
    """Noise -log(-log(1 - v)), v of `uniform`: argmax of score + noise over ids has the distribution softmax(score)."""
    return -torch.log(-torch.log1p(-uniform(seed, steps, ids)))
