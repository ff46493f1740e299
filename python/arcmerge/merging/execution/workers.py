"""Threads that work on one thing and fail as one."""

from __future__ import annotations

import threading
from collections.abc import Callable

from arcmerge.interrupts import check, held

MOST_THREADS = 1024
"""More than any machine has a use for, and few enough to start."""

Work = Callable[[], None]


class Workers:
    """Threads that take tasks until there are none left; the first failure, or an interrupt, stops them all.

    changed: to wait for what another thread does. failure: what stopped the team, at which its threads return.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.failure: BaseException | None = None
        self._working = 0
        self._ended = threading.Event()

    def run(self, tick: Work, *works: tuple[Work, int]) -> None:
        """Do each work by so many threads, calling `tick` ten times a second and at the end.

        Returns, or raises the first failure, when every thread has ended: none is left that writes to a folder which
        is removed, or computes while the interpreter ends.
        """
        with held():
            self._working = sum(count for _, count in works)
            for work, count in works:
                for _ in range(count):
                    self._start(work)
            ended = False
            while not ended:
                ended = not self._working or self._ended.wait(0.1)  # and once more when all is done
                if self.failure is None:
                    try:
                        check()
                        tick()
                    except BaseException as error:
                        self.stop(error)
            if self.failure is not None:
                raise self.failure

    def stop(self, error: BaseException) -> None:
        with self.changed:
            self.failure = self.failure or error
            self.changed.notify_all()

    def _start(self, work: Work) -> None:
        try:
            threading.Thread(target=self._guarded, args=(work,), daemon=True).start()
        except RuntimeError as error:  # the system gives no more threads
            self.stop(error)
            self._leave()

    def _guarded(self, work: Work) -> None:
        try:
            work()
        except BaseException as error:
            self.stop(error)
        finally:
            self._leave()

    def _leave(self) -> None:
        with self.changed:
            self._working -= 1
            if not self._working:
                self._ended.set()
