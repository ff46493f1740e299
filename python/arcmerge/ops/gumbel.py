"""Gumbel noise for sampling, the same on every backend: argmax(score + noise) has the distribution softmax(score)."""

from __future__ import annotations

import torch
from torch import Tensor

from arcmerge.ops.philox import MASK, philox


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
    word, _, _, _ = philox((ids, steps & MASK, steps >> 32 & MASK, torch.zeros_like(ids)), seed)
    return ((word.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)


def gumbel(seed: int, steps: Tensor, ids: Tensor) -> Tensor:
    """Noise -log(-log(1 - v)), v of `uniform`: argmax of score + noise over ids has the distribution softmax(score)."""
    return -torch.log(-torch.log1p(-uniform(seed, steps, ids)))
