"""A sweep: the parents stay in memory, and each candidate is merged and scored there."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from arcmerge.errors import ArcmergeError
from arcmerge.interrupts import held
from arcmerge.merging.options import Options, Warn
from arcmerge.merging.prepare import prepare
from arcmerge.merging.recipe.changes import changed_recipe
from arcmerge.merging.recipe.recipe import MergeConfig, Recipe, load_recipe
from arcmerge.sweeping.arguments import (
    File,
    Vary,
    check_candidate,
    default_t,
    read_also,
    read_optimize,
    read_score,
    read_scoring,
)
from arcmerge.sweeping.candidates import Candidate, Values, of_curves, of_grid, of_numbers, parents, read_values
from arcmerge.sweeping.evaluators import EvaluationSpec, LocalEvaluator, RayEvaluator
from arcmerge.sweeping.journal import Journal, Scored
from arcmerge.sweeping.optimizer import Optimize, Optimizer, corners
from arcmerge.sweeping.plots import plot, plot_front
from arcmerge.sweeping.race import Race
from arcmerge.sweeping.results import TABLES, best_of, front_of, write_tables, write_whole
from arcmerge.sweeping.scores import Score, Scoring

if TYPE_CHECKING:
    from arcmerge.gemma2.model import Gemma2

JOURNAL, BEST, PLOT, FRONT = "journal.jsonl", "best.yml", "scores.png", "front.png"

# Called after each candidate with it, the best one so far, the number of scored candidates and the number of all.
Progress = Callable[[Scored, Scored, int, int], object]


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep.

    Attributes:
        best: the candidate with the best score, or None if no candidate has a score.
        scored: all candidates of the journal, in the order in which they were scored.
        score: the name of the score.
        folder: the folder with best.yml, results.csv, results.json, scores.png and journal.jsonl.
        front: the candidates of the Pareto front, if there are several scores.
    """

    best: Scored | None
    scored: tuple[Scored, ...]
    score: str
    folder: Path
    front: tuple[Scored, ...] = ()

    def __str__(self) -> str:
        if self.best is None:
            return f"no candidate has a score; see {self.folder / TABLES[0]}"
        spread = f" (standard deviation {self.best.deviation:.2g})" if self.best.by_seed else ""
        files = [PLOT, FRONT] if self.front else [PLOT]
        lines = [
            f"best by {self.score}: {self.best.name}, {self.best.score:.6g}{spread}",
            f"its recipe: {self.folder / BEST}; all: {self.folder / TABLES[0]}, {', '.join([TABLES[1], *files])}",
        ]
        if stopped := [one for one in self.scored if one.stopped]:
            share = sum(one.amount for one in self.scored) / (self.best.amount * len(self.scored))
            lines.append(f"stopped early: {len(stopped)} of {len(self.scored)} candidates; {share:.0%} of the work")
        if self.front:
            lines.append(f"Pareto front: {len(self.front)} candidates, whose recipes are in {TABLES[1]}")
        return "\n".join(lines)


