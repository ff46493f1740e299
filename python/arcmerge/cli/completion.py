"""The command `arcmerge completion`."""

from __future__ import annotations

import argparse

from arcmerge.errors import needed

NAME = "completion"
SUMMARY = "print the completion script of a shell"
INTERRUPTED = "nothing was written"
EPILOG = """\
example:
  source <(arcmerge completion bash)                                        for this shell
  arcmerge completion bash > ~/.local/share/bash-completion/completions/arcmerge    for all to come"""

_FILES = {"CONFIG", "FILE", "OUT", "DIR", "MODEL", "A", "B"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=["bash", "zsh", "tcsh"])


def run(arguments: argparse.Namespace) -> None:
    from arcmerge.cli.command import parser

    with needed("shtab", by="arcmerge completion", extra="completion"):
        import shtab

    top = parser()
    for command in top._subparsers._group_actions[0].choices.values():  # type: ignore[union-attr]
        for action in command._actions:
            if action.metavar in _FILES:
                action.complete = shtab.FILE
    print(shtab.complete(top, arguments.shell))
