"""What is wrong with a plan: collected while it is made, raised together."""

from __future__ import annotations

from arcmerge.errors import ArcmergeError


class Problems:
    """Problems by what they are an instance of, so that the same fault in every tensor is one line."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[str, int]] = {}

    def add(self, sentence: str, kind: str | None = None) -> None:
        """Note a problem. kind: what further problems of its kind have in common with it; they are only counted."""
        first, times = self._found.get(kind or sentence, (sentence, 0))
        self._found[kind or sentence] = (first, times + 1)

    def raise_if_any(self) -> None:
        if self._found:
            raise ArcmergeError(
                [
                    sentence + (f" (and {times - 1} more tensors alike)" if times > 1 else "")
                    for sentence, times in self._found.values()
                ]
            )
