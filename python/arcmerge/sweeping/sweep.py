"""A sweep: the parents stay in memory, and each candidate is merged and scored there."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from arcmerge.errors import ArcmergeError
from arcmerge.interrupts import held
from arcmerge.merging.methods import registry
from arcmerge.merging.options import Options, Warn
from arcmerge.merging.prepare import Prepared, prepare
from arcmerge.merging.recipe.changes import Key, changed_recipe
from arcmerge.merging.recipe.parameters import Rule
from arcmerge.merging.recipe.recipe import MergeConfig, Recipe, load_recipe
from arcmerge.sweeping.candidates import Candidate, Values, of_curves, of_grid, of_numbers, parents, read_values
from arcmerge.sweeping.evaluators import EvaluationSpec, LocalEvaluator, RayEvaluator
from arcmerge.sweeping.journal import Journal, Scored
from arcmerge.sweeping.optimizer import Optimize, Optimizer, corners
from arcmerge.sweeping.plots import plot
from arcmerge.sweeping.results import TABLES, best_of, write_tables, write_whole
from arcmerge.sweeping.scores import Function, MultipleChoice, Perplexity, Score, read_questions, read_texts

if TYPE_CHECKING:
    from arcmerge.gemma2.model import Gemma2

JOURNAL, BEST, PLOT = "journal.jsonl", "best.yml", "scores.png"
DEFAULT_T = "0:1:0.1"

File = str | PathLike[str]
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
    """

    best: Scored | None
    scored: tuple[Scored, ...]
    score: str
    folder: Path

    def __str__(self) -> str:
        if self.best is None:
            return f"no candidate has a score; see {self.folder / TABLES[0]}"
        return (
            f"best by {self.score}: {self.best.name}, {self.best.score:.6g}\n"
            f"its recipe: {self.folder / BEST}; all: {self.folder / TABLES[0]}, {TABLES[1]}, {PLOT}"
        )


def sweep(
    config: MergeConfig,
    out: File,
    *,
    text: File | Sequence[File] | None = None,
    tasks: File | None = None,
    function: str | Callable[[Gemma2], float] | None = None,
    window: int | None = None,
    minimize: bool = False,
    t: Values | None = None,
    curves: Mapping[str, Values] | None = None,
    grid: Mapping[str, Values] | None = None,
    optimize: int | None = None,
    vary: Sequence[str] | Mapping[str, tuple[float, float] | None] = (),
    bounds: tuple[float, float] | None = None,
    sampler: Literal["cma", "tpe"] | None = None,
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
        t: values of t for the whole model, as numbers or as "0:1:0.1" (first:last:step).
        curves: for each name the values of a gradient of t over the layers.
        grid: for each parameter its values; all combinations are scored. "density" is a parameter for the whole model,
            "weight[1]" or "weight[org/name]" that of one model, and "t:self_attn" or "weight[1]:mlp" only for the
            tensors whose names contain the text. A text that names no parameter is such a filter of t.
        optimize: the number of proposals of an optimizer.
        vary: the parameters that the optimizer varies, as in `grid`, or a mapping to their bounds; t by default. All
            numbers that the configuration has for a parameter are varied, or one if it has none.
        bounds: the lowest and the highest value where `vary` names none, (0, 1) by default.
        sampler: the optimizer; None for "cma" if there are several values and "tpe" for one.
        device: "auto", "cpu", "cuda" or "cuda:N".
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
    score = _score(text, tasks, function, window, minimize)
    if t is None and not (curves or grid or optimize is not None):
        t = _default_t(recipe)
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
        optimize=_optimize(optimize, vary, bounds, sampler),
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
    optimize: Optimize | None = None,
    device: str = "auto",
    numerics: str = "default",
    ray: bool = False,
    progress: Progress = lambda scored, best, done, total: None,
    warn: Warn = warnings.warn,
    **options: Any,
) -> SweepResult:
    """Run a sweep like :func:`sweep`, with any candidates and score. `options` go to Gemma2.from_merge."""
    recipe, folder = load_recipe(config), Path(out)
    prepared = prepare(recipe.text, Options.of({**options, "device": device}), warn)
    recipe = prepared.recipe  # it has the seed that `options` may hold
    for parameters in chain((one.parameters for one in candidates), corners(recipe, optimize.vary) if optimize else ()):
        _check(prepared, changed_recipe(recipe, parameters), parameters)
    shards = {str(one.folder.resolve()): one.fingerprint() for one in prepared.checkpoints.values()}
    identity = {"recipe": recipe.text, "score": score.identity, "parents": shards, "numerics": numerics}
    if not (folder / JOURNAL).exists():
        for name in (BEST, PLOT, *TABLES):
            if (folder / name).exists():
                raise ArcmergeError(
                    f"'{folder / name}' must be the result of a sweep to be replaced, got a folder without {JOURNAL}; "
                    "name another --out, or move the file away"
                )
    folder.mkdir(parents=True, exist_ok=True)
    with Journal(folder / JOURNAL, identity) as journal:
        optimizer = Optimizer(recipe, score.minimize, optimize, journal.scored) if optimize else None
        wanted, done, total = _remaining(candidates, optimizer, optimize.count if optimize else 0, journal)
        # The warnings of the configuration have been given above.
        spec = EvaluationSpec(recipe.text, score, device, numerics, {**options, "warn": lambda sentence: None})
        best = _write_results(journal, recipe, score, folder)
        evaluator = RayEvaluator(spec) if ray else LocalEvaluator(spec)
        for scored in evaluator.evaluate(wanted):
            with held():  # an interrupt waits until the files agree with each other
                journal.add(scored)
                best = _write_results(journal, recipe, score, folder)
            if optimizer is not None:
                optimizer.tell(scored)
            done += 1
            progress(scored, best or scored, done, total)
        try:
            plot(journal.scored, [one.name for one in parents(recipe)], score.title, score.minimize, folder / PLOT)
        except ArcmergeError as error:  # without matplotlib there are all other results
            warn(str(error))
        return SweepResult(best, tuple(journal.scored), score.title, folder)


