"""The statistics pass: takes the measures of all jobs and turns them into rules, by which the jobs are computed."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from math import prod
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from arcmerge.errors import ArcmergeError
from arcmerge.merging.execution.processor import Processor
from arcmerge.merging.execution.work_units import Piece, batches_of, cut
from arcmerge.merging.execution.workers import drain
from arcmerge.merging.methods.magnitudes import norms_of
from arcmerge.merging.methods.measure import Counts, Divergences, Gram, Histogram, Measure, Norms, Statistic
from arcmerge.merging.methods.rule import Rule
from arcmerge.merging.options import Progress
from arcmerge.merging.plan.tensor_job import Job

Key = TypeVar("Key", bound=Hashable)


class Known(Protocol):
    """Statistics of an earlier pass, which need not be measured again."""

    def get(self, job: Job, measure: Measure) -> Statistic | None:
        """What the measure found for this job; None if that is not known."""
        ...

    def add(self, job: Job, statistic: Statistic) -> None:
        """Keep a statistic of this job."""
        ...


class _Pending:
    """A measure of a job that is being taken."""

    def __init__(self, measure: Measure, pieces: Sequence[Piece]) -> None:
        self.measure = measure
        self.missing = len(pieces)
        self._shares: dict[int, NDArray[Any]] = {}
        self._total = np.zeros(0, np.int64)
        self._shape: tuple[int, ...] = ()
        self._counts: dict[int, Counts] = {}

    def add(self, first: int, share: NDArray[Any] | Counts) -> None:
        """Add the share of the piece that starts at element `first`."""
        self.missing -= 1
        if isinstance(share, Counts):  # of whole numbers, whose sum does not depend on the order
            if not self._shape:
                self._shape, self._total = share.shape, np.zeros(prod(share.shape), np.int64)
            self._total[share.index] += share.values
            if self.measure.together is None:
                self._counts[first] = share
        else:
            self._shares[first] = share

    def statistic(self) -> Statistic:
        """What the measure found, once no share is missing."""
        if isinstance(self.measure, Histogram):
            return Statistic(self.measure, Counts.of(self._total.reshape(self._shape)), self._counts)
        return joined(self.measure, [self._shares[first] for first in sorted(self._shares)])


class StatisticsPass:
    """The statistics of jobs and their rules, measured batch by batch.

    Args:
        jobs: all jobs of the plan.
        processor: computes the shares.
        order: indices of the jobs to measure, in this order.
        allow_nonfinite: accept NaN and infinity.
        pieces: the pieces in which a job (by index) will be computed; others are cut in the usual way. The order among
            equal magnitudes is known at the starts of these pieces.
        known: statistics of an earlier pass.

    Attributes:
        batches: the batches that are to be measured, in order. It grows when a job needs one more measure.
        grams: the finished Gram matrices by job index; those with one matrix per row or column are not kept.
        rules: by job index; from the start for jobs whose rules do not depend on weights.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        processor: Processor,
        order: Iterable[int],
        allow_nonfinite: bool,
        *,
        pieces: Mapping[int, Sequence[Piece]] | None = None,
        known: Known | None = None,
    ) -> None:
        self._jobs = jobs
        self._processor = processor
        self._allow_nonfinite = allow_nonfinite
        self._pieces = pieces or {}
        self._known = known
        self.grams: dict[int, NDArray[np.float64]] = {}
        self.rules: dict[int, Rule] = {}
        self.batches: deque[tuple[Piece, ...]] = deque()
        self._found: dict[int, list[Statistic]] = {}
        self._pending: dict[int, _Pending] = {}
        self._together: dict[int, Statistic | None] = {}
        self._measured: list[int] = []
        self._lock = threading.Lock()
        for index, job in enumerate(jobs):
            if job.constant is not None:
                self.rules[index] = job.constant
        order = [index for index in order if is_measured(jobs[index])]
        self._found.update((index, []) for index in order)
        self._queue([piece for index in order for piece in self._next(index)])

    def ready(self, job: int) -> bool:
        """Whether a job (by index) waits for no measure."""
        return job not in self._found

    def is_first(self, job: int) -> bool:
        """Whether the measure that a job (by index) waits for is its first."""
        return not self._found.get(job)

    def add(self, batch: Sequence[Piece]) -> None:
        """Measure some pieces. The last piece of a job completes the measure, and leads to the next one or to the rule.

        Raises:
            ArcmergeError: a job has NaN or infinity, or the method has no result for it.
        """
        requests = [(piece, self._pending[piece.job].measure) for piece in batch]
        for (piece, measure), share in zip(requests, self._processor.measure(requests), strict=True):
            if isinstance(measure, Histogram) and not isinstance(share, Counts):
                share = Counts.of(share)
            with self._lock:
                pending = self._pending[piece.job]
                pending.add(piece.first, share)
                if not pending.missing:
                    del self._pending[piece.job]
                    statistic = pending.statistic()
                    if self._known is not None:
                        self._known.add(self._jobs[piece.job], statistic)
                    self._queue(self._note(piece.job, statistic))

    def _note(self, index: int, statistic: Statistic) -> list[Piece]:
        """Note what a measure of a job has found; returns the pieces to measure next."""
        if not self._allow_nonfinite and not statistic.finite:
            raise self._processor.not_finite(index)
        if statistic.measure.together is not None:
            self._together[index] = statistic
            return []
        self._found[index].append(statistic)
        if isinstance(statistic.measure, Gram) and statistic.total.ndim == 2:
            self.grams[index] = statistic.total  # one matrix per row or column would fill memory; nothing reads them
        return self._next(index)

    def _next(self, index: int) -> list[Piece]:
        """The pieces of a job's next measure; none if it needs no more, or if its statistic is known or awaited."""
        job, found = self._jobs[index], self._found[index]
        measure = job.method.measure(found, job.values)
        if measure is None:
            self._measured.append(index)
            return []
        if measure.together is not None:
            self._together[index] = None
        if self._known is not None and (statistic := self._known.get(job, measure)) is not None:
            return self._note(index, statistic)
        pieces = pieces_of(job, index, measure, self._pieces.get(index))
        self._pending[index] = _Pending(measure, pieces)
        return pieces

    def _queue(self, pieces: list[Piece]) -> None:
        """Put pieces in front of all others: the sooner a job is complete, the sooner its statistics are freed.

        Jobs that need no more pieces get their rules.
        """
        while self._together and None not in self._together.values():
            found = {index: one for index, one in self._together.items() if one is not None}
            self._together = {}
            for index, total in added_up(found).items():
                self._found[index].append(total)
            pieces = [*pieces, *(piece for index in found for piece in self._next(index))]
        self.rules.update(rules_of(self._jobs, {index: self._found[index] for index in self._measured}))
        for index in self._measured:
            del self._found[index]  # from now on the job is ready, which other threads ask for
        self._measured.clear()
        self.batches.extendleft(reversed([*batches_of(pieces)]))


