"""The selection of elements by magnitude and at random, in plain torch: the reference of two ops.

Element e of an input x_i has the difference d = x_i - base, in float32, and a code, the 31 bits of a magnitude that
orders like the magnitude itself. The magnitude is

- |d|,
- with `joint`, the variance of the differences of all inputs, which they share,
- with `row_scales`, |d| times the number of the element's row;

it is in float32, or with `rounded` in float32 rounded to bfloat16, so that the low 16 bits of its code are zero. Every
NaN has the code 0x7fc00000.

Elements are in order of their codes, the largest first, and equal ones in order of their indices. An element is kept if
it lies between two cuts in this order and if a random number keeps it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from arcmerge.ops.philox import uniform16

NO_CUT = (0x7FFFFFFF, 0, 0, 2**62)
"""A row of `cuts` between which all elements lie."""


def differences(tensors: Sequence[Tensor], base: Tensor) -> Tensor:
    """x_i - base in float32, [k, *]."""
    return torch.stack([tensor.float() - base.float() for tensor in tensors])


def codes(differences: Tensor, row_scales: Tensor | None, *, joint: bool, rounded: bool) -> Tensor:
    """The codes of all elements, int64 [k, *]; with `joint` k equal ones."""
    if joint:
        k = len(differences)
        mean = functools.reduce(torch.add, differences) / k
        squares = [(difference - mean) * (difference - mean) for difference in differences]
        magnitudes = (functools.reduce(torch.add, squares) / k).expand_as(differences)
    else:
        magnitudes = differences.abs()
    if row_scales is not None:
        magnitudes = magnitudes * row_scales.unsqueeze(-1)
    if rounded:
        magnitudes = magnitudes.bfloat16().float()
    bits = magnitudes.contiguous().view(torch.int32) & 0x7FFFFFFF
    return torch.where(magnitudes.isnan(), 0x7FC00000, bits).long()


def between(codes: Tensor, cut: Sequence[int]) -> Tensor:
    """Whether elements lie between two cuts, bool [*].

    Args:
        codes: int64 [*].
        cut: (upper code, upper rank, lower code, lower rank). Elements with larger codes than the upper one are
            dropped, and of those that are equal the first `upper rank`; elements with smaller codes than the lower one
            are dropped, and those that are equal from number `lower rank` on.
    """
    upper, upper_rank, lower, lower_rank = cut

    def rank(equal: Tensor) -> Tensor:
        return equal.flatten().cumsum(0).reshape(equal.shape) - 1

    at_upper, at_lower = codes == upper, codes == lower
    below_upper = (codes < upper) | (at_upper & (rank(at_upper) >= upper_rank))
    above_lower = (codes > lower) | (at_lower & (rank(at_lower) < lower_rank))
    return below_upper & above_lower


def row_probabilities(codes: Tensor, first: float, last: float) -> Tensor:
    """The probabilities of the elements of each row, float64 [*], linear in the rank of their codes.

    The smallest code of a row has the probability `first` and the largest `last`; of equal codes, the one of the lower
    index has the lower rank. A row of one element has their mean.

    Args:
        codes: int64 [*, C], or [C] for one row.
    """
    count = codes.shape[-1] if codes.ndim else 1
    if first == last or count == 1:
        return torch.full(codes.shape, (first + last) / 2 if count == 1 else first, dtype=torch.float64).to(
            codes.device
        )
    order = torch.sort(codes, dim=-1, stable=True).indices
    ranks = torch.empty_like(order).scatter_(-1, order, torch.arange(count, device=codes.device).expand_as(order))
    return first + (last - first) / (count - 1) * ranks.double()


def drawn(probabilities: Tensor, key: int) -> Tensor:
    """Whether random numbers keep elements, bool [*]: an element of number u (see uniform16) if u + 0.5 < 65536 p.

    The elements that are kept at one probability are among those that are kept at any larger one.
    """
    numbers = uniform16(key, probabilities.numel(), probabilities.device).reshape(probabilities.shape)
    return numbers.double() + 0.5 < 65536 * probabilities