def _score(
    text: File | Sequence[File] | None,
    tasks: File | None,
    function: str | Callable[[Gemma2], float] | None,
    window: int | None,
    minimize: bool,
) -> Score:
    given = [name for name, value in (("text", text), ("tasks", tasks), ("function", function)) if value is not None]
    if len(given) != 1:
        raise ArcmergeError(f"'score' must be one of text, tasks and function, got {' and '.join(given) or 'none'}")
    if window is not None and text is None:
        raise ArcmergeError(f"'window' must be given with text alone, got it with {given[0]}; leave it out")
    if minimize and function is None:
        raise ArcmergeError(f"'minimize' must be given with function alone, got it with {given[0]}; leave it out")
    if text is not None:
        files = [text] if isinstance(text, str | PathLike) else text
        return Perplexity(read_texts([Path(file) for file in files]), window)
    if tasks is not None:
        return MultipleChoice(read_questions(Path(tasks)))
    assert function is not None
    return Function(function, minimize)


def _default_t(recipe: Recipe) -> str:
    names = [parameter.name for parameter in registry.get(recipe.method).parameters]
    if "t" not in names:
        raise ArcmergeError(
            f"'grid' must be given for '{recipe.method}', which has no t, got no candidates; vary one of its "
            f"parameters ({', '.join(names) or 'none'})"
        )
    return DEFAULT_T


def _optimize(
    count: int | None,
    vary: Sequence[str] | Mapping[str, tuple[float, float] | None],
    bounds: tuple[float, float] | None,
    sampler: str | None,
) -> Optimize | None:
    if count is None:
        for name, value in (("vary", vary or None), ("bounds", bounds), ("sampler", sampler)):
            if value is not None:
                raise ArcmergeError(f"'{name}' must be given with optimize alone, got it without; leave it out")
        return None
    if type(count) is not int or count < 1:
        raise ArcmergeError(f"'optimize' must be a number of candidates from 1 up, got {count!r:.80}")
    named = vary if isinstance(vary, Mapping) else dict.fromkeys(vary)
    return Optimize(count, {name: own or bounds or (0.0, 1.0) for name, own in (named or {"t": None}).items()}, sampler)


def _check(prepared: Prepared, recipe: Recipe, parameters: Mapping[str, Any]) -> None:
    """Raise ArcmergeError if the method refuses the values, or a filter matches no tensor."""
    jobs = prepared.with_recipe(recipe).plan.jobs
    for key in map(Key.read, parameters):
        if key.filter is not None and not any(
            Rule(key.filter, ()).matches(name)
            for job in jobs
            for name in (job.output.name, *(one.info.name for one in job.inputs))
        ):
            raise ArcmergeError(f"'{key}' must name a part of a tensor's name after the colon, got none that matches")


def _write_results(journal: Journal, recipe: Recipe, score: Score, folder: Path) -> Scored | None:
    """Write the tables and the best recipe. Returns the best candidate."""
    best = best_of(journal.scored, score.minimize)
    if best is not None:
        write_whole(folder / BEST, changed_recipe(recipe, best.parameters).text)
    if journal.scored:
        write_tables(journal.scored, folder)
    return best


def _remaining(
    candidates: Sequence[Candidate], optimizer: Optimizer | None, proposals: int, journal: Journal
) -> tuple[Iterable[Candidate], int, int]:
    """The candidates that have no score yet, the number of those that have one, and the number of all."""
    different = {_key(one.parameters): one for one in candidates}
    known = {_key(one.parameters) for one in journal.scored}
    fresh = [one for key, one in different.items() if key not in known]
    done, total = len(different) - len(fresh), len(different) + proposals
    if optimizer is None:
        return fresh, done, total
    proposed = min(sum(one.proposed for one in journal.scored), proposals)
    return chain(fresh, (optimizer.ask() for _ in range(proposals - proposed))), done + proposed, total


def _key(parameters: Any) -> str:
    return json.dumps(parameters, sort_keys=True)
