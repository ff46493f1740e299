"""The elements of a difference in the order of their magnitudes, from histograms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from arcmerge.merging.methods.measure import INFINITE_BIN, NO_CUT, Counts, Histogram, Statistic

Cut = tuple[int, int]
"""(code, rank): elements of larger codes, and of that code the first `rank`."""

_BINS = 32768


class Order:
    """The elements of one input in order: the largest magnitude first, and of equal ones the lowest index.

    Magnitudes that are not rounded to bfloat16 are known to 15 bits from a first histogram, and to all bits in the bins
    that a second one counts (`prefixes`).

    Args:
        found: the statistic of one or two histograms.
        index: the index of the input.
    """

    def __init__(self, found: Sequence[Statistic], index: int) -> None:
        coarse, *fine = found
        assert isinstance(coarse.measure, Histogram)
        self._found = found
        self._index = index
        self._rounded = coarse.measure.selection.rounded
        planes = coarse.total.dense(index)
        self._counts = planes[:2].sum(0)
        self._low = planes[2:].sum(0) if not self._rounded else np.zeros(_BINS, np.int64)
        self._above = self._counts[::-1].cumsum()[::-1] - self._counts
        self._fine: dict[int, tuple[int, NDArray[np.int64]]] = {}
        for statistic in fine:
            assert isinstance(statistic.measure, Histogram)
            assert statistic.measure.prefixes is not None
            for place, prefix in enumerate(statistic.measure.prefixes[index]):
                self._fine[prefix] = place, statistic.total.dense(index, place)
        self.count = int(self._counts.sum())
        self.nonzero = self.count - int(self._counts[0])

    def bin(self, position: int) -> int:
        """The bin of the last of the first `position` elements, position >= 1."""
        return int(np.flatnonzero(self._above < position)[0])

    def cut(self, position: int) -> Cut:
        """The cut after the first `position` elements."""
        if position == 0:
            return NO_CUT[:2]
        return NO_CUT[2:] if position == self.count else self._last(position)

    def _last(self, position: int) -> Cut:
        """The code of the last of the first `position` elements, and its rank among equal ones, from 1."""
        bin_ = self.bin(position)
        rank = position - int(self._above[bin_])
        if self._rounded:
            return bin_ << 16, rank
        counts = self._fine[bin_][1]
        above = counts[::-1].cumsum()[::-1] - counts
        low = int(np.flatnonzero(above < rank)[0])
        return bin_ << 16 | low, rank - int(above[low])

    def value(self, position: int) -> float:
        """The magnitude of the element at a position, from 0."""
        code, _ = self._last(position + 1)
        return float(value_of(np.array([code]))[0])

    def sum(self, first: int, last: int) -> float:
        """The sum of the magnitudes at positions first to last - 1 that are finite, rounded once."""
        return math.fsum(np.concatenate([self._terms(last), -self._terms(first)]))

    def _terms(self, position: int) -> NDArray[np.float64]:
        """Numbers whose exact sum is that of the first `position` magnitudes, as far as they are finite."""
        if position == 0:
            return np.zeros(0)
        if position == self.count:
            return terms(self._counts, self._low)
        code, rank = self._last(position)
        bin_ = code >> 16
        if bin_ >= INFINITE_BIN:
            return np.zeros(0)
        larger = np.arange(_BINS) > bin_
        whole = terms(self._counts * larger, self._low * larger)
        if self._rounded:
            return np.append(whole, rank * value_of(np.array([code]))[0])
        counts = self._fine[bin_][1].copy()
        counts[: code & 0xFFFF] = 0
        counts[code & 0xFFFF] = rank
        return np.concatenate([whole, counts * value_of(np.arange(65536) | bin_ << 16)])

    def before(self, code: int) -> dict[int, int]:
        """For the first element of each piece, the number of elements of a code before it."""
        statistic = self._found[-1]
        if code >> 16 in self._fine:
            planes = [(self._index, self._fine[code >> 16][0], code & 0xFFFF)]
        else:
            statistic, planes = self._found[0], [(self._index, plane, code >> 16) for plane in (0, 1)]
        before, total = {}, 0
        for first in sorted(statistic.pieces):
            before[first] = total
            total += sum(statistic.pieces[first].at(*at) for at in planes)
        return before


def value_of(codes: NDArray[np.int64]) -> NDArray[np.float64]:
    """The magnitudes of codes."""
    return codes.astype(np.uint32).view(np.float32).astype(np.float64)


def terms(counts: NDArray[np.int64], low: NDArray[np.int64]) -> NDArray[np.float64]:
    """Numbers whose exact sum is that of magnitudes, as far as they are finite.

    Args:
        counts: (32768,), the magnitudes in each bin, of which there are fewer than 2^45.
        low: (32768,), the sum of the lower 16 bits of the codes in each bin.
    """
    bins = np.flatnonzero(counts[:INFINITE_BIN])
    # The unit of the last of the 16 bits is 2^(e - 150), for denormals with e = 1.
    unit = np.ldexp(1.0, np.maximum(bins // 128, 1) - 150)
    return np.concatenate([counts[bins] * value_of(bins << 16), low[bins] * unit])


def plane_sum(counts: Counts, index: int, *, dropped: bool) -> float:
    """The sum of the finite magnitudes of the kept elements of an input in a first histogram, rounded once.

    With `dropped` it includes those of the dropped elements.
    """
    planes, first = counts.dense(index), 0 if dropped else 1
    low = planes[2 + first :].sum(0) if len(planes) == 4 else np.zeros(_BINS, np.int64)
    return math.fsum(terms(planes[first:2].sum(0), low))
