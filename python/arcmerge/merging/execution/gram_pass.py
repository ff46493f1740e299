"""The Gram pass: reads the inputs of all jobs once and computes their coefficients."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from arcmerge.errors import ArcmergeError
from arcmerge.merging.execution.processor import Processor
from arcmerge.merging.execution.work_units import Piece, gram_batches
from arcmerge.merging.execution.workers import drain
from arcmerge.merging.methods.method import Coefficients
from arcmerge.merging.options import Progress
from arcmerge.merging.plan.tensor_job import Job


@dataclass
class _Sum:
    """The unfinished Gram matrix of a job: the shares of its pieces, added in order once all are there."""

    shares: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    missing: int = 0

    def total(self) -> NDArray[np.float64]:
        total = np.zeros(())
        for first in sorted(self.shares):
            total = total + self.shares[first]
        return total


class GramPass:
    """The Gram matrices of jobs and their coefficients, summed batch by batch.

    Args:
        jobs: all jobs of the plan.
        processor: computes the shares.
        order: indices of the jobs to sum, in this order.
        allow_nonfinite: accept NaN and infinity.

    Attributes:
        batches: the batches that are to be summed, in order.
        grams: the finished matrices by job index; those with one matrix per row or column are not kept.
        coefficients: by job index; from the start for jobs whose coefficients do not depend on weights.
    """

    def __init__(self, jobs: Sequence[Job], processor: Processor, order: Sequence[int], allow_nonfinite: bool) -> None:
        self._jobs = jobs
        self._processor = processor
        self._allow_nonfinite = allow_nonfinite
        self.grams: dict[int, NDArray[np.float64]] = {}
        self.coefficients: dict[int, Coefficients] = {}
        self._sums: dict[int, _Sum] = {}
        self._lock = threading.Lock()
        for index, job in enumerate(jobs):
            if job.constant is not None:
                self.coefficients[index] = job.constant
        self.batches = deque(gram_batches(jobs, (index for index in order if needs_gram(jobs[index]))))
        for piece in (piece for batch in self.batches for piece in batch):
            self._sums.setdefault(piece.job, _Sum()).missing += 1

    def ready(self, job: int) -> bool:
        """Whether a job (by index) waits for no sums."""
        return job not in self._sums

    def add(self, batch: Sequence[Piece]) -> None:
        """Sum some pieces. The last piece of a job completes its matrix and its coefficients.

        Raises:
            ArcmergeError: a matrix has NaN or infinity, or the method has no result for it.
        """
        for piece, share in zip(batch, self._processor.gram(batch), strict=True):
            with self._lock:
                pending = self._sums[piece.job]
                pending.shares[piece.first] = share
                pending.missing -= 1
                complete = not pending.missing
            if complete:
                self._complete(piece.job, pending.total())

    def _complete(self, job: int, gram: NDArray[np.float64]) -> None:
        if not self._allow_nonfinite and not np.isfinite(gram).all():
            raise self._processor.not_finite(job)
        self.coefficients[job] = coefficients_of(self._jobs[job], gram)
        if gram.ndim == 2:  # one matrix per row or column would fill memory, and nothing reads them
            self.grams[job] = gram
        del self._sums[job]


def coefficients_of(job: Job, gram: NDArray[np.float64]) -> Coefficients:
    """The method's coefficients for the Gram matrix of a job's inputs; errors name the tensor."""
    try:
        return job.method.coefficients(gram, job.values)
    except ArcmergeError as error:
        raise ArcmergeError([f"{job.output.name}: {problem}" for problem in error.problems]) from error


def needs_gram(job: Job) -> bool:
    """Whether the coefficients of a job depend on the Gram matrix of its inputs."""
    return job.output.dtype.mergeable and job.constant is None and not job.method.elementwise and job.count > 0


def input_bytes(jobs: Sequence[Job], pieces: Iterable[Piece]) -> int:
    """The bytes of all inputs of `pieces`."""
    return sum(piece.count * sum(item.info.dtype.itemsize for item in jobs[piece.job].inputs) for piece in pieces)


def sum_grams(
    jobs: Sequence[Job],
    processor: Processor,
    order: Sequence[int],
    *,
    threads: int,
    allow_nonfinite: bool,
    progress: Progress,
) -> GramPass:
    """Do the whole Gram pass of some jobs.

    Args:
        jobs: all jobs of the plan.
        processor: computes the sums.
        order: indices of the jobs to sum, in this order.
        threads: the number of threads.
        allow_nonfinite: accept NaN and infinity.
        progress: called with the bytes read and the bytes in total.
    """
    grams = GramPass(jobs, processor, order, allow_nonfinite)
    drain(grams.batches, grams.add, lambda batch: input_bytes(jobs, batch), threads, progress)
    return grams
