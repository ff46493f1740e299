"""An optimizer that proposes the values of parameters: TPE or CMA-ES of optuna."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from arcmerge.errors import ArcmergeError, needed
from arcmerge.merging.recipe.changes import Key, models_with, own_rules
from arcmerge.merging.recipe.recipe import Recipe
from arcmerge.sweeping.candidates import Candidate, read_key
from arcmerge.sweeping.journal import Scored

SEED = 0
# NSGA-II breeds a population from the one before. optuna's own settings are for hundreds of trials: a population of 50,
# each number from one parent, and one mutation, a random number, a trial. With these a single number is never bred.
GENERATIONS, MAX_POPULATION, MUTATION = 4, 50, 0.1
_NAME = "trial "


@dataclass(frozen=True)
class Optimize:
    """The settings of an optimizer.

    Args:
        count: the number of candidates to propose.
        vary: for each parameter that is varied its bounds, by the keys of `changed_recipe`.
        sampler: "tpe", "cma", "nsga2", or None for NSGA-II if there are several scores, or else CMA-ES if there are
            several values and TPE for one.
    """

    count: int
    vary: Mapping[str, tuple[float, float]] = field(default_factory=lambda: {"t": (0.0, 1.0)})
    sampler: str | None = None


@dataclass(frozen=True)
class _Axis:
    """A parameter that is varied: the rules `{filter, value: [...]}` that its numbers stand in, and their bounds."""

    key: Key
    rules: Sequence[Mapping[str, Any]]
    low: float
    high: float
    whole: bool

    @property
    def names(self) -> list[str]:
        """A name for each number: that of the key, its filter and, in a gradient, its index."""
        return [name for rule in self.rules for name in self._names(rule)]

    def value(self, varied: Mapping[str, float]) -> Any:
        """The value of the parameter in a recipe, in its simplest form."""
        found = []
        for rule in self.rules:
            numbers = [int(varied[name]) if self.whole else varied[name] for name in self._names(rule)]
            found.append({**rule, "value": numbers if len(numbers) > 1 else numbers[0]})
        simple = len(found) == 1 and (self.key.filter is not None or found[0].get("filter") is None)
        return found[0]["value"] if simple else found

    def _names(self, rule: Mapping[str, Any]) -> list[str]:
        name, count = str(replace(self.key, filter=self.key.filter or rule.get("filter"))), len(rule["value"])
        return [f"{name}[{index}]" for index in range(count)] if count > 1 else [name]


def corners(recipe: Recipe, vary: Mapping[str, tuple[float, float]]) -> Iterator[dict[str, Any]]:
    """Parameters with every number in the middle of its bounds, but those of one axis at an end."""
    axes = _axes(recipe, vary)
    middle = {
        name: (axis.low + axis.high) // 2 if axis.whole else (axis.low + axis.high) / 2
        for axis in axes
        for name in axis.names
    }
    for axis in axes:
        for end in (axis.low, axis.high):
            yield _parameters(axes, {**middle, **dict.fromkeys(axis.names, end)})


def _parameters(axes: Sequence[_Axis], varied: Mapping[str, float]) -> dict[str, Any]:
    return {str(axis.key): axis.value(varied) for axis in axes}


def _axes(recipe: Recipe, vary: Mapping[str, tuple[float, float]]) -> list[_Axis]:
    """Raises ArcmergeError for wrong keys and bounds."""
    found: dict[str, _Axis] = {}
    for text, (low, high) in vary.items():
        key, parameter = read_key(text, recipe)
        whole, is_plain = parameter.kind is int, key.model is None and key.filter is None
        if parameter.kind is bool:
            raise ArcmergeError(f"'{text}' must be a number to be optimized, got a switch; give its values in a grid")
        if not low < high or (whole and not (float(low).is_integer() and float(high).is_integer())):
            numbers = "whole numbers low:high" if whole else "low:high"
            raise ArcmergeError(f"'bounds' must be {numbers} with low below high, got {low:g}:{high:g} for {key}")
        if is_plain and any(
            key.name in part.rules
            for part in (recipe.module_parameters, *(slice_.parameters for slice_ in recipe.slices))
        ):
            raise ArcmergeError(
                f"'{key}' must be set under the recipe's own 'parameters' to be optimized, got values under a slice or "
                "a module; move them there"
            )
        # A parameter that models have values for is varied for each of them, as one value would replace theirs.
        own = models_with(recipe, key.name) if is_plain else []
        for one in [replace(key, model=str(index)) for index in own] or [key]:
            rules = own_rules(recipe, one) or [{"value": [low]}]
            found[str(one)] = _Axis(one, rules, low, high, whole)
    return list(found.values())


class Optimizer:
    """Proposes candidates, and learns from the scores of these and of others.

    Args:
        recipe: the recipe whose values are varied: all numbers that it has for a parameter, one if it has none.
        minimize: for each score whether a lower one is better.
        optimize: the settings.
        scored: the candidates that are scored already.

    Raises:
        ArcmergeError: if a parameter or its bounds are wrong.
    """

    def __init__(self, recipe: Recipe, minimize: Sequence[bool], optimize: Optimize, scored: Sequence[Scored]) -> None:
        with needed("optuna", by="--optimize", extra="sweep"):
            import optuna
        self._axes = _axes(recipe, optimize.vary)
        distributions: Any = optuna.distributions
        self._space: dict[str, Any] = {
            name: (distributions.IntDistribution if axis.whole else distributions.FloatDistribution)(
                axis.low, axis.high
            )
            for axis in self._axes
            for name in axis.names
        }
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        several = len(minimize) > 1
        chosen = optimize.sampler or ("nsga2" if several else "cma" if len(self._space) > 1 else "tpe")
        if chosen == "cma" and several:
            raise ArcmergeError("'sampler' must be nsga2 or tpe for several scores, got cma; leave it out")
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
            self._population = max(2, min(MAX_POPULATION, optimize.count // GENERATIONS))
            sampler: Any
            if chosen == "nsga2":
                sampler = samplers.NSGAIISampler(
                    population_size=self._population,
                    crossover=samplers.nsgaii.BLXAlphaCrossover(),
                    crossover_prob=1.0,  # a copy of a parent would be scored again
                    mutation_prob=MUTATION / len(self._space),
                    seed=seed,
                )
            else:
                sampler = samplers.CmaEsSampler(seed=seed) if chosen == "cma" else samplers.TPESampler(seed=seed)
            directions: Any = ["minimize" if lower else "maximize" for lower in minimize]
            self._study = optuna.create_study(directions=directions, sampler=sampler)
            # NSGA-II marks what it proposes with its generation, and breeds from marked trials only.
            self._marks: list[str] = []
            if chosen == "nsga2":
                first = optuna.create_study(directions=directions, sampler=sampler)
                first.ask(dict(self._space))
                self._marks = list(first.trials[0].system_attrs)
        self._optuna: Any = optuna
        self._trials: dict[str, Any] = {}
        for one in scored:
            self.tell(one)

    def ask(self) -> Candidate:
        """The next proposal. Several proposals may wait for their scores at a time."""
        self._asked += 1
        trial = self._study.ask(dict(self._space))
        varied = {name: round(float(trial.params[name]), 6) for name in self._space}
        candidate = Candidate(f"{_NAME}{self._asked}", _parameters(self._axes, varied), varied, proposed=True)
        self._trials[candidate.name] = trial
        return candidate

    def tell(self, scored: Scored) -> None:
        """Learn the scores of a proposal, or of another candidate that could have been one. NaN is a failed trial.

        The score of a candidate that a race has stopped is an estimate.
        """
        trial, failed = self._trials.pop(scored.name, None), any(map(math.isnan, scored.scores))
        if trial is None and (failed or not self._could_propose(scored.varied)):
            return
        if trial is not None:
            state = self._optuna.trial.TrialState.FAIL if failed else None
            self._study.tell(trial, None if failed else scored.scores, state=state)
            return
        generation = len(self._study.trials) // self._population
        known = self._optuna.trial.create_trial(
            params=dict(scored.varied),
            distributions=dict(self._space),
            values=scored.scores,
            system_attrs=dict.fromkeys(self._marks, generation),
        )
        self._study.add_trial(known)

    def _could_propose(self, varied: Mapping[str, float]) -> bool:
        return varied.keys() == self._space.keys() and all(
            self._space[name].low <= value <= self._space[name].high for name, value in varied.items()
        )
