"""The Gram pass: reads the inputs of jobs once and leaves each job's coefficients."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from arcmerge.errors import ArcmergeError
from arcmerge.merging.execution.work_units import Piece, gram_batches
from arcmerge.merging.execution.workers import Workers
from arcmerge.merging.methods.method import Coefficients
from arcmerge.merging.plan.tensor_job import Job


@dataclass(frozen=True)
class Filling:
    """A piece, the coefficients of its job (None for a copy and for elementwise methods), and where the result goes."""

    piece: Piece
    coefficients: Coefficients | None
    address: int


class Processor(Protocol):
    """Where the arithmetic happens: the CPU (host.py) or a GPU (device.py).

    gram: of each piece, its share of its job's Gram matrix, (k, k), or all of the job's matrices, (vectors, k, k).
    fill: write the result of each piece to its address; returns how many of its values are not finite.
    not_finite: the error to raise where a job met NaN or infinity.
    """

    def gram(self, pieces: Sequence[Piece]) -> list[NDArray[np.float64]]: ...
    def fill(self, tasks: Sequence[Filling]) -> list[int]: ...
    def not_finite(self, number: int) -> ArcmergeError: ...


@dataclass
class _Sum:
    """A job's Gram matrix in the making: the shares of its pieces, added in order when the last one is there."""

    shares: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    missing: int = 0

    def total(self) -> NDArray[np.float64]:
        total = np.zeros(())
        for first in sorted(self.shares):
            total = total + self.shares[first]
        return total


class GramPass:
    """The Gram matrices of jobs and the coefficients that follow from them, summed piece by piece."""

    def __init__(self, jobs: Sequence[Job], processor: Processor, order: Sequence[int], allow_nonfinite: bool) -> None:
        self._jobs = jobs
        self._processor = processor
        self._allow_nonfinite = allow_nonfinite
        self.grams: dict[int, NDArray[np.float64]] = {}
        self.coefficients: dict[int, Coefficients] = {}
        self._sums: dict[int, _Sum] = {}
        self._lock = threading.Lock()
        for number, job in enumerate(jobs):
            if job.constant is not None:
                self.coefficients[number] = job.constant
        self.waiting = deque(gram_batches(jobs, (number for number in order if needs_gram(jobs[number]))))
        for piece in (piece for batch in self.waiting for piece in batch):
            self._sums.setdefault(piece.job, _Sum()).missing += 1

    def ready(self, number: int) -> bool:
        return number not in self._sums

    def add(self, batch: Sequence[Piece]) -> None:
        """Sum some pieces; the last one of a job gives its coefficients."""
        for piece, share in zip(batch, self._processor.gram(batch), strict=True):
            with self._lock:
                pending = self._sums[piece.job]
                pending.shares[piece.first] = share
                pending.missing -= 1
                complete = not pending.missing
            if complete:
                self._conclude(piece.job, pending.total())

    def _conclude(self, number: int, gram: NDArray[np.float64]) -> None:
        if not self._allow_nonfinite and not np.isfinite(gram).all():
            raise self._processor.not_finite(number)
        self.coefficients[number] = coefficients_of(self._jobs[number], gram)
        if gram.ndim == 2:  # those of vectors would fill memory, and nothing reads them
            self.grams[number] = gram
        del self._sums[number]


def coefficients_of(job: Job, gram: NDArray[np.float64]) -> Coefficients:
    """The method's coefficients from a Gram matrix of the job's inputs; its errors name the tensor."""
    try:
        return job.method.coefficients(gram, job.values)
    except ArcmergeError as error:
        raise ArcmergeError([f"{job.output.name}: {problem}" for problem in error.problems]) from error


def needs_gram(job: Job) -> bool:
    return job.output.dtype.mergeable and job.constant is None and not job.method.elementwise and job.count > 0


def input_bytes(jobs: Sequence[Job], pieces: Iterable[Piece]) -> int:
    """Bytes that are read of the inputs of `pieces`."""
    return sum(piece.count * sum(item.info.dtype.itemsize for item in jobs[piece.job].inputs) for piece in pieces)


def sum_grams(
    jobs: Sequence[Job],
    processor: Processor,
    order: Sequence[int],
    *,
    threads: int,
    allow_nonfinite: bool,
    tick: Callable[[int, int], None],
) -> GramPass:
    """The Gram pass of those of the jobs that `order` numbers. tick: called with the bytes read so far, and of all."""
    grams = GramPass(jobs, processor, order, allow_nonfinite)
    total = sum(input_bytes(jobs, batch) for batch in grams.waiting)
    done = 0
    lock = threading.Lock()
    team = Workers()

    def work() -> None:
        nonlocal done
        while team.failure is None:
            try:
                batch = grams.waiting.popleft()
            except IndexError:
                return
            grams.add(batch)
            with lock:
                done += input_bytes(jobs, batch)

    team.run(lambda: tick(done, total), (work, threads))
    return grams
