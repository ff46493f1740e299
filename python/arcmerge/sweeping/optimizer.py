"""An optimiser that proposes the numbers in a recipe's t: TPE or CMA-ES, of optuna."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arcmerge.errors import ArcmergeError, needed
from arcmerge.merging.recipe.recipe import Recipe
from arcmerge.sweeping.candidates import Candidate, rules
from arcmerge.sweeping.journal import Scored

SEED = 0
_NAME = "trial "


@dataclass(frozen=True)
class Optimize:
    """An optimiser: how many candidates it proposes, where every number lies, and which it is.

    sampler: "tpe", "cma", or None for CMA-ES where there are several numbers.
    """

    count: int
    low: float = 0.0
    high: float = 1.0
    sampler: str | None = None


class Search:
    """Asks for candidates and is told scores, of those and of others; told: what a journal has, by earlier runs.

    Every number in the recipe's t is free. Raises ArcmergeError if there is none.
    """

    def __init__(self, recipe: Recipe, minimize: bool, optimize: Optimize, told: Sequence[Scored]) -> None:
        with needed("optuna", by="--optimize", extra="sweep"):
            import optuna
        self._rules = rules(recipe)
        self._names = [_place(rule, number) for rule in self._rules for number in range(len(rule["value"]))]
        if not self._names:
            raise ArcmergeError(
                "--optimize varies the numbers of `t` under `parameters:`, and the recipe has none there; add "
                "t: [0.5, 0.5, 0.5] for a curve of three"
            )
        low, high = optimize.low, optimize.high
        if not low < high:
            raise ArcmergeError(f"--bounds must be low:high with low below high, got {low:g}:{high:g}")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        chosen = optimize.sampler or ("cma" if len(self._names) > 1 else "tpe")
        if chosen == "cma":
            with needed("cmaes", by="--sampler cma", extra="sweep"):
                importlib.import_module("cmaes")  # optuna does so where it first asks
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # A run that goes on must not draw what the one before it drew: the last proposal's number moves the seed.
            # A cluster may have been killed with an earlier one unscored, so that their count is not that number.
            self._asked = max((int(one.name.removeprefix(_NAME)) for one in told if one.proposed), default=0)
            seed = SEED + self._asked
            samplers = optuna.samplers
            made = samplers.CmaEsSampler(seed=seed) if chosen == "cma" else samplers.TPESampler(seed=seed)
            self._study = optuna.create_study(direction="minimize" if minimize else "maximize", sampler=made)
        self._space = {name: optuna.distributions.FloatDistribution(low, high) for name in self._names}
        self._optuna: Any = optuna
        self._trials: dict[str, Any] = {}
        for one in told:
            self.tell(one, one.score)

    def ask(self) -> Candidate:
        """The next proposal; there may be several whose scores are not told yet."""
        self._asked += 1
        trial = self._study.ask(dict(self._space))
        varied = {name: round(float(trial.params[name]), 6) for name in self._names}
        numbers = iter(varied.values())
        found = [{**rule, "value": [next(numbers) for _ in rule["value"]]} for rule in self._rules]
        only = found[0]["value"] if len(found) == 1 and "filter" not in found[0] else None
        t = (only if len(only) > 1 else only[0]) if only else found
        candidate = Candidate(f"{_NAME}{self._asked}", {"t": t}, varied, proposed=True)
        self._trials[candidate.name] = trial
        return candidate

    def tell(self, candidate: Candidate | Scored, score: float) -> None:
        """The score of a proposal, or of another candidate that could have been one; NaN is none."""
        trial, failed = self._trials.pop(candidate.name, None), score != score
        if trial is not None:
            state = self._optuna.trial.TrialState.FAIL if failed else None
            self._study.tell(trial, None if failed else score, state=state)
        elif self._could_propose(candidate.varied) and not failed:
            known = {"params": dict(candidate.varied), "distributions": dict(self._space), "value": score}
            self._study.add_trial(self._optuna.trial.create_trial(**known))

    def _could_propose(self, varied: Mapping[str, float]) -> bool:
        return varied.keys() == self._space.keys() and all(
            self._space[name].low <= value <= self._space[name].high for name, value in varied.items()
        )


def _place(rule: dict[str, Any], number: int) -> str:
    return f"{rule.get('filter') or 't'}[{number}]" if len(rule["value"]) > 1 else str(rule.get("filter") or "t")
