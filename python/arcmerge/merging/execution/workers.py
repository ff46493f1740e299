"""Worker threads: the first exception, or an interrupt, stops all of them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import TypeVar

from arcmerge.interrupts import check, held
from arcmerge.merging.options import Progress

Work = Callable[[], None]
Task = TypeVar("Task")


class Workers:
    """Threads that run until their functions return; the first exception, or an interrupt, stops all of them.

    Attributes:
        changed: notified when a worker fails, and by workers for one another when shared state changes.
        failure: the exception that stopped the workers. A function must return once it is set.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.failure: BaseException | None = None
        self._running = 0
        self._ended = threading.Event()

    def run(self, report: Work, *functions: tuple[Work, int]) -> None:
        """Run functions on threads and wait until every thread has ended.

        Waiting for all of them, even after a failure, means that no thread writes to a folder that is being removed, or
        computes while the interpreter shuts down.

        Args:
            report: called on this thread ten times a second and once at the end.
            functions: each function and the number of threads that run it.

        Raises:
            BaseException: the first exception of a function or of `report`, or an interrupt.
        """
        with held():
            self._running = sum(count for _, count in functions)
            for function, count in functions:
                for _ in range(count):
                    self._start(function)
            ended = False
            while not ended:
                ended = not self._running or self._ended.wait(0.1)  # `report` is called once more after the end
                if self.failure is None:
                    try:
                        check()
                        report()
                    except BaseException as error:
                        self.stop(error)
            if self.failure is not None:
                raise self.failure

    def stop(self, error: BaseException) -> None:
        """Make `error` the failure, unless there is one already."""
        with self.changed:
            self.failure = self.failure or error
            self.changed.notify_all()

    def _start(self, function: Work) -> None:
        try:
            threading.Thread(target=self._guarded, args=(function,), daemon=True).start()
        except RuntimeError as error:  # the system allows no more threads
            self.stop(error)
            self._leave()

    def _guarded(self, function: Work) -> None:
        try:
            function()
        except BaseException as error:
            self.stop(error)
        finally:
            self._leave()

    def _leave(self) -> None:
        with self.changed:
            self._running -= 1
            if not self._running:
                self._ended.set()


def drain(
    tasks: Iterable[Task], do: Callable[[Task], None], nbytes: Callable[[Task], int], threads: int, progress: Progress
) -> None:
    """Do every task once, on several threads.

    Args:
        tasks: taken in this order, each by the next free thread.
        do: what to do with a task; called from all threads at once.
        nbytes: the size of a task, the unit of progress.
        threads: the number of threads; no more are started than there are tasks.
        progress: called on this thread ten times a second and once at the end.

    Raises:
        BaseException: the first exception of `do` or `progress`, or an interrupt. Tasks may be left undone then.
    """
    waiting = deque(tasks)
    total, done = sum(map(nbytes, waiting)), 0
    workers = Workers()

    def work() -> None:
        nonlocal done
        while workers.failure is None:
            try:
                task = waiting.popleft()
            except IndexError:
                return
            do(task)
            with workers.changed:
                done += nbytes(task)

    workers.run(lambda: progress(done, total), (work, min(threads, len(waiting))))
