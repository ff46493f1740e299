"""The arguments of a sweep: what is tried, and what it is scored by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcmerge.errors import ArcmergeError
from arcmerge.merging.methods import registry
from arcmerge.merging.prepare import Prepared
from arcmerge.merging.recipe.changes import Key, changed_recipe
from arcmerge.merging.recipe.parameters import Rule
from arcmerge.merging.recipe.recipe import Recipe
from arcmerge.sweeping.optimizer import Optimize
from arcmerge.sweeping.scores import (
    Function,
    MeanScore,
    MultipleChoice,
    Perplexity,
    Score,
    Scoring,
    read_questions,
    read_texts,
)

if TYPE_CHECKING:
    from arcmerge.gemma2.model import Gemma2

DEFAULT_T = "0:1:0.1"

File = str | PathLike[str]
# The names of parameters; or a mapping of them to bounds, None for the default ones.
Vary = Sequence[str] | Mapping[str, tuple[float, float] | None]


def read_score(
    text: File | Sequence[File] | None,
    tasks: File | None,
    function: str | Callable[[Gemma2], float] | None,
    window: int | None,
    minimize: bool,
) -> Score:
    """The one score that is given."""
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


def read_also(texts: str | Sequence[str], window: int | None) -> list[Score]:
    """Other scores, from texts as "text:FILE", "tasks:FILE", "function:MODULE:NAME" and "minimize:MODULE:NAME"."""
    found: dict[str, Score] = {}
    for text in [texts] if isinstance(texts, str) else texts:
        kind, _, value = text.partition(":")
        if kind not in ("text", "tasks", "function", "minimize") or not value or text in found:
            raise ArcmergeError(
                f"'also' must be text:FILE, tasks:FILE, function:MODULE:NAME or minimize:MODULE:NAME, each once, got "
                f"{text!r:.80}"
            )
        given = {name: value if kind == name else None for name in ("text", "tasks", "function")}
        lower = kind == "minimize"
        given["function"] = value if lower else given["function"]
        score = read_score(**given, window=window if kind == "text" else None, minimize=lower)
        score.title = text
        found[text] = score
    return list(found.values())


def read_scoring(recipe: Recipe, score: Score, also: Sequence[Score], seeds: int | None, race: int | None) -> Scoring:
    """How the candidates are scored.

    Args:
        recipe: the recipe, whose seed is the first one.
        score: the score that decides.
        also: other scores.
        seeds: the number of seeds of each candidate; None for that of the recipe alone.
        race: the seed of the order of a race; None for no race.
    """
    if seeds is not None and (type(seeds) is not int or seeds < 2):
        raise ArcmergeError(f"'seeds' must be a number of seeds from 2 up, got {seeds!r:.80}; leave it out for one")
    if seeds and not registry.get(recipe.method).random:
        raise ArcmergeError(
            f"'seeds' must be given for a random method alone, got '{recipe.method}', which gives the same result for "
            "every seed; leave it out"
        )
    if race is not None and also:
        raise ArcmergeError(
            "'race' must be given with one score alone, got several, of which a stopped candidate may have the best of "
            "another; leave out race or also"
        )
    if race is not None and not isinstance(score, MeanScore):
        raise ArcmergeError(f"'race' must be given with text or tasks, got '{score.title}'")
    return Scoring([score, *also], range(recipe.seed, recipe.seed + seeds) if seeds else (), race)


def default_t(recipe: Recipe) -> str:
    """The values of t that are tried if nothing else is."""
    names = [parameter.name for parameter in registry.get(recipe.method).parameters]
    if "t" not in names:
        raise ArcmergeError(
            f"'grid' must be given for '{recipe.method}', which has no t, got no candidates; vary one of its "
            f"parameters ({', '.join(names) or 'none'})"
        )
    return DEFAULT_T


def read_optimize(
    count: int | None, vary: Vary, bounds: tuple[float, float] | None, sampler: str | None
) -> Optimize | None:
    """The settings of the optimizer; None for none."""
    if count is None:
        for name, value in (("vary", vary or None), ("bounds", bounds), ("sampler", sampler)):
            if value is not None:
                raise ArcmergeError(f"'{name}' must be given with optimize alone, got it without; leave it out")
        return None
    if type(count) is not int or count < 1:
        raise ArcmergeError(f"'optimize' must be a number of candidates from 1 up, got {count!r:.80}")
    named: Mapping[str, tuple[float, float] | None] = vary if isinstance(vary, Mapping) else dict.fromkeys(vary)
    return Optimize(count, {name: own or bounds or (0.0, 1.0) for name, own in (named or {"t": None}).items()}, sampler)


def check_candidate(prepared: Prepared, parameters: Mapping[str, Any]) -> None:
    """Raise ArcmergeError if the method refuses the parameters, or a filter matches no tensor."""
    jobs = prepared.with_recipe(changed_recipe(prepared.recipe, parameters)).plan.jobs
    for key in map(Key.read, parameters):
        if key.filter is not None and not any(
            Rule(key.filter, ()).matches(name)
            for job in jobs
            for name in (job.output.name, *(one.info.name for one in job.inputs))
        ):
            raise ArcmergeError(f"'{key}' must name a part of a tensor's name after the colon, got none that matches")
