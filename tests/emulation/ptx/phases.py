"""The phases of an mbarrier (PTX ISA 9.7.13.15), whoever arrives and whatever copies complete its transactions."""

from __future__ import annotations

from dataclasses import dataclass, field

from .program import Fault


@dataclass
class Phases:
    """A phase is complete once all arrivals have come and all bytes that were announced have landed.

    Attributes:
        expected: arrivals of a phase.
        missing: those of the current phase to come.
        bytes: those announced in the current phase, less those that have landed; negative if they land first.
        completed: the number of phases that are complete.
    """

    expected: int
    missing: int = field(init=False)
    bytes: int = 0
    completed: int = 0

    def __post_init__(self) -> None:
        self.missing = self.expected

    def arrive(self, lane: int, count: int, announced: int) -> bool:
        """Arrivals, before which bytes are announced; whether the phase is complete by that."""
        if count > self.missing:
            raise Fault(f"more than {self.expected} arrivals at an mbarrier in a phase", lane)
        self.bytes += announced
        self.missing -= count
        return self._turned()

    def land(self, size: int) -> bool:
        """Bytes of a copy have landed; whether the phase is complete by that."""
        self.bytes -= size
        return self._turned()

    def is_complete(self, parity: int) -> bool:
        """Whether the current phase is of the other parity, so that the one of this parity is complete."""
        return self.completed % 2 != parity % 2

    def _turned(self) -> bool:
        if self.missing or self.bytes:
            return False
        self.missing = self.expected
        self.completed += 1
        return True
