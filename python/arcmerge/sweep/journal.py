"""The journal of a sweep: a line for every candidate that was scored, so that a run that ended early goes on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from arcmerge.errors import ArcmergeError


@dataclass(frozen=True)
class Scored:
    """A candidate and what came of it. seconds: of merging and scoring."""

    name: str
    parameters: Mapping[str, Any]
    varied: Mapping[str, float] = field(default_factory=dict)
    score: float = math.nan
    seconds: float = 0.0


class Journal:
    """Lines of JSON in a file: first what the sweep is, then its candidates as they were scored.

    about: what must be the same for the file to be that of the same sweep. Raises ArcmergeError if it is another's.
    """

    def __init__(self, file: Path, about: Mapping[str, Any]) -> None:
        self._file = file
        self.scored: list[Scored] = []
        if file.exists():
            self._read(about)
        else:
            self._append(about)

    def add(self, scored: Scored) -> None:
        """Returns when the line is durable."""
        self._append(asdict(scored))
        self.scored.append(scored)

    def _append(self, line: Mapping[str, Any]) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, about: Mapping[str, Any]) -> None:
        text = self._file.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # a line that the end of a run cut short was not scored
        try:
            first, *rest = [json.loads(line) for line in whole.splitlines()]
            self.scored = [Scored(**entry) for entry in rest]
        except (ValueError, TypeError) as error:
            raise ArcmergeError(f"{self._file}: is not the journal of a sweep; name another --out") from error
        different = [key for key in about if first.get(key) != about[key]] if isinstance(first, dict) else list(about)
        if different:
            raise ArcmergeError(
                f"{self._file}: is the journal of another sweep (its {different[0]} differs); name another --out, or "
                "remove it"
            )
        if len(whole) < len(text):
            os.truncate(self._file, len(whole.encode()))
