"""Measures and rules of differences to a base, on the CPU."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arcmerge import _C
from arcmerge.merging.methods.measure import Counts, Divergences, Histogram, Norms, Selection, Sums
from arcmerge.merging.methods.rule import Consensus, Elementwise

_ELECTIONS = ("none", "sum", "count")
_memory = threading.local()


def measured(
    measure: Histogram | Norms | Sums | Divergences,
    operands: list[_C.Operand],
    base: int,
    row: int,
    first: int,
    count: int,
    masks: Sequence[int] = (),
) -> NDArray[Any] | Counts:
    """The share of `count` elements from `first` on in what a measure finds.

    Args:
        measure: the measure.
        operands: the inputs, which hold all elements of the tensor.
        base: the index of the base among them.
        row: the number of elements of a row.
        first: the first element.
        count: the number of elements.
        masks: addresses to which random masks are written (see _C.Selection).
    """
    others = [operand for index, operand in enumerate(operands) if index != base]
    if isinstance(measure, Divergences):
        divergences = np.empty(count // row, np.float32)
        _C.row_divergences(divergences.ctypes.data, others[0], operands[base], row, first // row, len(divergences))
        return divergences
    if isinstance(measure, Sums):
        rule = measure.rule
        selection, before = _selection(rule.selection, row), rule.before_piece(first)
        squares, alone, shared, votes = _C.consensus_sums(
            others, operands[base], selection, _consensus(rule), before, first, count
        )
        return np.array([*squares, *alone, *shared, votes], np.float64)
    selection = _selection(measure.selection, row, masks)
    if isinstance(measure, Norms):
        sums = np.zeros((len(others), 2, 256), np.int64)
        _C.l1_norms(sums.ctypes.data, others, operands[base], selection, first, count)
        return sums
    planes = 2 if measure.selection.rounded else 4
    shape = (len(others), planes, 32768) if measure.prefixes is None else (len(others), len(measure.prefixes[0]), 65536)
    memory = _take_zeros(math.prod(shape))
    counts = memory[: math.prod(shape)]
    if measure.prefixes is None:
        _C.magnitude_histogram(counts.ctypes.data, others, operands[base], selection, first, count)
    else:
        address, prefixes = counts.ctypes.data, measure.prefixes
        _C.magnitude_histogram_within(address, others, operands[base], selection, prefixes, first, count)
    found = Counts.of(counts.reshape(shape))
    counts[found.index] = 0
    _memory.zeros = memory
    return found


def _take_zeros(size: int) -> NDArray[np.int64]:
    """Zeros that the thread has kept, or new ones, whose pages would take 5 % of the CPU time of a merge.

    Who takes them gives them back when they are zeros again: if an exception comes before, they are dropped.
    """
    zeros: NDArray[np.int64] | None = vars(_memory).pop("zeros", None)
    return np.zeros(size, np.int64) if zeros is None or len(zeros) < size else zeros


def write(
    rule: Consensus | Elementwise,
    address: int,
    dtype: int,
    operands: list[_C.Operand],
    base: int,
    row: int,
    first: int,
    count: int,
    masks: Sequence[int] = (),
) -> int:
    """Write the results of a rule for `count` elements from `first` on; arguments as for `measured`.

    Args:
        address: where they are written, rounded to `dtype`.
        dtype: DType.native.
        masks: the addresses of random masks that are known (see _C.Selection).

    Returns:
        The number of results that are NaN or infinite.
    """
    others = [operand for index, operand in enumerate(operands) if index != base]
    if isinstance(rule, Elementwise):
        if rule.operation == "median":
            return _C.median(address, dtype, operands, first, count)
        if rule.operation == "magmax":
            return _C.magmax(address, dtype, others, operands[base], rule.number, first, count)
        return _C.nearswap(address, dtype, operands[base], others[0], rule.number, first, count)
    selection, before = _selection(rule.selection, row, masks), rule.before_piece(first)
    return _C.consensus_combine(
        address, dtype, others, operands[base], selection, _consensus(rule), before, first, count
    )


def _selection(selection: Selection, row: int, masks: Sequence[int] = ()) -> _C.Selection:
    scales = selection.row_scales
    return _C.Selection(
        selection.cuts,
        selection.keys,
        selection.probabilities,
        row,
        selection.joint,
        selection.rounded,
        0 if scales is None else scales.ctypes.data,
        masks,
    )


def _consensus(rule: Consensus) -> _C.Consensus:
    return _C.Consensus(rule.factors, _ELECTIONS.index(rule.election), rule.zero_is_negative, rule.floor, rule.inverse)
