"""The report of a merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MergeReport:
    """The report of a merge. `str(report)` is one line for a terminal.

    Args:
        out: folder of the result.
        method: name of the merge method.
        nbytes: bytes of weights that were written.
        seconds: time until the result was durable.
        branches: number of tensors by how they were computed: "copy", "linear", or the name of the method.
        warnings: all sentences that `warn` was called with.
        notes: tensors that were not merged, and where the result takes them from.
        seed: seed of the random numbers; None if the method draws none.
    """

    out: Path
    method: str
    nbytes: int
    seconds: float
    branches: Mapping[str, int]
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()
    seed: int | None = None

    @property
    def copied(self) -> int:
        """Number of tensors that were copied."""
        return self.branches.get("copy", 0)

    @property
    def linear(self) -> int:
        """Number of tensors that were mixed linearly."""
        return self.branches.get("linear", 0)

    @property
    def merged(self) -> int:
        """Number of tensors that were not copied."""
        return sum(self.branches.values()) - self.copied

    def __str__(self) -> str:
        rate = self.nbytes / self.seconds / 1e9
        return (
            f"{self.out}: {_size(self.nbytes)} in {self.seconds:.1f} s ({rate:.2f} GB/s), {self.method}: "
            f"{self.merged} tensors merged ({self.linear} of them on the linear branch), {self.copied} copied"
            + ("" if self.seed is None else f", seed {self.seed}")
            + "".join(f"; {note}" for note in self.notes)
        )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"
