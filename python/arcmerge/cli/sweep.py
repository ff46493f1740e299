"""The command `arcmerge sweep`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from arcmerge.cli.flags import add_model_flags
from arcmerge.cli.terminal import counting_bar, print_warning
from arcmerge.errors import ArcmergeError

if TYPE_CHECKING:
    from arcmerge.sweeping.journal import Scored

NAME = "sweep"
SUMMARY = "score many candidates of a merge without writing any"
INTERRUPTED = "the scored candidates are kept, and the same command resumes the sweep"
EPILOG = """\
examples:
  arcmerge sweep recipe.yml --text validation.txt --t 0:1:0.1
  arcmerge sweep ties.yml --text validation.txt --grid density=0.2:0.8:0.2 --grid 'weight[1]=0.5,1'
  arcmerge sweep ties.yml --text validation.txt --optimize 40 --vary density=0.2:0.8 --vary 'weight[1]'
  arcmerge sweep dare.yml --text validation.txt --grid density=0.2:0.8:0.2 --seeds 5 --race
  arcmerge sweep recipe.yml --text code.txt --also text:prose.txt --optimize 40
  arcmerge merge sweep-recipe/best.yml merged/

Run the same command again to resume a sweep that was ended."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="mergekit YAML file, or its text")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of the results (default: sweep-CONFIG)")

    score = parser.add_argument_group("score, one of").add_mutually_exclusive_group(required=True)
    score.add_argument(
        "--text", metavar="FILE", type=Path, nargs="+", action="extend", help="perplexity on these text files"
    )
    score.add_argument("--tasks", metavar="FILE", type=Path, help="accuracy on questions, one JSON object per line")
    score.add_argument("--function", metavar="MODULE:NAME", help="a function of the model that returns a number")
    how = parser.add_argument_group("options of the score")
    how.add_argument(
        "--window", metavar="N", type=int, help="tokens in a window of --text (default: the model's maximum)"
    )
    how.add_argument("--minimize", action="store_true", help="a lower score of --function is better")

    how.add_argument(
        "--also",
        metavar="SCORE",
        action="append",
        default=[],
        help="another score: text:FILE, tasks:FILE, function:MODULE:NAME, or minimize:MODULE:NAME; repeatable",
    )
    how.add_argument("--seeds", metavar="K", type=int, help="score each candidate of a random method with K seeds")
    how.add_argument("--race", action="store_true", help="stop a candidate once it is worse than the best beyond doubt")
    how.add_argument("--race-seed", metavar="N", type=int, default=0, help="seed of the order in a race (default: 0)")

    parser.add_argument(
        "--ray", action="store_true", help="use a Ray cluster: one worker per GPU, or per --threads processors"
    )

    tried = parser.add_argument_group("candidates (default: --t 0:1:0.1); both parents of a slerp are scored too")
    tried.add_argument("--t", metavar="VALUES", help="t for the whole model: first:last:step, or values as 0,0.3,1")
    tried.add_argument(
        "--curve", metavar="NAME=VALUES", action="append", default=[], help="a gradient over the layers; repeatable"
    )
    tried.add_argument(
        "--grid",
        metavar="NAME=VALUES",
        action="append",
        default=[],
        help="a parameter, as density, weight[1] or t:self_attn; repeatable, in all combinations",
    )
    tried.add_argument("--optimize", metavar="N", type=int, help="N proposals of an optimizer")
    tried.add_argument(
        "--vary",
        metavar="NAME[=LOW:HIGH]",
        action="append",
        default=[],
        help="a parameter that --optimize varies, as in --grid; repeatable (default: t)",
    )
    tried.add_argument("--bounds", metavar="LOW:HIGH", help="bounds of --vary without its own (default: 0:1)")
    tried.add_argument(
        "--sampler",
        choices=["cma", "tpe", "nsga2"],
        help="optimizer (default: cma, tpe for one value, nsga2 with --also)",
    )
    add_model_flags(parser)


def run(arguments: argparse.Namespace) -> None:
    from arcmerge.merging.recipe.recipe import is_text
    from arcmerge.sweeping.sweep import sweep
    from arcmerge.threads import use_threads

    use_threads(arguments.threads)
    name = "recipe" if is_text(arguments.config) else Path(arguments.config).stem
    with counting_bar(arguments.quiet, "scoring") as show:

        def progress(scored: Scored, best: Scored, done: int, total: int) -> None:
            found = f"{scored.score:.6g}"
            if scored.stopped:
                found = f"about {found}, stopped after {scored.amount} {'tokens' if arguments.text else 'questions'}"
            spread = f" ± {scored.deviation:.2g}" if scored.by_seed else ""
            also = "".join(f", {score:.6g}" for score in scored.also)
            show(
                f"{done} of {total}  {scored.name}: {found}{spread}{also}, {scored.seconds:.1f} s  "
                f"(best {best.name}: {best.score:.6g})",
                done,
                total,
            )

        result = sweep(
            arguments.config,
            arguments.out or Path(f"sweep-{name}"),
            text=arguments.text,
            tasks=arguments.tasks,
            function=arguments.function,
            window=arguments.window,
            minimize=arguments.minimize,
            also=arguments.also,
            seeds=arguments.seeds,
            race=arguments.race,
            race_seed=arguments.race_seed,
            t=arguments.t,
            curves=_named(arguments.curve, "curve", "v=0,0.5,1,0.5,0"),
            grid=_named(arguments.grid, "grid", "density=0.2:0.8:0.2"),
            optimize=arguments.optimize,
            vary=_varied(arguments.vary),
            bounds=_bounds(arguments.bounds, "bounds"),
            sampler=arguments.sampler,
            device=arguments.device,
            numerics=arguments.numerics,
            threads=arguments.threads,
            ray=arguments.ray,
            progress=progress,
            warn=print_warning,
        )
    if result.best is None:
        raise ArcmergeError(
            f"'score' must be a number for one candidate at least, got NaN for all; see {result.folder}"
        )
    if not arguments.quiet:
        print(result)


def _named(texts: Sequence[str], flag: str, example: str) -> dict[str, str]:
    """{"v": "0,1"} from ["v=0,1"]."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or not name.strip() or name.strip() in found:
            raise ArcmergeError(f"'--{flag}' must be a name of its own and values, as {example}, got '{text}'")
        found[name.strip()] = values
    return found


def _varied(texts: Sequence[str]) -> dict[str, tuple[float, float] | None]:
    with_bounds = _named([text if "=" in text else f"{text}=" for text in texts], "vary", "density=0.2:0.8")
    return {name: _bounds(text, "vary") if text else None for name, text in with_bounds.items()}


def _bounds(text: str | None, flag: str) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = map(float, text.split(":"))
    except ValueError as error:
        raise ArcmergeError(f"'--{flag}' must be low:high as 0:1, got '{text}'") from error
    return low, high
