"""The command `arcmerge`: its parser and its exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from arcmerge import __version__, interrupts
from arcmerge.cli import chat, completion, doctor, generate, inspect, merge, plan, sweep
from arcmerge.cli.terminal import print_error
from arcmerge.errors import ArcmergeError

COMMANDS = (merge, plan, inspect, sweep, generate, chat, doctor, completion)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _WrongCall(f"{message}; see '{self.prog} --help'")


class _WrongCall(Exception):
    """An argument that the parser does not accept."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 0, 1 for an error, 2 for a wrong call, 130 for an interrupt.
    """
    try:
        arguments = parser().parse_args(argv)
    except _WrongCall as error:
        print_error(str(error))
        return 2
    try:
        interrupts.say(arguments.interrupted)
        arguments.run(arguments)
        sys.stdout.flush()
    except ArcmergeError as error:
        if arguments.debug:
            raise
        for problem in error.problems:
            print_error(problem)
        return 1
    except KeyboardInterrupt:
        interrupts.tell(print_error)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has closed it
        sys.stderr.close()
    except OSError as error:
        if arguments.debug:
            raise
        print_error(f"{error.filename or 'the system'}: {error.strerror or error}")
        return 1
    except Exception as error:  # a bug: a user cannot do anything with its traceback
        if arguments.debug:
            raise
        print_error(f"unexpected {type(error).__name__}: {error}; please report it with the output of --debug")
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of all commands. Each sets `run`, a function of the arguments, and `interrupted`, a sentence."""
    top = _Parser(prog="arcmerge", description="Merge language models, compare them, and run the result.")
    top.add_argument("--version", action="version", version=f"arcmerge {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    for command in COMMANDS:
        own = commands.add_parser(
            command.NAME,
            help=command.SUMMARY,
            description=f"{command.SUMMARY[0].upper()}{command.SUMMARY[1:]}.",
            epilog=command.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        own.set_defaults(run=command.run, interrupted=command.INTERRUPTED)
        own.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.add_flags(own)
    return top


if __name__ == "__main__":
    sys.exit(main())
