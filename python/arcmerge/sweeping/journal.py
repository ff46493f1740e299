"""The journal of a sweep: a line for every candidate that was scored, so that a run that ended early goes on."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from arcmerge.checkpoint.header import parse_object
from arcmerge.errors import ArcmergeError


@dataclass(frozen=True)
class Scored:
    """A candidate and what came of it. seconds: of merging and scoring."""

    name: str
    parameters: Mapping[str, Any]
    varied: Mapping[str, float] = field(default_factory=dict)
    score: float = math.nan
    seconds: float = 0.0
    proposed: bool = False

    def __post_init__(self) -> None:
        """Raises TypeError and OverflowError for values of other types and sizes, which only a file can hold."""
        numbers = (self.score, self.seconds, *self.varied.values())
        if not (
            isinstance(self.name, str)
            and isinstance(self.parameters, Mapping)
            and isinstance(self.proposed, bool)
            and all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)
        ):
            raise TypeError("a candidate has a name, parameters, and numbers for what was varied, score and seconds")
        for number in numbers:
            float(number)


class Journal:
    """Lines of JSON in a file: first what the sweep is, then its candidates as they were scored.

    about: what must be the same for the file to be that of the same sweep. Raises ArcmergeError if it is another's, or
    if another process has it open.
    """

    def __init__(self, file: Path, about: Mapping[str, Any]) -> None:
        self._name = file
        self._about = about
        self._file = file.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.scored = self._read()
        except BlockingIOError as error:
            self._file.close()
            raise ArcmergeError(
                f"{file}: another sweep writes to it now; wait for it, or name another --out"
            ) from error
        except ArcmergeError:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, scored: Scored) -> None:
        """Returns when the line is durable."""
        lines = [asdict(scored)] if self.scored else [self._about, asdict(scored)]
        self._file.write("".join(json.dumps(line) + "\n" for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.scored.append(scored)

    def _read(self) -> list[Scored]:
        """What is in the file, which is left with whole lines: one that the end of a run cut short was not scored."""
        try:
            self._file.seek(0)
            text = self._file.read()
            whole = text[: text.rfind("\n") + 1]
            lines = [parse_object(line.encode(), self._name) for line in whole.splitlines()]
            about, *rest = lines or [dict(self._about)]
            scored = [Scored(**entry) for entry in rest]
            if about.keys() != self._about.keys():
                raise ValueError("another's keys")
        except (ValueError, TypeError, AttributeError, OverflowError, ArcmergeError) as error:
            raise ArcmergeError(f"{self._name}: is not the journal of a sweep; name another --out") from error
        if scored and (different := [key for key in about if about[key] != self._about[key]]):
            raise ArcmergeError(
                f"{self._name}: is the journal of another sweep (its {different[0]} differs); name another --out, or "
                "remove it"
            )
        os.truncate(self._name, len(whole.encode()) if scored else 0)
        return scored
