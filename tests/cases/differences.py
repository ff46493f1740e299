"""The values of the cases whose kernels take differences from a base: many equal ones, and those that break a count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cases.case import Draw

PERIOD = 1 << 16
"""The values of larger tensors repeat: a prediction needs the counts of a fine-tune, not its size in random numbers."""

AWKWARD = torch.tensor([float("inf"), float("nan"), -5.0, 1e-39, 0.0, 3e38, 2.0, -2.0, 1.9, 2.0**-63, 2.0**-64])
"""Differences from a base of zeros: not finite, subnormal, on both sides of the bins in shared memory."""


def differing(
    draw: Draw, count: int, dtypes: Sequence[torch.dtype], base: torch.dtype, *, skip: int = 0, awkward: bool = False
) -> tuple[list[Tensor], Tensor]:
    """Tensors, and a base that they differ from as a fine-tune does; each starts `skip` elements past a boundary."""
    random = torch.Generator().manual_seed(count)
    size = min(count, PERIOD)
    start = (torch.randn(size, generator=random) / 50).to(base)
    start[: len(AWKWARD) * awkward] = 0
    tuned = []
    for number, dtype in enumerate(dtypes):
        change = torch.randn(size, generator=random) / 1000 * (torch.rand(size, generator=random) > 0.3)
        values = start.float() + change
        if awkward:
            values[: len(AWKWARD)] = AWKWARD.roll(number)[:size]
        tuned.append(values.to(dtype))
    *inputs, last = (_placed(draw, values, count, skip) for values in (*tuned, start))
    return inputs, last


def in_rows(tensors: Sequence[Tensor], columns: int) -> list[Tensor]:
    """Tensors in rows of so many columns; with 0 columns vectors, as they are."""
    return [tensor.reshape(-1, columns) if columns else tensor for tensor in tensors]


def _placed(draw: Draw, values: Tensor, count: int, skip: int) -> Tensor:
    repeated = values.repeat(-(-count // PERIOD))[:count]
    return draw.exact(torch.cat([repeated[:0].new_zeros(skip), repeated]))[skip:]
