"""A sweep: one residence of the parents, many candidates, each merged in place and scored where it lies."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arcmerge.errors import ArcmergeError
from arcmerge.merging.options import Options
from arcmerge.merging.prepared import Config, Warn, prepare
from arcmerge.merging.recipe import Recipe, load_recipe
from arcmerge.merging.resident import changed_recipe
from arcmerge.sweep.candidates import Candidate
from arcmerge.sweep.evaluation import Bench, Cluster, Here
from arcmerge.sweep.journal import Journal, Scored
from arcmerge.sweep.results import best_of, plot, write_tables
from arcmerge.sweep.scores import Score
from arcmerge.sweep.search import Search

JOURNAL, BEST, PLOT = "journal.jsonl", "best.yml", "scores.png"

# Told of every candidate as it was scored, of the best so far, and how many there were and will be.
Listen = Callable[[Scored, Scored, int, int], None]


@dataclass(frozen=True)
class Optimize:
    """Let an optimiser propose `count` candidates: see Search."""

    count: int
    low: float = 0.0
    high: float = 1.0
    sampler: str | None = None


def sweep(
    config: Config,
    candidates: Sequence[Candidate] | Optimize,
    score: Score,
    out: str | Path,
    *,
    device: str = "auto",
    numerics: str = "default",
    ray: bool = False,
    listen: Listen = lambda scored, best, done, total: None,
    warn: Warn = warnings.warn,
    **options: Any,
) -> Scored | None:
    """Score candidates of a merge and leave tables, a plot and the best recipe in the folder `out`.

    config: a merge configuration. candidates: what to try. ray: by a cluster, see Cluster. options: as of
    Gemma2.from_merge. A sweep that ended early goes on where it stood, by the journal in `out`.

    Returns the best, None if no candidate has a score. Raises ArcmergeError for what is wrong with any of this, before
    the first is scored where it can be known.
    """
    recipe, folder = load_recipe(config), Path(out)
    if not isinstance(candidates, Optimize):
        for candidate in candidates:
            changed_recipe(recipe, candidate.parameters)
    prepared = prepare(recipe.text, Options.of({**options, "device": device}), warn)
    parents = {str(one.folder.resolve()): one.fingerprint() for one in prepared.checkpoints.values()}
    folder.mkdir(parents=True, exist_ok=True)
    about = {"recipe": recipe.text, "score": score.identity, "parents": parents, "numerics": numerics}
    journal = Journal(folder / JOURNAL, about)
    search, wanted, before, total = _wanted(candidates, recipe, score, journal)
    bench = Bench(recipe.text, score, device, numerics, {**options, "warn": _unheard})
    try:
        evaluation = Cluster(bench) if ray else Here(bench)
        for done, (candidate, value, seconds) in enumerate(evaluation.evaluate(wanted), before + 1):
            scored = Scored(candidate.name, candidate.parameters, candidate.varied, value, seconds)
            journal.add(scored)
            if search is not None:
                search.tell(candidate, value)
            best = best_of(journal.scored, score.minimize) or scored
            if best is scored:
                text = changed_recipe(recipe, candidate.parameters).text
                (folder / BEST).write_text(text, encoding="utf-8")
            listen(scored, best, done, total)
    finally:  # also of what was scored before an error or an interrupt
        if journal.scored:
            write_tables(journal.scored, folder)
    try:
        plot(journal.scored, score.title, score.minimize, folder / PLOT)
    except ArcmergeError as error:  # without matplotlib everything else is still there
        warn(str(error))
    return best_of(journal.scored, score.minimize)


def _unheard(sentence: str) -> None:
    """What there is to warn of was said before the parents were opened."""


def _wanted(
    candidates: Sequence[Candidate] | Optimize, recipe: Recipe, score: Score, journal: Journal
) -> tuple[Search | None, Iterable[Candidate], int, int]:
    """The optimiser if there is one; the candidates that are not scored yet; how many were, and will be in the end."""
    if isinstance(candidates, Optimize):
        told, count = journal.scored, candidates.count
        search = Search(recipe, score.minimize, candidates.low, candidates.high, candidates.sampler, told)
        return search, (search.ask() for _ in range(count - len(told))), min(len(told), count), count
    different = {_key(one.parameters): one for one in candidates}
    known = {_key(one.parameters) for one in journal.scored}
    fresh = [one for key, one in different.items() if key not in known]
    return None, fresh, len(different) - len(fresh), len(different)


def _key(parameters: Any) -> str:
    return json.dumps(parameters, sort_keys=True)
