"""Ctrl-C, SIGTERM and SIGHUP: a command ends at once with one sentence, but for blocks that finish or tidy up first.

Python itself raises KeyboardInterrupt between any two steps of the main thread. In an import or a destructor that is
lost or leaves a traceback; in `Thread.join` it makes Python take a living thread for one that has ended (bpo-45274),
and what it then computes while the interpreter is torn down ends by SIGABRT. So threads that work, and folders that
must be removed again, are waited for inside of `held`, where an interrupt is noted and asked for by `check`.
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

# Of the outermost `held`: the handlers that it stands in for, and the signals that came.
_before: dict[int, Any] = {}
_waiting: list[int] = []

_consequence = ""
_told = False
_folders: set[tuple[str, int]] = set()  # each with the process that made it


class Interrupted(KeyboardInterrupt):
    """Raised by `check`."""


def end_at_once(consequence: str) -> None:
    """From now on an interrupt ends this process, with its consequence in words and 128 + the number of the signal.

    For the main program alone. A signal that is ignored, as under nohup, stays so.
    """
    say(consequence)
    for number in _SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            signal.signal(number, _end)


def ignore() -> None:
    """From now on the process, which has done its work or is being ended, ends without being interrupted."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def say(consequence: str) -> None:
    """What an interrupt from now on means to the one who called the command."""
    global _consequence, _told
    _consequence, _told = consequence, False


def sentence(number: int = signal.SIGINT) -> str:
    """What is said of an interrupt."""
    what = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    return f"{what}; {_consequence}" if _consequence else what


def tell(complain: Callable[[str], object]) -> None:
    """Passes the sentence to `complain`; an interrupt that comes after it ends the process without another."""
    global _told
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    complain(sentence())
    _told = True
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def remove_at_end(folder: str) -> Callable[[], None]:
    """Lets an end at once remove a folder; the function that is returned forgets it again."""
    entry = folder, os.getpid()
    _folders.add(entry)
    return lambda: _folders.discard(entry)


@contextmanager
def held() -> Iterator[None]:
    """Lets interrupts wait for `check` or the end of the block. Only the main thread is ever interrupted."""
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
    """Inside of `held`, on the main thread: raises Interrupted if an interrupt waits.

    The signal is raised again at the end of the block, for whoever handled it before. A handler that somebody
    installed for a purpose of their own is called here instead, and decides.
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
    ignore()  # a second one would say the same again
    # Not by print, which may be what was interrupted. A progress bar may have hidden the cursor.
    with suppress(OSError):
        if not _told:
            os.write(2, (b"\n\x1b[?25h" if os.isatty(2) else b"") + f"arcmerge: {sentence(number)}\n".encode())
    for folder, process in _folders:
        if process == os.getpid():
            shutil.rmtree(folder, ignore_errors=True)
    os._exit(128 + number)
