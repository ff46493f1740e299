"""Ctrl-C, SIGTERM and SIGHUP: a command ends at once with one sentence, except in blocks that must finish first.

Python raises KeyboardInterrupt between any two steps of the main thread. In an import or a destructor the exception is
lost or leaves a traceback. In `Thread.join` it makes Python believe that a running thread has ended (bpo-45274), and
the process ends by SIGABRT when that thread computes during the shutdown of the interpreter. So the code waits for
worker threads, and removes folders, inside of `held`, which records an interrupt until `check` asks for it.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

# The state of the outermost `held`: the handlers that it replaces, and the signals that arrived.
_before: dict[int, Any] = {}
_waiting: list[int] = []

_consequence = ""
_told = False
_folders: set[tuple[str, int]] = set()  # each with the process that made it


class Interrupted(KeyboardInterrupt):
    """Raised by `check`."""


def end_at_once(consequence: str) -> None:
    """Let an interrupt end this process with a sentence and the exit code 128 + the number of the signal.

    Only the main program may call this. A signal that is ignored, as under nohup, stays ignored.

    Args:
        consequence: the end of the sentence: what the interrupt leaves.
    """
    say(consequence)
    for number in _SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            signal.signal(number, _end)


def ignore() -> None:
    """Ignore interrupts, because the process has done its work or is ending."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def say(consequence: str) -> None:
    """Set the consequence that the sentence of an interrupt names from now on."""
    global _consequence, _told
    _consequence, _told = consequence, False


def sentence(number: int = signal.SIGINT) -> str:
    """The sentence about an interrupt."""
    what = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    return f"{what}; {_consequence}" if _consequence else what


def tell(complain: Callable[[str], object]) -> None:
    """Pass the sentence to `complain`. A later interrupt ends the process without another sentence."""
    global _told
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    complain(sentence())
    _told = True
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def remove_at_end(folder: str) -> Callable[[], None]:
    """Let an interrupt remove a folder. Returns a function that cancels this."""
    entry = folder, os.getpid()
    _folders.add(entry)
    return lambda: _folders.discard(entry)


@contextmanager
def held() -> Iterator[None]:
    """Delay interrupts until `check` or the end of the block. Only the main thread is interrupted."""
    if _before or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, None):
                _before[number] = handler
                signal.signal(number, _note)
        yield
    finally:
        before, waiting = dict(_before), list(_waiting)
        _before.clear()
        _waiting.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in waiting:
            signal.raise_signal(number)


def check() -> None:
    """Raise Interrupted if an interrupt waits. Call this inside of `held`, on the main thread.

    The signal is raised again at the end of the block, for its earlier handler. A handler that the user's program has
    installed is called here instead.
    """
    if not _waiting or threading.current_thread() is not threading.main_thread():
        return
    for number in list(_waiting):
        handler = _before[number]
        if handler in (_end, signal.default_int_handler, signal.SIG_DFL):
            raise Interrupted
        _waiting.remove(number)
        handler(number, None)


def _note(number: int, _: Any) -> None:
    if number not in _waiting:
        _waiting.append(number)


def _end(number: int, _: Any) -> NoReturn:
    ignore()  # a second interrupt would repeat the sentence
    # print is not safe here, because it may be the interrupted code. A progress bar may have hidden the cursor.
    with suppress(OSError):
        if not _told:
            os.write(2, (b"\n\x1b[?25h" if os.isatty(2) else b"") + f"arcmerge: {sentence(number)}\n".encode())
    for folder, process in _folders:
        if process == os.getpid():
            shutil.rmtree(folder, ignore_errors=True)
    os._exit(128 + number)
