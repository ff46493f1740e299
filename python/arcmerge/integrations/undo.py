"""What an integration has changed in its host, and how it is changed back."""

from __future__ import annotations

from collections.abc import Callable


class Undo:
    """Changes, until undo() or the end of a `with` block changes them back.

    left: names of what stays as it was, as it could not be taken over.
    """

    def __init__(self) -> None:
        self.left: list[str] = []
        self._steps: list[Callable[[], object]] = []

    def later(self, step: Callable[[], object]) -> None:
        """A step of the way back; the last is taken first."""
        self._steps.append(step)

    def undo(self) -> None:
        """Changes back what was changed; a second time there is nothing to do."""
        while self._steps:
            self._steps.pop()()

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()
