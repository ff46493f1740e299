"""The journal of a sweep: what has been scored, line by line, so that a sweep that was ended can be resumed."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import stdev
from typing import Any

from arcmerge.checkpoint.header import parse_object
from arcmerge.errors import ArcmergeError
from arcmerge.sweeping.candidates import Candidate


@dataclass(frozen=True)
class Scored(Candidate):
    """A candidate with its score, or one that a race has begun to score.

    Args:
        score: the mean over the seeds; an estimate if the candidate was stopped; NaN if the candidate has none.
        seconds: the time of merging and scoring.
        also: the other scores.
        by_seed: the score of each seed; for a candidate that is begun the sum of its losses.
        amount: the tokens or questions that a race has scored.
        stopped: whether a race stopped the candidate.
        losses: the losses of the first items in the order of the race, means over the seeds; none if it was stopped.
        items: the number of all items of the race; 0 if it was stopped.
    """

    score: float = math.nan
    seconds: float = 0.0
    also: Sequence[float] = ()
    by_seed: Sequence[float] = ()
    amount: int = 0
    stopped: bool = False
    losses: Sequence[float] = ()
    items: int = 0

    @classmethod
    def of(cls, candidate: Candidate, score: float, seconds: float, **more: Any) -> Scored:
        return cls(**{**vars(candidate), "score": score, "seconds": seconds, **more})

    @property
    def begun(self) -> bool:
        """Whether the race goes on with the candidate."""
        return len(self.losses) < self.items

    @property
    def scores(self) -> tuple[float, ...]:
        """All scores, the first one first."""
        return (self.score, *self.also)

    @property
    def deviation(self) -> float:
        """The standard deviation of the score over the seeds; NaN if not all are finite."""
        if not all(map(math.isfinite, self.by_seed)):
            return math.nan
        return stdev(self.by_seed) if len(self.by_seed) > 1 else 0.0

    def __post_init__(self) -> None:
        """Raises TypeError or OverflowError for values of other types or sizes, which a damaged file may hold."""
        for name in _LISTS:  # JSON has no tuples
            object.__setattr__(self, name, tuple(getattr(self, name)))
        numbers = [self.score, self.seconds, self.amount, self.items, *self.varied.values()]
        numbers += [number for name in _LISTS for number in getattr(self, name)]
        if not (
            isinstance(self.name, str)
            and isinstance(self.parameters, Mapping)
            and isinstance(self.proposed, bool)
            and isinstance(self.stopped, bool)
            and all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)
        ):
            raise TypeError("'entry' must have a name, parameters and numbers, got other types")
        for number in numbers:
            float(number)


_LISTS = ("also", "by_seed", "losses")


class Journal:
    """A file with one JSON object per line: first the identity of the sweep, then each scored candidate.

    A candidate of a race has a line for each time that it was scored on further items.

    Attributes:
        scored: the candidates that are done.
        begun: those that a race goes on with, by their keys.

    Args:
        file: the file, which is created if it is missing and locked while the journal is open.
        identity: the values that must be equal for the file to belong to the same sweep.

    Raises:
        ArcmergeError: if the file belongs to another sweep, or is in use by another process.
    """

    def __init__(self, file: Path, identity: Mapping[str, Any]) -> None:
        self._path = file
        self._identity = identity
        self._file = file.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.scored: list[Scored] = []
            self.begun: dict[str, Scored] = {}
            for one in self._read():
                self._take(one)
        except BlockingIOError as error:
            self._file.close()
            raise ArcmergeError(
                f"'{file}' must be written by one sweep at a time, got a second one; wait for the first, or name "
                "another --out"
            ) from error
        except ArcmergeError:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, scored: Scored) -> None:
        """Append a candidate. The line is on the disk when this returns."""
        lines = [asdict(scored)] if self.scored or self.begun else [self._identity, asdict(scored)]
        self._file.write("".join(json.dumps(line) + "\n" for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._take(scored)

    def _take(self, one: Scored) -> None:
        if one.begun:
            self.begun[one.key] = one
        else:
            self.begun.pop(one.key, None)
            self.scored.append(one)

    def _read(self) -> list[Scored]:
        """The candidates of the file. An incomplete last line, which an ended run leaves, is cut off."""
        try:
            self._file.seek(0)
            text = self._file.read()
            whole = text[: text.rfind("\n") + 1]
            lines = [parse_object(line.encode(), self._path) for line in whole.splitlines()]
            identity, *rest = lines or [dict(self._identity)]
            scored = [Scored(**entry) for entry in rest]
            if identity.keys() != self._identity.keys():
                raise ValueError
        except (ValueError, TypeError, AttributeError, OverflowError, ArcmergeError) as error:
            raise ArcmergeError(
                f"'{self._path}' must be the journal of a sweep, got another file; name another --out"
            ) from error
        if scored and (different := [key for key in identity if identity[key] != self._identity[key]]):
            raise ArcmergeError(
                f"'{self._path}' must be the journal of this sweep, got one with another {different[0]}; name another "
                "--out, or remove it"
            )
        os.truncate(self._path, len(whole.encode()) if scored else 0)
        return scored
