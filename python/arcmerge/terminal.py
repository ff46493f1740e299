"""What the command reads from and says to the one who called it: on standard error, but for results."""

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
    """Let no character or byte end a command that reads and writes people's text.

    Standard input is UTF-8 whatever the locale says, and standard output spells what its encoding lacks, as \\u2603.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def read_text() -> str:
    """Standard input to its end, but for one line end there, which editors and `echo` put."""
    if sys.stdin is None:
        raise ArcmergeError("standard input is closed: give the prompt as an argument.")
    return re.sub(r"\r?\n\Z", "", sys.stdin.read())


def print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2)
    print()


def complain(sentence: str) -> None:
    print(f"arcmerge: {in_one_line(sentence)}", file=sys.stderr)


def note(sentence: str) -> None:
    print(f"arcmerge: note: {sentence}", file=sys.stderr)


def warn(sentence: str) -> None:
    complain(f"warning: {sentence}")


def in_one_line(text: str) -> str:
    """`text` with what names from strange files may do to a terminal spelt out: line ends, escapes, half characters."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


@contextmanager
def progress_bar(quiet: bool, verb: str) -> Iterator[Any]:
    """A progress bar in bytes with rate and time to go, on standard error; nothing where no one would see it move."""
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(verb), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def counted_bar(quiet: bool, verb: str) -> Iterator[Any]:
    """For things that are counted: a function of a line that stays, of how many are done, and of how many there are.

    The lines are notes; where someone watches, a bar below them shows the time to go.
    """
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        yield lambda line, done, total: None if quiet else note(line)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(verb, total=None)

        def show(line: str, done: int, total: int) -> None:
            bar.console.print(f"arcmerge: note: {in_one_line(line)}", markup=False, highlight=False)
            bar.update(task, completed=done, total=total)

        yield show
