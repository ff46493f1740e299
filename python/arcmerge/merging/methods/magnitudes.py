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
        self._bins = _Bins(coarse.total, index, (0, 1))
        self._fine: dict[int, tuple[int, _Bins]] = {}
        for statistic in fine:
            assert isinstance(statistic.measure, Histogram)
            assert statistic.measure.prefixes is not None
            for place, prefix in enumerate(statistic.measure.prefixes[index]):
                self._fine[prefix] = place, _Bins(statistic.total, index, (place,))
        self.count = self._bins.total
        self.nonzero = self.count - self._bins.zeros

    def bin(self, position: int) -> int:
        """The bin of the last of the first `position` elements, position >= 1."""
        return self._bins.last(position)[0]

    def cut(self, position: int) -> Cut:
        """The cut after the first `position` elements."""
        if position == 0:
            return NO_CUT[:2]
        return NO_CUT[2:] if position == self.count else self._last(position)

    def _last(self, position: int) -> Cut:
        """The code of the last of the first `position` elements, and its rank among equal ones, from 1."""
        bin_, rank = self._bins.last(position)
        if self._rounded:
            return bin_ << 16, rank
        low, rank = self._fine[bin_][1].last(rank)
        return bin_ << 16 | low, rank

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
            return self._bins.terms()
        code, rank = self._last(position)
        bin_, low = code >> 16, code & 0xFFFF
        if bin_ >= INFINITE_BIN:
            return np.zeros(0)
        within = [rank * value_of(np.array([code]))]
        if not self._rounded:
            fine = self._fine[bin_][1]
            larger = fine.index > low
            within.append(fine.counts[larger] * value_of(fine.index[larger] | bin_ << 16))
        return np.concatenate([self._bins.terms(bin_), *within])

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


class _Bins:
    """The bins of some planes of a histogram that have elements.

    Args:
        counts: the histogram.
        index: the index of the input.
        planes: the planes of counts that are added up. Those of the sums of lower bits, if there are any, follow two
            planes later.

    Attributes:
        index: the bins with elements, ascending.
        counts: their elements.
        total: all elements.
    """

    def __init__(self, counts: Counts, index: int, planes: Sequence[int]) -> None:
        self.index, self.counts = _added([counts.line(index, plane) for plane in planes])
        self._above = self.counts[::-1].cumsum()[::-1] - self.counts
        self.total = int(self.counts.sum())
        self.zeros = int(self.counts[0]) if len(self.index) and self.index[0] == 0 else 0
        self._low = np.zeros(len(self.index), np.int64)
        if counts.shape[1:] == (4, _BINS):
            bins, low = _added([counts.line(index, plane + 2) for plane in planes])
            self._low[np.searchsorted(self.index, bins)] = low

    def last(self, position: int) -> tuple[int, int]:
        """The bin of the last of the first `position` elements, and its rank in the bin, from 1."""
        place = int(np.flatnonzero(self._above < position)[0])
        return int(self.index[place]), position - int(self._above[place])

    def terms(self, above: int = -1) -> NDArray[np.float64]:
        """Numbers whose exact sum is that of the finite magnitudes in the bins above one.

        A bin has fewer than 2^45 magnitudes.
        """
        chosen = (self.index > above) & (self.index < INFINITE_BIN)
        bins = self.index[chosen]
        # The unit of the last of the 16 bits is 2^(e - 150), for denormals with e = 1.
        unit = np.ldexp(1.0, np.maximum(bins // 128, 1) - 150)
        return np.concatenate([self.counts[chosen] * value_of(bins << 16), self._low[chosen] * unit])


def _added(lines: Sequence[tuple[NDArray[np.intp], NDArray[np.int64]]]) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """The sum of arrays of which (the places of) the numbers that are not zero are given."""
    filled = [line for line in lines if len(line[0])] or lines[:1]
    if len(filled) == 1:
        return filled[0]
    places, inverse = np.unique(np.concatenate([index for index, _ in filled]), return_inverse=True)
    total = np.zeros(len(places), np.int64)
    np.add.at(total, inverse, np.concatenate([values for _, values in filled]))
    return places, total


def norms_of(sums: NDArray[np.int64]) -> NDArray[np.float64]:
    """The result of the measure `Norms`.

    Args:
        sums: (k, 2, 256), as _C.l1_norms has them.
    """
    rows = [(_norm(dropped + kept), _norm(kept), float(dropped[-1] + kept[-1])) for dropped, kept in sums]
    return np.array(rows)


def _norm(sums: NDArray[np.int64]) -> float:
    """The sum of magnitudes by exponent: 256 whole numbers in units of 2^(max(e, 1) - 150)."""
    numbers: list[int] = sums[:-1].tolist()
    total = sum(number << max(exponent - 1, 0) for exponent, number in enumerate(numbers))
    return total / (1 << 149)  # a quotient of whole numbers is rounded once


def sums_by_exponent(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sums of _C.l1_norms from a first histogram of all bins, (k, planes, 32768)."""
    by_exponent = counts.reshape(*counts.shape[:2], 256, 128)
    significands = np.where(np.arange(256)[:, None] > 0, 128, 0) + np.arange(128)
    sums: NDArray[np.int64] = (by_exponent[:, :2] * significands).sum(-1) << 16
    return sums + by_exponent[:, 2:].sum(-1) if counts.shape[1] == 4 else sums
