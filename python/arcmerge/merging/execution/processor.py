"""The contract between a merge and the hardware that computes it: the CPU (cpu.py) or a GPU (gpu.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from arcmerge.errors import ArcmergeError
from arcmerge.merging.execution.work_units import Piece
from arcmerge.merging.methods.method import Coefficients


@dataclass(frozen=True)
class FillTask:
    """One piece of a result that is to be computed.

    Attributes:
        piece: the elements to compute.
        coefficients: those of the piece's job; None for copies and elementwise methods, which need none.
        address: where the result is written, in the dtype of the job's output.
    """

    piece: Piece
    coefficients: Coefficients | None
    address: int


class Processor(Protocol):
    """Computes pieces of the jobs of one plan. Every method may be called from several threads at once."""

    def gram(self, pieces: Sequence[Piece]) -> list[NDArray[np.float64]]:
        """Sum products of the inputs of each piece.

        Returns:
            For each piece its share of the job's Gram matrix, (k, k), where k is the number of inputs (less the base,
            for methods that subtract it). For a job with one matrix per row or column: all of them, (vectors, k, k).
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
