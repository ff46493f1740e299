"""An optimiser that proposes the numbers in a recipe's t: TPE or CMA-ES, of optuna."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from arcmerge.errors import ArcmergeError
from arcmerge.merging.recipe import Recipe
from arcmerge.sweep.candidates import Candidate, rules
from arcmerge.sweep.journal import Scored

SEED = 0


class Search:
    """Asks for candidates and is told their scores; what was told before, in a journal, it takes as told.

    Every number in the recipe's t under `parameters:` is free between `low` and `high`. sampler: "tpe", "cma", or None
    for CMA-ES where there are several numbers. Raises ArcmergeError if there is none.
    """

    def __init__(
        self, recipe: Recipe, minimize: bool, low: float, high: float, sampler: str | None, told: Sequence[Scored]
    ) -> None:
        try:
            import optuna
        except ImportError as error:
            raise ArcmergeError(
                "--optimize needs optuna, which is not installed; pip install 'arcmerge[sweep]'"
            ) from error
        self._rules = rules(recipe)
        self._names = [_place(rule, number) for rule in self._rules for number in range(len(rule["value"]))]
        if not self._names:
            raise ArcmergeError(
                "--optimize varies the numbers of `t` under `parameters:`, and the recipe has none there; add "
                "t: [0.5, 0.5, 0.5] for a curve of three"
            )
        if not low < high:
            raise ArcmergeError(f"--bounds must be low:high with low below high, got {low:g}:{high:g}")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        chosen = sampler or ("cma" if len(self._names) > 1 else "tpe")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # A run that goes on must not draw what the one before it drew: the number of what is told moves the seed.
            seed = SEED + len(told)
            samplers = optuna.samplers
            made = samplers.CmaEsSampler(seed=seed) if chosen == "cma" else samplers.TPESampler(seed=seed)
            self._study = optuna.create_study(direction="minimize" if minimize else "maximize", sampler=made)
        self._space = {name: optuna.distributions.FloatDistribution(low, high) for name in self._names}
        for one in told:
            if one.varied.keys() == self._space.keys() and one.score == one.score:
                self._study.add_trial(
                    optuna.trial.create_trial(params=dict(one.varied), distributions=dict(self._space), value=one.score)
                )
        self._failed = optuna.trial.TrialState.FAIL
        self._trials: dict[str, Any] = {}

    def ask(self) -> Candidate:
        """The next proposal; there may be several whose scores are not told yet."""
        trial = self._study.ask(dict(self._space))
        varied = {name: round(float(trial.params[name]), 6) for name in self._names}
        numbers = iter(varied.values())
        found = [{**rule, "value": [next(numbers) for _ in rule["value"]]} for rule in self._rules]
        only = found[0]["value"] if len(found) == 1 and "filter" not in found[0] else None
        t = (only if len(only) > 1 else only[0]) if only else found
        candidate = Candidate(f"trial {trial.number + 1}", {"t": t}, varied)
        self._trials[candidate.name] = trial
        return candidate

    def tell(self, candidate: Candidate, score: float) -> None:
        """The score of a proposal; NaN is none."""
        trial = self._trials.pop(candidate.name)
        failed = score != score
        self._study.tell(trial, None if failed else score, state=self._failed if failed else None)


def _place(rule: dict[str, Any], number: int) -> str:
    return f"{rule.get('filter') or 't'}[{number}]" if len(rule["value"]) > 1 else str(rule.get("filter") or "t")
