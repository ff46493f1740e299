"""Input and output of the command. Results go to standard output, everything else to standard error."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from arcmerge.errors import ArcmergeError


def accept_any_text() -> None:
    """Accept every character and byte in the text of people.

    Standard input is read as UTF-8 in every locale. Standard output escapes the characters that its encoding lacks,
    as \\u2603.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def read_text() -> str:
    """Standard input without the line end that editors and `echo` add to it."""
    if sys.stdin is None:
        raise ArcmergeError("'standard input' must be open, got a closed one; give the prompt as an argument")
    return re.sub(r"\r?\n\Z", "", sys.stdin.read())


def print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2)
    print()


def print_piece(text: str) -> None:
    """A part of an answer, without a line end."""
    print(text, end="", flush=True)


def print_error(sentence: str) -> None:
    print(f"arcmerge: {printable(sentence)}", file=sys.stderr)


def print_note(sentence: str) -> None:
    print(f"arcmerge: note: {sentence}", file=sys.stderr)


def print_warning(sentence: str) -> None:
    print_error(f"warning: {sentence}")


def printable(text: str) -> str:
    """`text` in one line, with escapes for the control characters that names from a file may contain."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


@contextmanager
def progress_bar(quiet: bool, verb: str) -> Iterator[Any]:
    """A progress bar in bytes, with rate and remaining time. Yields None if standard error is no terminal."""
    if not _is_watched(quiet):
        yield None
        return
    from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

    with _bar(verb, DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as (_, update):
        yield update


@contextmanager
def counting_bar(quiet: bool, verb: str) -> Iterator[Any]:
    """A progress bar for items: yields a function of a line, the number of done items and the number of all.

    The lines are printed as notes. The bar below them shows the remaining time, if standard error is a terminal.
    """
    if not _is_watched(quiet):
        yield lambda line, done, total: None if quiet else print_note(line)
        return
    from rich.progress import MofNCompleteColumn, TimeRemainingColumn

    with _bar(verb, MofNCompleteColumn(), TimeRemainingColumn()) as (console, update):

        def show(line: str, done: int, total: int) -> None:
            console.print(f"arcmerge: note: {printable(line)}", markup=False, highlight=False)
            update(done, total)

        yield show


def _is_watched(quiet: bool) -> bool:
    return not quiet and sys.stderr is not None and sys.stderr.isatty()


@contextmanager
def _bar(verb: str, *columns: Any) -> Iterator[tuple[Any, Any]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True)
    with Progress(TextColumn(verb), BarColumn(), *columns, console=console, transient=True) as bar:
        task = bar.add_task(verb, total=None)
        yield bar.console, lambda done, total: bar.update(task, completed=done, total=total)
