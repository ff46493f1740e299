"""The command `arcmerge inspect`."""

from __future__ import annotations

import argparse

from arcmerge.cli.flags import add_merge_flags, merge_options, picture
from arcmerge.cli.terminal import print_json, print_note, progress_bar

NAME = "inspect"
SUMMARY = "compare two checkpoints: angle and norm ratio of every tensor"
INTERRUPTED = "nothing was written"
EPILOG = """\
example:
  arcmerge inspect model-a/ model-b/ --plot angles.png"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="folder or hub name")
    parser.add_argument("b", metavar="B", help="folder or hub name")
    parser.add_argument("--json", action="store_true", help="print every tensor as JSON")
    parser.add_argument("--plot", metavar="FILE", type=picture, help="draw the angles as a heat map, as angles.png")
    add_merge_flags(parser)


def run(arguments: argparse.Namespace) -> None:
    from arcmerge.merging.inspect import tables
    from arcmerge.merging.inspect.relations import as_json, pairs_of
    from arcmerge.merging.options import Options
    from arcmerge.merging.preview import preview

    options = Options.of({**merge_options(arguments), "allow_nonfinite": True})
    with progress_bar(arguments.quiet, "measuring") as progress:
        recipe = tables.pair_recipe(arguments.a, arguments.b)
        # The warnings would be about the result of a merge, which is not made.
        prepared, grams = preview(recipe, options, progress=progress, warn=lambda sentence: None)
    pairs = pairs_of(prepared.plan, grams)
    print_json(as_json(pairs)) if arguments.json else tables.inspect_table(arguments.a, arguments.b, pairs)
    if arguments.plot:
        from arcmerge.merging.inspect.plots import plot_angles

        plot_angles(pairs, arguments.plot)
        print_note(f"drew {arguments.plot}")
