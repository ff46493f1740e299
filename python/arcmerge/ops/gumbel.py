"""Noise that turns the greatest of scores into a sample of their softmax, the same on every backend."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 2**32 - 1


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> Tensor:
    """The first of four words of Philox-4x32-10 (Salmon et al. 2011): int64 values below 2^32, as the counters are.

    key: 64 bits, the low 32 first.
    """
    c0, c1, c2, c3 = counter
    low, high = key & _MASK, key >> 32 & _MASK
    for _ in range(10):
        # Beyond 63 bits a product wraps, and a shift brings the sign along: its 64 bits are right all the same.
        first, third = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = (third >> 32 & _MASK) ^ c1 ^ low, third & _MASK
        c2, c3 = (first >> 32 & _MASK) ^ c3 ^ high, first & _MASK
        low, high = (low + 0x9E3779B9) & _MASK, (high + 0xBB67AE85) & _MASK
    return c0


def uniform(seed: int, steps: Tensor, ids: Tensor) -> Tensor:
    """v in (0, 1), float32, of the shape that steps and ids broadcast to (int64, from 0; ids below 2^32).

    (word + 0.5) / 2^32 of the Philox word of counter (id, low of step, high of step, 0), in float32: as fine as 2^-32
    near 0, where the words are that turn into the largest noises. Rounding up to 1 is kept at 1 - 2^-24.
    """
    steps, ids = torch.broadcast_tensors(steps, ids)
    word = philox((ids, steps & _MASK, steps >> 32 & _MASK, torch.zeros_like(ids)), seed)
    return ((word.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)


def gumbel(seed: int, steps: Tensor, ids: Tensor) -> Tensor:
    """-log(-log(1 - v)): argmax of score + noise over ids has the distribution softmax(score)."""
    return -torch.log(-torch.log1p(-uniform(seed, steps, ids)))
