"""A race: which candidate is scored next, and which one is stopped.

A candidate that is to be stopped must be scored on the items of the first look anyway, so all candidates are scored on
these first. Of those that are not yet beyond doubt worse than the leader, the one in the middle is completed: so few
items do not tell on which side of the middle the best one is. From then on, the candidate whose predicted total is the
best goes on until it is stopped or complete. Against the first complete candidate it can be stopped in the first half
of the items only: after that it is worth more as the second one, which gives controls for all others.

A candidate that goes on is merged once more. That is one pass over the weights, and a first look takes longer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from arcmerge.errors import ArcmergeError
from arcmerge.sweeping.candidates import Candidate
from arcmerge.sweeping.journal import Scored
from arcmerge.sweeping.rival import Array, Rival, controls_of, threshold_of
from arcmerge.sweeping.scores import MeanScore

MIN_ITEMS = 12

# A candidate, and the one that it is compared with.
Task = tuple[Candidate, Rival | None]


class Race:
    """Gives evaluators their tasks, and stops candidates.

    An evaluator scores a new candidate on the items of the first look. One that has losses goes on until its rival
    stops it or all items are scored.

    Args:
        candidates: the candidates without a score. Those that an ended race has begun have losses.
        proposals: further candidates, which are taken when no other one waits.
        scored: the candidates with a score.
        score: the score whose items are scored.
        total: the number of all candidates, K.
        done: the number of those that have a score.
    """

    def __init__(
        self,
        candidates: Iterable[Candidate],
        proposals: Iterator[Candidate],
        scored: Iterable[Scored],
        score: MeanScore,
        total: int,
        done: int,
    ) -> None:
        self._new: list[Candidate] = []
        self._begun: list[Scored] = []
        for one in candidates:
            if isinstance(one, Scored):
                self._begun.append(one)
            else:
                self._new.append(one)
        self._complete = [one for one in scored if _is_complete(one)]
        self._proposals = proposals
        self._score = score
        self._total, self._left = total, total - done

    def next(self) -> Task | None:
        """The next task; None if there is none, or none before a candidate that is being scored is done."""
        if self._new:
            return self._new.pop(0), None
        worse = self._worse()
        possible = [one for one in self._begun if one not in worse]
        if not possible:
            new = next(self._proposals, None)
            return None if new is None else (new, None)
        rival = self._rival()
        if rival is None:
            found = [one for one in possible if np.isfinite(one.losses).all()] or possible
            chosen = from_the_middle(sorted(found, key=lambda one: sum(one.losses)))[0]
        else:
            predicted = [rival.compare(_losses(one))[0] for one in possible]
            chosen = possible[int(np.argmin(predicted))]
            if len(self._complete) == 1 and self._left > len(worse) + 1:
                rival = replace(rival, limit=chosen.items // 2)
        self._begun.remove(chosen)
        return chosen, rival

    def add(self, scored: Scored) -> list[Scored]:
        """Take a candidate that has been scored on further items. Returns it, and those that it stops."""
        if scored.begun:
            self._begun.append(scored)
        else:
            self._left -= 1
            self._complete += [scored] if _is_complete(scored) else []
        return [scored, *self.stop()]

    def stop(self) -> list[Scored]:
        """Stop the candidates that are worse than another one beyond doubt.

        They wait for the second complete candidate, if there may be one, as their scores are estimated with controls.
        """
        rival, worse = self._rival(), self._worse()
        if rival is None or (len(self._complete) == 1 and len(worse) < len(self._begun)):
            return []
        best, found = self._best(), []
        size = best.amount / max(1, len(best.by_seed))
        for one in worse:
            self._begun.remove(one)
            self._left -= 1
            mean = (float(rival.losses.sum()) + rival.compare(_losses(one))[0]) / size
            found.append(replace(one, score=self._score.of_mean(mean), stopped=True, by_seed=(), losses=(), items=0))
        return found

    def _worse(self) -> list[Scored]:
        """Those that are worse beyond doubt than the best complete candidate, or than the leader of the first look."""
        rivals = [rival for rival in (self._rival(), self._leader()) if rival is not None]
        return [one for one in self._begun if any(rival.stops(_losses(one)) for rival in rivals)]

    def _best(self) -> Scored:
        return min(self._complete, key=lambda one: sum(one.losses))

    def _rival(self) -> Rival | None:
        """The best complete candidate, if there is one."""
        if not self._complete:
            return None
        best, total = self._best(), len(self._complete[0].losses)
        controls = controls_of(_losses(best), [_losses(one) for one in self._complete if one is not best])
        return Rival(_losses(best), controls, threshold_of(self._total), total)

    def _leader(self) -> Rival | None:
        """The best candidate on the items that all have been scored on, if there is one."""
        all_begun = [_losses(one) for one in (*self._begun, *self._complete)]
        count = min(map(len, all_begun), default=0)
        found = [losses[:count] for losses in all_begun if np.isfinite(losses[:count]).all()]
        if not found:
            return None
        controls = np.zeros((self._begun[0].items if self._begun else count, 0))
        return Rival(min(found, key=np.sum), controls, threshold_of(self._total), 0)


def _losses(one: Scored) -> Array:
    return np.array(one.losses)


def _is_complete(one: Scored) -> bool:
    return bool(one.losses) and not one.begun and bool(np.isfinite(one.losses).all())


def order_of(count: int, seed: int) -> list[int]:
    """The order in which items are scored.

    Raises:
        ArcmergeError: if there are so few items that no candidate can be stopped.
    """
    if count < MIN_ITEMS:
        raise ArcmergeError(
            f"'race' must have {MIN_ITEMS} windows or questions at least, got {count}; give more, or a smaller window"
        )
    return [int(index) for index in np.random.default_rng(seed).permutation(count)]


C = TypeVar("C", bound=Candidate)


def from_the_middle(candidates: Sequence[C]) -> list[C]:
    """The candidates, those in the middle of what is varied first."""
    names = {name for one in candidates for name in one.varied}
    values = {name: [one.varied[name] for one in candidates if name in one.varied] for name in names}
    middles = {name: (min(found) + max(found)) / 2 for name, found in values.items()}
    spans = {name: max(found) - min(found) or 1.0 for name, found in values.items()}

    def distance(one: C) -> float:
        squares = [((value - middles[name]) / spans[name]) ** 2 for name, value in one.varied.items()]
        return sum(squares) / (len(squares) or 1)

    return sorted(candidates, key=lambda one: round(distance(one), 9))
