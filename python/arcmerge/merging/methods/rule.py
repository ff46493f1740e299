"""The rules by which a tensor is computed from its inputs, once everything about them is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from arcmerge.merging.methods.measure import Selection

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Coefficients:
    """A linear combination of the inputs: one coefficient for each, in the order of the inputs.

    Args:
        values: float64 (k,), or (vectors, k) if every vector has its own.
        branch: "copy" if the result is one of the inputs, "linear" if all vectors are mixed along straight lines, else
            the name of the method.
    """

    values: Array
    branch: str


@dataclass(frozen=True)
class Consensus:
    """The base plus the differences that are kept and agree on a sign, as arcmerge.ops.consensus_combine adds them.

    Args:
        selection: what selects elements.
        factors: (vote, value, share, alone) of each input but the base.
        branch: the name of the method.
        election: "none", "sum" or "count".
        zero_is_negative: whether a sum of votes that is 0 elects the negative sign.
        floor: the smallest sum of shares; 0 for any, where a sum of exactly 0 counts as 1.
        inverse: whether differences are divided by their probability.
        before: for the first element of each piece, how many elements of the tensor before it have the upper and the
            lower code of the cuts of each input. Empty if no rank matters.
    """

    selection: Selection
    factors: tuple[tuple[float, float, float, float], ...]
    branch: str
    election: Literal["none", "sum", "count"] = "none"
    zero_is_negative: bool = False
    floor: float = 0.0
    inverse: bool = False
    before: Mapping[int, tuple[tuple[int, int], ...]] = field(default_factory=dict, compare=False)

    def before_piece(self, first: int) -> tuple[tuple[int, int], ...]:
        """The entry of `before` for the piece that starts at element `first`."""
        return self.before[first] if self.before else ((0, 0),) * len(self.factors)


@dataclass(frozen=True)
class Elementwise:
    """An operation of its own on the inputs, element by element.

    Args:
        operation: its name, that of a native operation.
        number: its parameter.
        branch: the name of the method.
    """

    operation: Literal["nearswap", "magmax", "median"]
    number: float
    branch: str


Rule = Coefficients | Consensus | Elementwise
