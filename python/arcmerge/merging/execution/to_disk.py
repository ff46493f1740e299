"""Runs the jobs of a plan into files: threads sum, merge and write at the same time.

    pieces of inputs -> statistics of a job -> rule                compute threads, while no buffer is free
    chunks of files  -> buffer of 4 MB, filled piece by piece      compute threads, as soon as a buffer is free
    filled buffers   -> file                                       writer threads

The disk is the slowest part, so compute threads fill buffers first and measure in the time that is left: the statistics
pass of the next tensors hides behind the writing of the last. Files are filled from their end, because the embedding,
usually the largest tensor, comes first in them and its long pass would leave the disk idle at the start.
Memory is bounded by the buffers. Mapped pages are released once the chunk that needed them is filled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from arcmerge.checkpoint.layout import Shard
from arcmerge.checkpoint.writer import ShardFile, address_of
from arcmerge.merging.execution.processor import FillTask, Processor
from arcmerge.merging.execution.statistics_pass import StatisticsPass, input_bytes, is_measured
from arcmerge.merging.execution.work_units import CHUNK_BYTES, Chunk, Piece, file_chunks
from arcmerge.merging.execution.workers import Workers
from arcmerge.merging.plan.tensor_job import Job

# Enough to keep the disk busy while both compute threads sum a piece.
BUFFERS = 24
# Writes in flight: 5.2 GB took 1.58 s with two, 1.45 s with four and 1.55 s with eight (medians of three).
WRITERS = 4


class DiskMerge:
    """Fills the shard files of a merge.

    Args:
        jobs: the jobs of the plan.
        shards: the layout of the files.
        files: the open file of each shard.
        processor: computes the statistics and the results.
        threads: the number of compute threads.
        allow_nonfinite: accept NaN and infinity.

    Attributes:
        statistics: the statistics and rules of all jobs.
        written: bytes written so far.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        shards: Sequence[Shard],
        files: Sequence[ShardFile],
        processor: Processor,
        *,
        threads: int,
        allow_nonfinite: bool,
    ) -> None:
        self._jobs = jobs
        self._files = files
        self._processor = processor
        self._threads = threads
        self._allow_nonfinite = allow_nonfinite
        self._chunks = deque(reversed(list(file_chunks(shards, {job.output.name: i for i, job in enumerate(jobs)}))))
        order = dict.fromkeys(piece.job for chunk in self._chunks for piece, _ in reversed(chunk.pieces))
        order.update(dict.fromkeys(range(len(jobs))))
        pieces: dict[int, list[Piece]] = {}
        for chunk in self._chunks:
            for piece, _ in chunk.pieces:
                pieces.setdefault(piece.job, []).append(piece)
        self.statistics = StatisticsPass(jobs, processor, order, allow_nonfinite, pieces=pieces)
        self._free = processor.buffers(BUFFERS, CHUNK_BYTES)
        self._filled: deque[tuple[Chunk, memoryview]] = deque()
        self._unwritten = len(self._chunks)
        self._ahead = 0  # bytes that were measured and not merged yet
        self._max_ahead = processor.ahead_bytes
        self.written = 0
        self._workers = Workers()

    def run(self, progress: Callable[[int], None]) -> None:
        """Do all the work; returns when every byte is durable.

        Args:
            progress: called now and then with the bytes written so far.

        Raises:
            ArcmergeError: a result is not finite, or a file cannot be written.
        """
        self._workers.run(lambda: progress(self.written), (self._compute, self._threads), (self._write, WRITERS))

    def _compute(self) -> None:
        while (task := self._next_task()) is not None:
            task()

    def _next_task(self) -> Callable[[], None] | None:
        """Fill a chunk if a buffer is free, else measure a batch; waits for either. None at the end."""
        with self._workers.changed:
            while self._workers.failure is None and (self._chunks or self.statistics.batches):
                if self._free and self._next_is_ready():
                    chunk = self._chunks.popleft()
                    self._ahead -= self._measured_bytes(piece for piece, _ in chunk.pieces)
                    return partial(self._fill, chunk, self._free.pop())
                if self.statistics.batches and self._may_run_ahead():
                    batch = self.statistics.batches.popleft()
                    # A second measure reads the same pages again.
                    self._ahead += self._measured_bytes(piece for piece in batch if self.statistics.is_first(piece.job))
                    return partial(self._measure, batch)
                self._workers.changed.wait()
        return None

    def _measure(self, batch: Sequence[Piece]) -> None:
        self.statistics.add(batch)
        with self._workers.changed:
            self._workers.changed.notify_all()

    def _next_is_ready(self) -> bool:
        return bool(self._chunks) and all(self.statistics.ready(piece.job) for piece, _ in self._chunks[0].pieces)

    def _may_run_ahead(self) -> bool:
        """If the statistics pass ran too far ahead, what it read would leave memory before it is merged."""
        return self._ahead < self._max_ahead or not self._next_is_ready()

    def _measured_bytes(self, pieces: Iterable[Piece]) -> int:
        return input_bytes(self._jobs, (piece for piece in pieces if is_measured(self._jobs[piece.job])))

    def _fill(self, chunk: Chunk, buffer: memoryview) -> None:
        buffer[: len(chunk.literal)] = chunk.literal
        start, rules = address_of(buffer), self.statistics.rules
        tasks = [FillTask(piece, rules.get(piece.job), start + offset) for piece, offset in chunk.pieces]
        for task, not_finite in zip(tasks, self._processor.fill(tasks), strict=True):
            if not_finite and not self._allow_nonfinite and not self._jobs[task.piece.job].setting:
                raise self._processor.not_finite(task.piece.job)
            self._forget(task.piece)
        with self._workers.changed:
            self._filled.append((chunk, buffer))
            self._workers.changed.notify_all()

    def _forget(self, piece: Piece) -> None:
        """Release the mapped pages of a piece's inputs."""
        job = self._jobs[piece.job]
        if job.vocabulary:  # the rows may lie anywhere in the inputs
            return
        for item in job.inputs:
            itemsize = item.info.dtype.itemsize
            item.checkpoint.forget(item.info.name, piece.first * itemsize, piece.count * itemsize)

    def _write(self) -> None:
        while True:
            with self._workers.changed:
                while not self._filled and self._unwritten and self._workers.failure is None:
                    self._workers.changed.wait()
                if not self._unwritten or self._workers.failure is not None:
                    return
                chunk, buffer = self._filled.popleft()
                self._unwritten -= 1
                if not self._unwritten:
                    self._workers.changed.notify_all()
            file = self._files[chunk.shard]
            if file.write(chunk.offset, buffer[: chunk.nbytes]):
                file.finish()
            with self._workers.changed:
                self.written += chunk.nbytes
                self._free.append(buffer)
                self._workers.changed.notify_all()
