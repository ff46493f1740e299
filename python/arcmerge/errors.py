"""The one exception that reaches a user."""

from __future__ import annotations

from collections.abc import Sequence


class ArcmergeError(Exception):
    """What a user has to mend before the work can go on.

    problems: one line each, as "what must hold, which value was found, what to do".
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))
