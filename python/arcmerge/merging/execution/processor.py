"""The contract between a merge and the hardware that computes it: cpu/processor.py or gpu/processor.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from arcmerge.errors import ArcmergeError
from arcmerge.merging.execution.work_units import Piece
from arcmerge.merging.methods.measure import Counts, Measure
from arcmerge.merging.methods.rule import Rule


@dataclass(frozen=True)
class FillTask:
    """One piece of a result that is to be computed.

    Attributes:
        piece: the elements to compute.
        rule: that of the piece's job; None for copies of tensors that are not merged.
        address: where the result is written, in the dtype of the job's output.
    """

    piece: Piece
    rule: Rule | None
    address: int


Request = tuple[Piece, Measure]
"""A piece and what is to be measured in it."""


class Processor(Protocol):
    """Computes pieces of the jobs of one plan. `measure` and `fill` may be called from several threads at once."""

    @property
    def ahead_bytes(self) -> int:
        """How many bytes of inputs a merge to disk should measure at most before it fills them."""
        ...

    def buffers(self, count: int, nbytes: int) -> list[memoryview]:
        """The memory to which `fill` writes in a merge to disk; called once, before all else.

        Args:
            count: the number of buffers.
            nbytes: the size of each, whole pages. They start at pages.
        """
        ...

    def measure(self, requests: Sequence[Request]) -> Sequence[NDArray[Any] | Counts]:
        """Measure the inputs of each piece.

        Returns:
            For each piece its share of what the measure finds: for a Gram matrix float64 (k, k), where k is the number
            of inputs (less the base, for methods that subtract it), or with one matrix per row or column all of them,
            (vectors, k, k); for a histogram its counts, dense (int64) or as Counts; for norms int64 (k, 2, 256), as
            _C.l1_norms has them; for other measures as they say, of the elements of the piece.
        """
        ...

    def fill(self, tasks: Sequence[FillTask]) -> list[int]:
        """Write the result of each task to its address.

        Returns:
            For each task the number of results that are NaN or infinite.
        """
        ...

    def not_finite(self, job: int) -> ArcmergeError:
        """The error to raise for a job (by index) with a result that is NaN or infinite."""
        ...
