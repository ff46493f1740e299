"""Ranges of addresses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Intervals(NamedTuple):
    """Ranges of addresses [starts[i], ends[i]), ascending and not adjacent."""

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    def bytes(self) -> int:
        return int((self.ends - self.starts).sum())

    def shared(self, other: Intervals) -> int:
        """How many bytes both have."""
        return self.bytes() + other.bytes() - union([self, other]).bytes()


def of_accesses(addresses: NDArray[np.int64], itemsize: int) -> Intervals:
    """The ranges of accesses of `itemsize` bytes. Those of a block are mostly adjacent and ascending."""
    if addresses.size > 1 and (addresses[1:] - addresses[:-1] == itemsize).all():
        return Intervals(addresses[:1], addresses[-1:] + itemsize)
    return union([Intervals(addresses, addresses + itemsize)])


def union(parts: Sequence[Intervals]) -> Intervals:
    """The union of the parts, which need not be in order; each must start before it ends."""
    empty = np.zeros(0, np.int64)
    starts = np.concatenate([empty, *(part.starts for part in parts)])
    ends = np.concatenate([empty, *(part.ends for part in parts)])
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    opens = np.ones(starts.shape, bool)
    opens[1:] = starts[1:] > ends[:-1]
    return Intervals(starts[opens], ends[np.append(opens[1:], True)] if starts.size else ends)