def sweep(
    config: MergeConfig,
    out: File,
    *,
    text: File | Sequence[File] | None = None,
    tasks: File | None = None,
    function: str | Callable[[Gemma2], float] | None = None,
    window: int | None = None,
    minimize: bool = False,
    also: str | Sequence[str] = (),
    seeds: int | None = None,
    race: bool = False,
    race_seed: int = 0,
    t: Values | None = None,
    curves: Mapping[str, Values] | None = None,
    grid: Mapping[str, Values] | None = None,
    optimize: int | None = None,
    vary: Vary = (),
    bounds: tuple[float, float] | None = None,
    sampler: Literal["cma", "tpe", "nsga2"] | None = None,
    device: str = "auto",
    numerics: str = "default",
    threads: int | None = None,
    ray: bool = False,
    progress: Progress = lambda scored, best, done, total: None,
    warn: Warn = warnings.warn,
) -> SweepResult:
    """Score many candidates of a merge, and write the tables, a plot and the recipe of the best one.

    Give one score: `text`, `tasks` or `function`. Without `t`, `curves`, `grid` and `optimize` the candidates are the
    t of 0, 0.1, ..., 1, if the method has a t. Both parents of a slerp are always scored too. A sweep that was ended is
    resumed by the same call: its journal in `out` holds the scored candidates.

    Args:
        config: a merge configuration as for :func:`arcmerge.merge`.
        out: the folder of the results.
        text: text files in UTF-8; the score is their perplexity.
        tasks: a file with one question per line, as `{"context": "...", "choices": ["...", "..."], "answer": 0}`; the
            score is the accuracy.
        function: a function of a Gemma2 that returns a number, or its name as "module:function".
        window: the number of tokens in a window of `text`; None for the model's maximum.
        minimize: whether a lower score of `function` is better.
        also: other scores, as "text:FILE", "tasks:FILE", "function:MODULE:NAME" (higher is better) or
            "minimize:MODULE:NAME". The results mark the Pareto front; `best` is still the best by the first score.
        seeds: the number of seeds that each candidate of a random method is merged and scored with, from the seed of
            the configuration up; the score is the mean.
        race: whether a candidate is stopped as soon as it is worse than the best one beyond doubt. With `text` or
            `tasks`.
        race_seed: the seed of the order in which a race scores windows or questions.
        t: values of t for the whole model, as numbers or as "0:1:0.1" (first:last:step).
        curves: for each name the values of a gradient of t over the layers.
        grid: for each parameter its values; all combinations are scored. "density" is a parameter for the whole model,
            "weight[1]" or "weight[org/name]" that of one model, and "t:self_attn" or "weight[1]:mlp" only for the
            tensors whose names contain the text. A text that names no parameter is such a filter of t.
        optimize: the number of proposals of an optimizer.
        vary: the parameters that the optimizer varies, as in `grid`, or a mapping to their bounds; t by default. All
            numbers that the configuration has for a parameter are varied, or one if it has none.
        bounds: the lowest and the highest value where `vary` names none, (0, 1) by default.
        sampler: the optimizer; None for "nsga2" with `also`, or else "cma" for several values and "tpe" for one.
        device: "auto" (the current GPU, or else the CPU), "cpu", "cuda" or "cuda:N".
        numerics: "default", or "hf" to round as transformers does.
        threads: the number of threads; None for :func:`arcmerge.get_num_threads`.
        ray: whether the workers of a Ray cluster score the candidates.
        progress: called after each candidate with it, the best one so far, the number of scored candidates and the
            number of all.
        warn: called with each warning, a sentence.

    Returns:
        The best candidate, all candidates, and the folder.

    Raises:
        ArcmergeError: for a wrong argument or configuration, before a candidate is scored; or if a score fails.

    Example:
        >>> result = arcmerge.sweep("recipe.yml", "swept/", text="validation.txt", t=[0.25, 0.5, 0.75])
        >>> len(result.scored)  # with both parents
        5
        >>> report = arcmerge.merge("swept/best.yml", "best/")
    """
    recipe = load_recipe(config)
    score = read_score(text, tasks, function, window, minimize)
    if t is None and not (curves or grid or optimize is not None):
        t = default_t(recipe)
    candidates = [
        *(of_numbers(read_values(t, "t")) if t is not None else []),
        *of_curves(curves or {}),
        *of_grid(grid or {}, recipe),
        *parents(recipe),
    ]
    return score_candidates(
        config,
        candidates,
        score,
        out,
        also=read_also(also, window),
        seeds=seeds,
        race=_order(race, race_seed),
        optimize=read_optimize(optimize, vary, bounds, sampler),
        device=device,
        numerics=numerics,
        threads=threads,
        ray=ray,
        progress=progress,
        warn=warn,
    )


