"""Histograms and consensus rules of pieces whose inputs are on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from arcmerge.merging.methods.measure import Histogram, Selection
from arcmerge.merging.methods.rule import Consensus

if TYPE_CHECKING:
    from torch import Tensor

    from arcmerge.kernels.selection import Choice


def histogram(measure: Histogram, tensors: Sequence[Tensor], base: Tensor, row: int, first: int) -> Tensor:
    """The share of a piece in a histogram.

    Args:
        measure: the histogram.
        tensors: the piece of each input but the base.
        base: the piece of the base.
        row: the number of elements of a row.
        first: the first element of the piece.

    Returns:
        int64, as the op magnitude_histogram has it.
    """
    from arcmerge.kernels.magnitude_histogram import magnitude_histogram

    selection, k = measure.selection, len(tensors)
    scales = _scales(selection, base.device)
    prefixes = None if measure.prefixes is None else _tensor(measure.prefixes, torch.int64, base.device)
    shape = [k, 2 if selection.rounded else 4, 32768] if prefixes is None else [*prefixes.shape, 65536]
    out = torch.zeros(shape, dtype=torch.int64, device=base.device)
    groups = [list(tensors)] * k if selection.joint else [[tensor] for tensor in tensors]
    choice = _choice(selection, scales, row, first, base.device, k)
    keys, limits = choice.keys.flatten(), choice.limits.flatten()
    magnitude_histogram(out, groups, [base] * k, choice._replace(keys=keys, limits=limits), prefixes=prefixes)
    return out


def consensus(rule: Consensus, out: Tensor, tensors: Sequence[Tensor], base: Tensor, row: int, first: int) -> Tensor:
    """Fill `out` with the results of a rule for a piece; arguments as for `histogram`.

    Returns:
        int64 [1], the number of results that are NaN or infinite.
    """
    from arcmerge.kernels.consensus_combine import consensus_combine

    selection, device = rule.selection, base.device
    scales = _scales(selection, device)
    cuts = np.array(selection.cuts, np.int64)
    cuts[:, 1::2] -= np.array(rule.before_piece(first), np.int64)
    ranks = cuts[:, 1::2]
    inverse = None
    if rule.inverse:
        chances = torch.tensor([smallest for smallest, _ in selection.probabilities], dtype=torch.float64)
        inverse = chances.reciprocal().float()[None].to(device)
    nonfinite = torch.zeros(1, dtype=torch.int64, device=device)
    consensus_combine(
        [out],
        [tensors],
        [base],
        _tensor([rule.factors], torch.float32, device),
        torch.from_numpy(cuts)[None].to(device),
        _choice(selection, scales, row, first, device, 1),
        nonfinite,
        scales=inverse,
        election=rule.election,
        zero_is_negative=rule.zero_is_negative,
        floor=rule.floor,
        ranked=bool(((ranks > 0) & (ranks < base.numel())).any()),
    )
    return nonfinite


def _choice(
    selection: Selection, scales: Tensor | None, row: int, first: int, device: torch.device, groups: int
) -> Choice:
    """The choice of one group of all inputs, or of one group for each input."""
    from arcmerge.kernels.selection import Choice, limits, rows

    keys = torch.from_numpy(np.array(selection.keys, np.uint64).view(np.int64))
    chances = torch.tensor([smallest for smallest, _ in selection.probabilities], dtype=torch.float64)
    return Choice(
        keys=keys.to(device).reshape(groups, -1),
        limits=limits(chances).to(device).reshape(groups, -1),
        starts=torch.full((groups,), first, dtype=torch.int64, device=device),
        rows=None if scales is None else rows([scales] * groups, [row] * groups),
        joint=selection.joint,
        rounded=selection.rounded,
    )


def _scales(selection: Selection, device: torch.device) -> Tensor | None:
    scales = selection.row_scales
    return None if scales is None else torch.from_numpy(scales).to(device)


def _tensor(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)
