"""An optimizer that proposes the values of `t`: TPE or CMA-ES of optuna."""

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
    """The settings of an optimizer.

    Args:
        count: the number of candidates to propose.
        low, high: the bounds of every value.
        sampler: "tpe", "cma", or None for CMA-ES if there are several values and TPE for one.
    """

    count: int
    low: float = 0.0
    high: float = 1.0
    sampler: str | None = None


class Optimizer:
    """Proposes candidates, and learns from the scores of these and of others.

    Args:
        recipe: the recipe whose values of `t` are varied, all of them.
        minimize: whether a lower score is better.
        optimize: the settings.
        scored: the candidates that are scored already.

    Raises:
        ArcmergeError: if the recipe has no values of `t`, or the bounds are wrong.
    """

    def __init__(self, recipe: Recipe, minimize: bool, optimize: Optimize, scored: Sequence[Scored]) -> None:
        with needed("optuna", by="--optimize", extra="sweep"):
            import optuna
        self._rules = rules(recipe)
        self._names = [_name(rule, index) for rule in self._rules for index in range(len(rule["value"]))]
        if not self._names:
            raise ArcmergeError(
                "'t' must be set under 'parameters' for --optimize to vary it, got none; add t: [0.5, 0.5, 0.5] for a "
                "curve of three values"
            )
        low, high = optimize.low, optimize.high
        if not low < high:
            raise ArcmergeError(f"'bounds' must be low:high with low below high, got {low:g}:{high:g}")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        chosen = optimize.sampler or ("cma" if len(self._names) > 1 else "tpe")
        if chosen == "cma":
            with needed("cmaes", by="--sampler cma", extra="sweep"):
                importlib.import_module("cmaes")  # optuna imports it at the first proposal
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # A resumed run must not propose the same values again, so the index of the last proposal moves the seed.
            # The number of proposals would not do: a cluster may have been killed before an earlier one was scored.
            self._asked = max((int(one.name.removeprefix(_NAME)) for one in scored if one.proposed), default=0)
            seed = SEED + self._asked
            samplers = optuna.samplers
            sampler = samplers.CmaEsSampler(seed=seed) if chosen == "cma" else samplers.TPESampler(seed=seed)
            self._study = optuna.create_study(direction="minimize" if minimize else "maximize", sampler=sampler)
        self._space = {name: optuna.distributions.FloatDistribution(low, high) for name in self._names}
        self._optuna: Any = optuna
        self._trials: dict[str, Any] = {}
        for one in scored:
            self.tell(one)

    def ask(self) -> Candidate:
        """The next proposal. Several proposals may wait for their scores at a time."""
        self._asked += 1
        trial = self._study.ask(dict(self._space))
        varied = {name: round(float(trial.params[name]), 6) for name in self._names}
        values = iter(varied.values())
        found = [{**rule, "value": [next(values) for _ in rule["value"]]} for rule in self._rules]
        only = found[0]["value"] if len(found) == 1 and "filter" not in found[0] else None
        t = (only if len(only) > 1 else only[0]) if only else found
        candidate = Candidate(f"{_NAME}{self._asked}", {"t": t}, varied, proposed=True)
        self._trials[candidate.name] = trial
        return candidate

    def tell(self, scored: Scored) -> None:
        """Learn the score of a proposal, or of another candidate that could have been one. NaN is a failed trial."""
        trial, failed = self._trials.pop(scored.name, None), scored.score != scored.score
        if trial is not None:
            state = self._optuna.trial.TrialState.FAIL if failed else None
            self._study.tell(trial, None if failed else scored.score, state=state)
        elif self._could_propose(scored.varied) and not failed:
            known = {"params": dict(scored.varied), "distributions": dict(self._space), "value": scored.score}
            self._study.add_trial(self._optuna.trial.create_trial(**known))

    def _could_propose(self, varied: Mapping[str, float]) -> bool:
        return varied.keys() == self._space.keys() and all(
            self._space[name].low <= value <= self._space[name].high for name, value in varied.items()
        )


def _name(rule: dict[str, Any], index: int) -> str:
    return f"{rule.get('filter') or 't'}[{index}]" if len(rule["value"]) > 1 else str(rule.get("filter") or "t")