def score_candidates(
    config: MergeConfig,
    candidates: Sequence[Candidate],
    score: Score,
    out: File,
    *,
    also: Sequence[Score] = (),
    seeds: int | None = None,
    race: int | None = None,
    optimize: Optimize | None = None,
    device: str = "auto",
    numerics: str = "default",
    ray: bool = False,
    progress: Progress = lambda scored, best, done, total: None,
    warn: Warn = warnings.warn,
    **options: Any,
) -> SweepResult:
    """Run a sweep like :func:`sweep`, with any candidates and score. `options` go to Gemma2.from_merge."""
    prepared = prepare(config, Options.of({**options, "device": device}), warn)
    recipe, folder = prepared.recipe, Path(out)
    scoring = read_scoring(recipe, score, also, seeds, race)
    for parameters in chain((one.parameters for one in candidates), corners(recipe, optimize.vary) if optimize else ()):
        check_candidate(prepared, parameters)
    shards = {str(one.folder.resolve()): one.fingerprint() for one in prepared.checkpoints.values()}
    identity = {"recipe": recipe.text, **scoring.identity(), "parents": shards, "numerics": numerics}
    if not (folder / JOURNAL).exists():
        for name in (BEST, PLOT, *TABLES):
            if (folder / name).exists():
                raise ArcmergeError(
                    f"'{folder / name}' must be the result of a sweep to be replaced, got a folder without {JOURNAL}; "
                    "name another --out, or move the file away"
                )
    folder.mkdir(parents=True, exist_ok=True)
    with Journal(folder / JOURNAL, identity) as journal:
        minimize = [one.minimize for one in scoring.scores]
        optimizer = (
            Optimizer(recipe, minimize, optimize, [*journal.scored, *journal.begun.values()]) if optimize else None
        )
        fresh, proposals, done, total = _remaining(candidates, optimizer, optimize.count if optimize else 0, journal)
        racing = None if race is None else Race(fresh, proposals, journal.scored, scoring.items_score, total, done)
        plain = ((one, None) for one in chain(fresh, proposals))
        # The warnings of the configuration have been given above.
        spec = EvaluationSpec(recipe.text, scoring, device, numerics, {**options, "warn": lambda sentence: None})
        best = _write_results(journal, recipe, scoring, folder)
        evaluator = RayEvaluator(spec) if ray else LocalEvaluator(spec)
        for scored in evaluator.evaluate(racing.next if racing else lambda: next(plain, None)):
            with held():  # an interrupt waits until the files agree with each other
                found = racing.add(scored) if racing else [scored]
                for one in found:
                    journal.add(one)
                best = _write_results(journal, recipe, scoring, folder)
            for one in found:
                if not one.begun:
                    if optimizer is not None:
                        optimizer.tell(one)
                    done += 1
                    progress(one, best or one, done, total)
        try:
            plot(journal.scored, [one.name for one in parents(recipe)], score.title, score.minimize, folder / PLOT)
            if also:
                plot_front(journal.scored, scoring, folder / FRONT)
        except ArcmergeError as error:  # without matplotlib there are all other results
            warn(str(error))
        front = tuple(front_of(journal.scored, scoring)) if also else ()
        return SweepResult(best, tuple(journal.scored), score.title, folder, front)


def _order(race: bool, seed: int) -> int | None:
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ArcmergeError(f"'race_seed' must be a whole number from 0 to 2^63 - 1, got {seed!r:.80}")
    return seed if race else None


def _write_results(journal: Journal, recipe: Recipe, scoring: Scoring, folder: Path) -> Scored | None:
    """Write the tables and the best recipe. Returns the best candidate."""

    def recipe_of(one: Scored) -> str:
        return changed_recipe(recipe, one.parameters).text

    best = best_of(journal.scored, scoring.scores[0].minimize)
    if best is not None:
        write_whole(folder / BEST, recipe_of(best))
    if journal.scored:
        write_tables(journal.scored, scoring, recipe_of, folder)
    return best


def _remaining(
    candidates: Sequence[Candidate], optimizer: Optimizer | None, proposals: int, journal: Journal
) -> tuple[list[Candidate], Iterator[Candidate], int, int]:
    """The candidates without a score, proposals that follow, the number of candidates with one, and that of all."""
    different = {one.key: one for one in candidates}
    total = len(different) + proposals
    begun = {key: one for key, one in journal.begun.items() if key in different or (one.proposed and optimizer)}
    known = {one.key for one in journal.scored}
    fresh = [one for key, one in (different | begun).items() if key not in known]
    done = sum(key in known for key in different)
    if optimizer is None:
        return fresh, iter(()), done, total
    scored = min(sum(one.proposed for one in journal.scored), proposals)
    following = proposals - scored - sum(one.proposed for one in begun.values())
    return fresh, (optimizer.ask() for _ in range(following)), done + scored, total
