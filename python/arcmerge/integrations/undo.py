"""Undo: the changes that an integration made to its host program, and the way back."""

from __future__ import annotations

from collections.abc import Callable


class Undo:
    """Changes to a host program; undo() or the end of a `with` block reverts them.

    Attributes:
        left: names of the parts that were not changed, as they are not supported.
    """

    def __init__(self) -> None:
        self.left: list[str] = []
        self._steps: list[Callable[[], object]] = []

    def later(self, step: Callable[[], object]) -> None:
        """Add a function that undo() calls; the last one added is called first."""
        self._steps.append(step)

    def undo(self) -> None:
        """Revert all changes; a second call does nothing."""
        while self._steps:
            self._steps.pop()()

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()
