"""The command `arcmerge plan`."""

from __future__ import annotations

import argparse

from arcmerge.cli.flags import add_merge_flags, merge_options, picture
from arcmerge.cli.terminal import print_json, print_note, print_warning, progress_bar

NAME = "plan"
SUMMARY = "show the parameters of every tensor of a merge, without merging"
INTERRUPTED = "nothing was merged"
EPILOG = """\
example:
  arcmerge plan recipe.yml --plot curve.png"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="mergekit YAML file, or its text")
    parser.add_argument("--json", action="store_true", help="print every tensor as JSON")
    parser.add_argument("--plot", metavar="FILE", type=picture, help="draw the curve over the layers, as curve.png")
    add_merge_flags(parser)


def run(arguments: argparse.Namespace) -> None:
    from arcmerge.merging.inspect import tables
    from arcmerge.merging.options import Options
    from arcmerge.merging.preview import preview

    options = Options.of({**merge_options(arguments), "allow_nonfinite": True})
    with progress_bar(arguments.quiet, "measuring") as progress:
        prepared, grams = preview(arguments.config, options, progress=progress, warn=print_warning)
    rows = tables.plan_rows(prepared.plan, grams)
    print_json(rows) if arguments.json else tables.plan_table(prepared.plan, rows)
    if arguments.plot:
        from arcmerge.merging.inspect.plots import plot_curve

        plot_curve(rows, arguments.plot)
        print_note(f"drew {arguments.plot}")
