"""Threads that work on one thing and fail as one."""

from __future__ import annotations

import threading
from collections.abc import Callable

MOST_THREADS = 1024
"""More than any machine has a use for, and few enough to start."""


class Team:
    """Threads that take tasks until there are none left; the first failure stops them all and is raised by `join`."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.failure: BaseException | None = None
        self._threads: list[threading.Thread] = []

    def start(self, work: Callable[[], None], count: int) -> None:
        for _ in range(count):
            thread = threading.Thread(target=self._guarded, args=(work,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.stop(error)

    def stop(self, error: BaseException) -> None:
        with self.changed:
            self.failure = self.failure or error
            self.changed.notify_all()

    def join(self, tick: Callable[[], None]) -> None:
        """Wait for all threads, calling `tick` ten times a second."""
        try:
            for thread in self._threads:
                while thread.is_alive():
                    thread.join(0.1)
                    tick()
        except BaseException as error:  # an interrupt must not leave threads writing into a folder that is removed
            self.stop(error)
            for thread in self._threads:
                thread.join()
            raise
        if self.failure is not None:
            raise self.failure
