"""A sweep: one residence of the parents, many candidates, each merged in place and scored where it lies."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from arcmerge.errors import ArcmergeError
from arcmerge.interrupts import held
from arcmerge.merging.execution.in_memory import changed_recipe
from arcmerge.merging.options import Options
from arcmerge.merging.prepared import Config, Warn, prepare
from arcmerge.merging.recipe.recipe import load_recipe
from arcmerge.sweeping.candidates import Candidate, parents
from arcmerge.sweeping.evaluators import EvaluationSpec, LocalEvaluator, RayEvaluator
from arcmerge.sweeping.journal import Journal, Scored
from arcmerge.sweeping.optimizer import Optimize, Search
from arcmerge.sweeping.plots import plot
from arcmerge.sweeping.results import TABLES, best_of, write_tables, write_whole
from arcmerge.sweeping.scores import Score

JOURNAL, BEST, PLOT = "journal.jsonl", "best.yml", "scores.png"

# Told of every candidate as it was scored, of the best so far, and how many there were and will be.
Listen = Callable[[Scored, Scored, int, int], None]


def sweep(
    config: Config,
    candidates: Sequence[Candidate],
    score: Score,
    out: str | Path,
    *,
    optimize: Optimize | None = None,
    device: str = "auto",
    numerics: str = "default",
    ray: bool = False,
    listen: Listen = lambda scored, best, done, total: None,
    warn: Warn = warnings.warn,
    **options: Any,
) -> Scored | None:
    """Score candidates of a merge and leave tables, a plot and the best recipe in the folder `out`.

    config: a merge configuration. candidates: what to try. optimize: what to try after them. ray: by a cluster, see
    RayEvaluator. options: as of Gemma2.from_merge. A sweep that ended early resumes from the journal in `out`.

    Returns the best, None if no candidate has a score. Raises ArcmergeError for what is wrong with any of this, before
    the first is scored where it can be known.
    """
    recipe, folder = load_recipe(config), Path(out)
    for parameters in [*(one.parameters for one in candidates), *([{"t": optimize.low}] if optimize else [])]:
        changed_recipe(recipe, parameters)
    prepared = prepare(recipe.text, Options.of({**options, "device": device}), warn)
    shards = {str(one.folder.resolve()): one.fingerprint() for one in prepared.checkpoints.values()}
    about = {"recipe": recipe.text, "score": score.identity, "parents": shards, "numerics": numerics}
    if not (folder / JOURNAL).exists():
        for name in (BEST, PLOT, *TABLES):
            if (folder / name).exists():
                raise ArcmergeError(
                    f"{folder / name}: must not exist, because no {JOURNAL} in the folder shows that a sweep wrote it; "
                    "name another --out, or move the file away"
                )
    folder.mkdir(parents=True, exist_ok=True)
    with Journal(folder / JOURNAL, about) as journal:
        search = Search(recipe, score.minimize, optimize, journal.scored) if optimize else None
        wanted, before, total = _wanted(candidates, search, optimize.count if optimize else 0, journal)
        bench = EvaluationSpec(recipe.text, score, device, numerics, {**options, "warn": _unheard})

        def leave() -> Scored | None:
            """The tables and the best recipe of all that is scored."""
            best = best_of(journal.scored, score.minimize)
            if best is not None:
                write_whole(folder / BEST, changed_recipe(recipe, best.parameters).text)
            if journal.scored:
                write_tables(journal.scored, folder)
            return best

        best = leave()
        evaluation = RayEvaluator(bench) if ray else LocalEvaluator(bench)
        for done, (candidate, value, seconds) in enumerate(evaluation.evaluate(wanted), before + 1):
            scored = Scored(**vars(candidate), score=value, seconds=seconds)
            with held():  # whatever ends the sweep, what it leaves is whole and fits together
                journal.add(scored)
                best = leave()
            if search is not None:
                search.tell(candidate, value)
            listen(scored, best or scored, done, total)
        try:
            plot(journal.scored, [one.name for one in parents(recipe)], score.title, score.minimize, folder / PLOT)
        except ArcmergeError as error:  # without matplotlib everything else is still there
            warn(str(error))
    return best


def _unheard(sentence: str) -> None:
    """What there is to warn of was said before the parents were opened."""


def _wanted(
    candidates: Sequence[Candidate], search: Search | None, proposals: int, journal: Journal
) -> tuple[Iterable[Candidate], int, int]:
    """What is not scored yet; how many candidates are, and will be in the end."""
    different = {_key(one.parameters): one for one in candidates}
    known = {_key(one.parameters) for one in journal.scored}
    fresh = [one for key, one in different.items() if key not in known]
    before, total = len(different) - len(fresh), len(different) + proposals
    if search is None:
        return fresh, before, total
    proposed = min(sum(one.proposed for one in journal.scored), proposals)
    return chain(fresh, (search.ask() for _ in range(proposals - proposed))), before + proposed, total


def _key(parameters: Any) -> str:
    return json.dumps(parameters, sort_keys=True)
