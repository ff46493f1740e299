"""The command `arcmerge chat`."""

from __future__ import annotations

import argparse
from functools import partial

from arcmerge.cli.generate import add_generation_flags, load, options, print_answer, well_formed
from arcmerge.cli.terminal import accept_any_text, print_error, print_note, print_piece
from arcmerge.errors import ArcmergeError

NAME = "chat"
SUMMARY = "chat with an instruction-tuned Gemma-2 model"
INTERRUPTED = "the conversation is over"
EPILOG = """\
example:
  arcmerge chat merged/

The defaults are those of the model's generation_config.json, or else those in brackets."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or hub name")
    add_generation_flags(parser)


def run(arguments: argparse.Namespace) -> None:
    from arcmerge.gemma2.generation.chat import Chat

    accept_any_text()
    model = load(arguments)
    chat = Chat(model, **options(arguments))
    if not arguments.quiet:
        print_note("Ctrl-D ends the chat; /new starts a new conversation")
    while True:
        try:
            line = well_formed(input("> ")).strip()
        except EOFError:
            print()
            return
        if line == "/new":
            chat.reset()
        elif line:
            try:
                print_answer(arguments, model, partial(chat.say, line, stream=print_piece))
            except ArcmergeError as error:  # this turn failed; the conversation continues without it
                for problem in error.problems:
                    print_error(problem)
