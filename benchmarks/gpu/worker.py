"""A process for jobs that may fail on a GPU.

An illegal memory access breaks the CUDA context of its process, and a kernel may never end. So jobs run in a separate
process, which keeps compiled kernels and data from job to job, and is replaced by a new one when a job failed.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class JobError(Exception):
    """The error of a job, in one line."""


class Worker:
    def __init__(self) -> None:
        self._process: multiprocessing.process.BaseProcess | None = None

    def run(self, job: Callable[..., Any], *arguments: object, seconds: float) -> Any:
        """The result of `job`, a function of a module; JobError if it raises, dies, or takes more than `seconds`."""
        if self._process is None:
            self._start()
        try:
            self._connection.send((job, arguments))
            if not self._connection.poll(seconds):
                self.stop()
                raise JobError(f"not done in {seconds:.0f} s")
            error, result = self._connection.recv()
        except (EOFError, OSError) as failure:
            raise JobError(f"the process died with exit code {self.stop()}") from failure
        if error:
            self.stop()
            raise JobError(error)
        return result

    def stop(self) -> int | None:
        """End the process if there is one; its exit code."""
        if self._process is None:
            return None
        self._process.join(1)  # one that is dying has an exit code of its own
        self._process.kill()
        self._process.join()
        code, self._process = self._process.exitcode, None
        return code

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a context of CUDA does not survive a fork
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other,), daemon=True)
        self._process.start()
        other.close()


def _serve(connection: Connection) -> None:
    while True:
        try:
            job, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((None, job(*arguments)))
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            connection.send((f"{text} ({last.filename.rpartition('/')[2]}:{last.lineno})", None))
