"""The measures: what a pass over the inputs of a tensor can find out for a merge method, and what it found.

A method names one measure at a time (`Method.measure`), each from what the measures before it have found, until it can
give the rule by which the tensor is computed (`Method.rule`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from arcmerge.merging.methods.rule import Consensus

# Elements of every code, see arcmerge.ops.selection.between.
NO_CUT = (0x7FFFFFFF, 0, 0, 2**62)
# The codes of infinity and NaN are in these bins and above.
INFINITE_BIN = 0x7F80


@dataclass(frozen=True)
class Gram:
    """The Gram matrix of the inputs.

    Args:
        centered: whether the base is subtracted from the others, of which the matrix is then.
        dim: None for one matrix of the whole tensor, 1 for one of each row of a matrix, 0 for one of each column.
    """

    centered: bool = False
    dim: Literal[0, 1] | None = None
    together: ClassVar[None] = None


@dataclass(frozen=True)
class Selection:
    """What selects the elements of the differences x_i - base; arcmerge.ops.selection defines all terms.

    Args:
        cuts: (upper code, upper rank, lower code, lower rank) of each input but the base.
        keys: the key of the random numbers of each input but the base.
        probabilities: for each input but the base, those of the smallest and of the largest element of a row.
        joint: whether magnitudes are the variance over the inputs.
        rounded: whether magnitudes are rounded to bfloat16.
        row_scales: float32 (rows,), by which magnitudes are multiplied; None for 1.
    """

    cuts: tuple[tuple[int, int, int, int], ...]
    keys: tuple[int, ...]
    probabilities: tuple[tuple[float, float], ...]
    joint: bool = False
    rounded: bool = False
    row_scales: NDArray[np.float32] | None = field(default=None, compare=False)

    @property
    def random(self) -> bool:
        """Whether random numbers take part."""
        return any(each != (1.0, 1.0) for each in self.probabilities)


@dataclass(frozen=True)
class Histogram:
    """The counts of magnitudes, as arcmerge.ops.magnitude_histogram returns them.

    Args:
        selection: what selects elements; the cuts play no part.
        prefixes: for each input but the base the bins that are counted by their lower bits; None for all bins.
        together: a key of the tensors whose counts are added up; None for those of each tensor.
    """

    selection: Selection
    prefixes: tuple[tuple[int, ...], ...] | None = None
    together: Hashable = None


@dataclass(frozen=True)
class Norms:
    """The sums of the finite magnitudes of each input but the base, each rounded once.

    The result is float64 (k, 3): the sum of all elements, that of those which random numbers keep, and 0 unless a
    magnitude is not finite.

    Args:
        selection: what selects elements; the cuts play no part.
    """

    selection: Selection
    together: ClassVar[None] = None


@dataclass(frozen=True)
class Sums:
    """Sums over the elements that a rule uses, float64 (3 k + 1,) for k inputs but the base.

    They are k sums of d², k counts of elements where the input is the only one, k counts of elements where it is one of
    several, and the number of elements with a positive sum of votes less those with a negative one.

    Args:
        rule: the rule.
        together: a key of the tensors whose sums are added up; None for those of each tensor.
    """

    rule: Consensus
    together: Hashable = None


@dataclass(frozen=True)
class Divergences:
    """The Kullback-Leibler divergence of each row of the other input from that of the base, float32 (rows,).

    softmax makes a distribution of a row.
    """

    together: ClassVar[None] = None


Measure = Gram | Histogram | Norms | Sums | Divergences


@dataclass(frozen=True, eq=False)
class Counts:
    """An array of whole numbers that are mostly zero.

    Args:
        shape: its shape.
        index: the flat index of each number that is not zero, ascending.
        values: these numbers.
    """

    shape: tuple[int, ...]
    index: NDArray[np.intp]
    values: NDArray[np.int64]

    @staticmethod
    def of(dense: NDArray[np.int64]) -> Counts:
        """The counts in an array."""
        flat = dense.ravel()
        index = np.flatnonzero(flat != 0)  # of booleans it is six times as fast
        return Counts(dense.shape, index, flat[index])

    def __add__(self, other: Counts) -> Counts:
        return Counts.of(self.dense() + other.dense())

    def dense(self) -> NDArray[np.int64]:
        """All numbers, with the zeros."""
        flat = np.zeros(math.prod(self.shape), np.int64)
        flat[self.index] = self.values
        return flat.reshape(self.shape)

    def line(self, *index: int) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
        """The places along the last dim of the numbers that are not zero, ascending, and these numbers."""
        length = self.shape[-1]
        first = int(np.ravel_multi_index((*index, 0), self.shape))
        begin, end = np.searchsorted(self.index, (first, first + length))
        return self.index[begin:end] - first, self.values[begin:end]

    def at(self, *index: int) -> int:
        """One of the numbers."""
        flat = int(np.ravel_multi_index(index, self.shape))
        place = int(np.searchsorted(self.index, flat))
        return int(self.values[place]) if place < len(self.index) and self.index[place] == flat else 0


@dataclass(frozen=True, eq=False)
class Statistic:
    """What a measure found.

    Args:
        measure: the measure.
        total: the result of all pieces.
        pieces: the counts of each piece of the tensor by its first element, of a histogram.
    """

    measure: Measure
    total: Any
    pieces: Mapping[int, Counts] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `total`."""
        shape: tuple[int, ...] = self.total.shape
        return shape

    @cached_property
    def finite(self) -> bool:
        """Whether no input has NaN or infinity, as far as the measure notices."""
        if isinstance(self.measure, Histogram):
            if self.measure.prefixes is not None:
                return True
            planes = self.total.shape[1]
            bins, plane = self.total.index % 32768, self.total.index // 32768 % planes
            return not ((bins >= INFINITE_BIN) & (plane < 2)).any()
        return bool(np.isfinite(self.total).all()) and not (isinstance(self.measure, Norms) and self.total[:, 2].any())
