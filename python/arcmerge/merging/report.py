"""What a merge did, for programs and in one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    nbytes: bytes written. seconds: until they were durable. branches: how many tensors came about in which way.
    notes: what was not merged, and what became of it.
    """

    out: Path
    method: str
    nbytes: int
    seconds: float
    branches: Mapping[str, int]
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def copied(self) -> int:
        return self.branches.get("copy", 0)

    @property
    def linear(self) -> int:
        return self.branches.get("linear", 0)

    @property
    def merged(self) -> int:
        return sum(self.branches.values()) - self.copied

    def __str__(self) -> str:
        rate = self.nbytes / self.seconds / 1e9
        return (
            f"{self.out}: {_size(self.nbytes)} in {self.seconds:.1f} s ({rate:.2f} GB/s), {self.method}: "
            f"{self.merged} tensors merged ({self.linear} of them on the linear branch), {self.copied} copied"
            + "".join(f"; {note}" for note in self.notes)
        )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"
