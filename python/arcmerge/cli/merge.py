"""The command `arcmerge merge`."""

from __future__ import annotations

import argparse
from pathlib import Path

from arcmerge.cli.flags import add_merge_flags, merge_options, shard_size
from arcmerge.cli.terminal import print_warning, progress_bar
from arcmerge.errors import ArcmergeError

NAME = "merge"
SUMMARY = "merge models with a mergekit configuration"
INTERRUPTED = "an older output is as it was"
EPILOG = """\
example:
  arcmerge merge recipe.yml merged/

The output folder appears when it is complete, or not at all."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    switch = argparse.BooleanOptionalAction
    parser.add_argument("config", metavar="CONFIG", help="mergekit YAML file, or its text")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the merged checkpoint")
    add_merge_flags(parser)
    parser.add_argument(
        "--out-shard-size", metavar="SIZE", type=shard_size, default="5B", help="maximum shard size, as 5B or 500M"
    )
    parser.add_argument("--allow-nonfinite", action=switch, default=False, help="allow NaN and infinity in weights")
    parser.add_argument("--copy-tokenizer", action=switch, default=True, help="copy the tokenizer of the base model")
    parser.add_argument("--write-model-card", action=switch, default=True, help="write README.md and the recipe")
    parser.add_argument("--safe-serialization", action=switch, default=True, help="must stay on: only safetensors")


def run(arguments: argparse.Namespace) -> None:
    from arcmerge.merging.merge import merge

    if not arguments.safe_serialization:
        raise ArcmergeError(
            "'--safe-serialization' must stay on, got --no-safe-serialization; pickle files can run code, leave it out"
        )
    with progress_bar(arguments.quiet, "merging") as progress:
        report = merge(
            arguments.config, arguments.out, progress=progress, warn=print_warning, **merge_options(arguments)
        )
    if not arguments.quiet:
        print(report)
