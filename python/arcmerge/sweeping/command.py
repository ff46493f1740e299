"""`arcmerge sweep`: its flags, and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from arcmerge.errors import ArcmergeError
from arcmerge.terminal import counted_bar, warn

if TYPE_CHECKING:
    from arcmerge.merging.recipe.recipe import Recipe
    from arcmerge.sweeping.candidates import Candidate
    from arcmerge.sweeping.journal import Scored
    from arcmerge.sweeping.optimizer import Optimize
    from arcmerge.sweeping.scores import Score

_DEFAULT = "0:1:0.1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="mergekit YAML file, or its text")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of the results (default: sweep-CONFIG)")

    score = parser.add_argument_group("what candidates are scored by, one of").add_mutually_exclusive_group(
        required=True
    )
    score.add_argument(
        "--text", metavar="FILE", type=Path, nargs="+", action="extend", help="perplexity on these texts"
    )
    score.add_argument("--tasks", metavar="FILE", type=Path, help="accuracy on questions: JSON lines, see the README")
    score.add_argument("--function", metavar="MODULE:NAME", help="a function of the model that returns a number")
    how = parser.add_argument_group("how they are scored")
    how.add_argument("--window", metavar="N", type=int, help="tokens of a window of text (default: as the model takes)")
    how.add_argument("--minimize", action="store_true", help="less is better; of --function, where more is by default")

    parser.add_argument(
        "--ray", action="store_true", help="on a Ray cluster: an actor for each GPU, or each --threads processors"
    )

    tried = parser.add_argument_group(f"what is tried, and both parents of a slerp (default: --t {_DEFAULT})")
    tried.add_argument("--t", metavar="VALUES", help="one t for the model: first:last:step, or numbers, as 0,0.3,1")
    tried.add_argument(
        "--curve", metavar="NAME=VALUES", action="append", default=[], help="a gradient over the layers; repeatable"
    )
    tried.add_argument(
        "--grid", metavar="FILTER=VALUES", action="append", default=[], help="t by filter, in all combinations"
    )
    tried.add_argument("--optimize", metavar="N", type=int, help="then N proposals for the numbers of t in CONFIG")
    tried.add_argument("--bounds", metavar="LOW:HIGH", help="of --optimize (0:1)")
    tried.add_argument("--sampler", choices=["cma", "tpe"], help="of --optimize (cma; tpe for a single number)")


def run(arguments: argparse.Namespace) -> str:
    """Carry out the command; returns what to say of it in the end."""
    from arcmerge.merging.recipe.recipe import is_text, load_recipe
    from arcmerge.sweeping.sweep import BEST, PLOT, sweep

    recipe = load_recipe(arguments.config)
    out = arguments.out or Path(f"sweep-{'recipe' if is_text(arguments.config) else Path(arguments.config).stem}")
    score = _score(arguments)
    with counted_bar(arguments.quiet, "scoring") as show:

        def listen(scored: Scored, best: Scored, done: int, total: int) -> None:
            show(
                f"{done} of {total}  {scored.name}: {scored.score:.6g}, {scored.seconds:.1f} s  "
                f"(best {best.name}: {best.score:.6g})",
                done,
                total,
            )

        best = sweep(
            arguments.config,
            _candidates(arguments, recipe),
            score,
            out,
            optimize=_optimize(arguments),
            device=arguments.device,
            numerics=arguments.numerics,
            threads=arguments.threads,
            ray=arguments.ray,
            listen=listen,
            warn=warn,
        )
    if best is None:
        raise ArcmergeError(f"no candidate has a score that is a number; see {out}/results.csv")
    return (
        f"best by {score.title}: {best.name}, {best.score:.6g}\n"
        f"its recipe: {out / BEST}; all: {out}/results.csv, results.json, {PLOT}"
    )


def _score(arguments: argparse.Namespace) -> Score:
    from arcmerge.sweeping import scores

    if arguments.text:
        return scores.Perplexity(scores.read_texts(arguments.text), arguments.window)
    if arguments.window is not None:
        raise ArcmergeError("--window is for --text; leave it out")
    if arguments.tasks:
        return scores.MultipleChoice(scores.read_questions(arguments.tasks))
    return scores.Function(arguments.function, arguments.minimize)


def _candidates(arguments: argparse.Namespace, recipe: Recipe) -> list[Candidate]:
    from arcmerge.sweeping import candidates

    named = arguments.curve or arguments.grid or arguments.optimize
    numbers = arguments.t or (None if named else _DEFAULT)
    return [
        *(candidates.of_numbers(candidates.read_values(numbers)) if numbers else []),
        *map(candidates.of_curve, arguments.curve),
        *(candidates.of_grid(arguments.grid, recipe) if arguments.grid else []),
        *candidates.parents(recipe),
    ]


def _optimize(arguments: argparse.Namespace) -> Optimize | None:
    from arcmerge.sweeping.optimizer import Optimize

    if arguments.optimize is None:
        if arguments.bounds or arguments.sampler:
            raise ArcmergeError("--bounds and --sampler are for --optimize; leave them out")
        return None
    if arguments.optimize < 1:
        raise ArcmergeError(f"--optimize must be a number of candidates from 1 up, got {arguments.optimize}")
    try:
        low, high = map(float, (arguments.bounds or "0:1").split(":"))
    except ValueError as error:
        raise ArcmergeError(f"--bounds must be low:high, as 0:1, got '{arguments.bounds}'") from error
    return Optimize(arguments.optimize, low, high, arguments.sampler)
