"""A sweep: one residence of the parents, many candidates, each merged in place and scored where it lies."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arcmerge.gemma2.merged import MergedGemma2
from arcmerge.gemma2.model import Gemma2
from arcmerge.merging.prepared import Config, Warn
from arcmerge.merging.recipe import Recipe, load_recipe
from arcmerge.merging.resident import changed_recipe
from arcmerge.sweep.candidates import Candidate
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
    listen: Listen = lambda scored, best, done, total: None,
    warn: Warn = warnings.warn,
    **options: Any,
) -> Scored | None:
    """Score candidates of a merge and leave tables, a plot and the best recipe in the folder `out`.

    config: a merge configuration. candidates: what to try. options: as of Gemma2.from_merge.
    A sweep that ended early goes on where it stood, by the journal in `out`. Returns the best, None if no candidate has
    a score. Raises ArcmergeError for what is wrong with any of this, before the first is scored where it can be known.
    """
    recipe = load_recipe(config)
    folder = Path(out)
    planned = [] if isinstance(candidates, Optimize) else list(candidates)
    for candidate in planned:  # so that what is wrong with the last is said before the first is scored
        changed_recipe(recipe, candidate.parameters)
    model = Gemma2.from_merge(recipe.text, device, numerics, warn=warn, **options)
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(
        folder / JOURNAL,
        {"recipe": recipe.text, "score": score.identity, "parents": model.parents, "numerics": numerics},
    )
    try:
        if isinstance(candidates, Optimize):
            _optimize(candidates, recipe, model, score, journal, folder, listen)
        else:
            _try(planned, recipe, model, score, journal, folder, listen)
    finally:  # also of what was scored before an error or an interrupt
        if journal.scored:
            write_tables(journal.scored, folder)
    plot(journal.scored, score.title, score.minimize, folder / PLOT)
    return best_of(journal.scored, score.minimize)


def _try(
    candidates: Sequence[Candidate],
    recipe: Recipe,
    model: MergedGemma2,
    score: Score,
    journal: Journal,
    folder: Path,
    listen: Listen,
) -> None:
    known = {_key(one.parameters) for one in journal.scored}
    for done, candidate in enumerate(candidates, 1):
        if _key(candidate.parameters) not in known:
            known.add(_key(candidate.parameters))
            scored = _score(candidate, recipe, model, score, journal, folder)
            listen(scored, best_of(journal.scored, score.minimize) or scored, done, len(candidates))


def _optimize(
    wanted: Optimize,
    recipe: Recipe,
    model: MergedGemma2,
    score: Score,
    journal: Journal,
    folder: Path,
    listen: Listen,
) -> None:
    search = Search(recipe, score.minimize, wanted.low, wanted.high, wanted.sampler, journal.scored)
    while len(journal.scored) < wanted.count:
        scored = _score(search.ask(), recipe, model, score, journal, folder)
        search.tell(scored.score)
        listen(scored, best_of(journal.scored, score.minimize) or scored, len(journal.scored), wanted.count)


def _score(
    candidate: Candidate, recipe: Recipe, model: MergedGemma2, score: Score, journal: Journal, folder: Path
) -> Scored:
    started = time.monotonic()
    model.set_t(candidate.parameters)
    value = score(model)
    scored = Scored(candidate.name, candidate.parameters, candidate.varied, value, time.monotonic() - started)
    journal.add(scored)
    if best_of(journal.scored, score.minimize) is scored:
        (folder / BEST).write_text(changed_recipe(recipe, candidate.parameters).text, encoding="utf-8")
    return scored


def _key(parameters: Any) -> str:
    return json.dumps(parameters, sort_keys=True)