def joined(measure: Measure, shares: Sequence[NDArray[Any]]) -> Statistic:
    """What a measure other than a histogram found in all pieces, from their shares in order."""
    if isinstance(measure, Divergences):
        return Statistic(measure, np.concatenate(shares))
    total = functools.reduce(np.add, shares)
    return Statistic(measure, norms_of(total) if isinstance(measure, Norms) else total)


def is_measured(job: Job) -> bool:
    """Whether the rule of a job depends on weights."""
    return job.output.dtype.mergeable and job.constant is None and job.count > 0


def needs_gram(job: Job) -> bool:
    """Whether the rule of a job follows from the Gram matrix of its inputs."""
    return is_measured(job) and isinstance(job.method.measure((), job.values), Gram)


def rules_of(jobs: Sequence[Job], found: Mapping[int, Sequence[Statistic]]) -> dict[int, Rule]:
    """The rules of jobs (by index) from what their measures found; errors name the tensor.

    Pairs with the same parameters share a call: a formula takes as long for one Gram matrix as for many.
    """
    alike: dict[Hashable, list[int]] = {}
    for index, statistics in found.items():
        alike.setdefault(_formula_of(jobs[index], statistics) or index, []).append(index)
    rules: dict[int, Rule] = {}
    for indices in alike.values():
        if len(indices) > 1:
            first, grams = jobs[indices[0]], [found[index][0].total for index in indices]
            with suppress(ArcmergeError):  # which the loop below raises with the name of its tensor
                rules.update(zip(indices, first.method.all_coefficients(np.stack(grams), first.values), strict=True))
        for index in indices:
            if index not in rules:
                rules[index] = rule_of(jobs[index], found[index])
    return rules


def _formula_of(job: Job, found: Sequence[Statistic]) -> Hashable | None:
    """A key of the formula and its parameters, for rules that follow from the Gram matrix of a pair; else None."""
    # numpy chooses the order of longer sums by the layout of the whole array; that of two terms has one result.
    if not job.method.follows_gram or found[0].shape != (2, 2):
        return None
    # A plan has one mapping for all tensors with the same parameters.
    return id(job.method), job.values.count, job.values.base, id(job.values.shared), id(job.values.per_input)


def rule_of(job: Job, found: Sequence[Statistic]) -> Rule:
    """The rule of a job; errors name the tensor."""
    try:
        return job.method.rule(found, job.values)
    except ArcmergeError as error:
        raise ArcmergeError([f"{job.output.name}: {problem}" for problem in error.problems]) from error


def pieces_of(job: Job, index: int, measure: Measure, pieces: Sequence[Piece] | None) -> list[Piece]:
    """The pieces in which a measure of a job is taken. A histogram for cuts has counts before each of `pieces` too."""
    if isinstance(measure, Gram):
        return cut(index, job.count) if measure.dim is None else [Piece(index, 0, job.count)]
    if isinstance(measure, Divergences):
        return cut(index, job.count, job.row)
    if not isinstance(measure, Histogram) or measure.selection.random or not pieces:
        return cut(index, job.count)
    firsts = sorted({piece.first for piece in (*cut(index, job.count), *pieces)})
    return [Piece(index, first, last - first) for first, last in pairwise([*firsts, job.count])]


def added_up(statistics: Mapping[Key, Statistic]) -> dict[Key, Statistic]:
    """For each tensor the sum of the statistics of all tensors that it is measured together with."""
    totals: dict[Hashable, Statistic] = {}
    for one in statistics.values():
        # The shape differs between magnitudes that are rounded and others.
        before = totals.get(key := (one.measure.together, one.shape))
        totals[key] = one if before is None else Statistic(one.measure, before.total + one.total)
    return {key: totals[one.measure.together, one.shape] for key, one in statistics.items()}


def input_bytes(jobs: Sequence[Job], pieces: Iterable[Piece]) -> int:
    """The bytes of all inputs of `pieces`."""
    return sum(piece.count * sum(item.info.dtype.itemsize for item in jobs[piece.job].inputs) for piece in pieces)


def measure_all(work: StatisticsPass, jobs: Sequence[Job], threads: int, progress: Progress) -> None:
    """Take all measures of a pass.

    Args:
        work: the pass.
        jobs: all jobs of the plan.
        threads: the number of threads.
        progress: called with the bytes read and the bytes in total, once for each round of measures.
    """
    while True:
        batches = [*work.batches]
        work.batches.clear()
        drain(batches, work.add, lambda batch: input_bytes(jobs, batch), threads, progress)
        if not work.batches:
            return
