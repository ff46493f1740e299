"""Run the jobs of a plan: threads sum, mix and write at the same time.

    gram pieces      -> Gram matrix of a job -> coefficients       compute threads, while no buffer is free
    file chunks      -> buffer of 4 MB, filled piece by piece      compute threads, as soon as a buffer is free
    filled buffers   -> file                                       writer threads

The disk is the slowest part, so filling goes first and summing takes the time that is left: the Gram pass of the next
tensors hides behind the writing of the last. Files are filled from their end, because the largest tensor, the
embedding, comes first in them and its long Gram pass would leave the disk idle at the start.
Memory is bounded by the buffers; mapped pages are given back once the chunk that needed them is filled.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from arcmerge.checkpoint.layout import Shard
from arcmerge.checkpoint.writer import ShardFile, address_of, aligned_buffer
from arcmerge.merging.execution.gram_pass import Filling, GramPass, Processor, input_bytes, needs_gram
from arcmerge.merging.execution.work_units import CHUNK_BYTES, Chunk, Piece, file_chunks
from arcmerge.merging.execution.workers import Workers
from arcmerge.merging.plan.tensor_job import Job

# Enough to keep the disk busy while both threads sum a piece.
BUFFERS = 24
# Writes in flight: 1.58 s with two, 1.45 with four, 1.55 with eight (5.2 GB, medians of three).
WRITERS = 4


class DiskMerge:
    """Fills the shard files of a merge. `run` returns when every byte is durable."""

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
        numbers = {job.output.name: number for number, job in enumerate(jobs)}
        self._jobs = jobs
        self._files = files
        self._processor = processor
        self._threads = threads
        self._allow_nonfinite = allow_nonfinite
        self._chunks = deque(reversed(list(file_chunks(shards, numbers))))
        order = dict.fromkeys(piece.job for chunk in self._chunks for piece, _ in reversed(chunk.pieces))
        order.update(dict.fromkeys(range(len(jobs))))
        self.sums = GramPass(jobs, processor, list(order), allow_nonfinite)
        self._free = [aligned_buffer(CHUNK_BYTES) for _ in range(BUFFERS)]
        self._filled: deque[tuple[Chunk, memoryview]] = deque()
        self._unwritten = len(self._chunks)
        self._ahead = 0
        self._most_ahead = _memory_bytes() // 4
        self.written = 0
        self._team = Workers()

    def run(self, tick: Callable[[int], None]) -> None:
        """Do all the work. tick: called now and then with the bytes written so far."""
        self._team.run(lambda: tick(self.written), (self._compute, self._threads), (self._write, WRITERS))

    def _compute(self) -> None:
        while (task := self._next_task()) is not None:
            task()

    def _next_task(self) -> Callable[[], None] | None:
        """To fill a chunk if there is a buffer for it, else to sum some pieces; waits, and is None at the end."""
        with self._team.changed:
            while self._team.failure is None and (self._chunks or self.sums.waiting):
                if self._free and self._next_is_ready():
                    chunk = self._chunks.popleft()
                    self._ahead -= self._summed_bytes(piece for piece, _ in chunk.pieces)
                    return partial(self._fill, chunk, self._free.pop())
                if self.sums.waiting and self._may_run_ahead():
                    batch = self.sums.waiting.popleft()
                    self._ahead += self._summed_bytes(batch)
                    return partial(self._sum, batch)
                self._team.changed.wait()
        return None

    def _sum(self, batch: Sequence[Piece]) -> None:
        self.sums.add(batch)
        with self._team.changed:
            self._team.changed.notify_all()

    def _next_is_ready(self) -> bool:
        return bool(self._chunks) and all(self.sums.ready(piece.job) for piece, _ in self._chunks[0].pieces)

    def _may_run_ahead(self) -> bool:
        """Summing far ahead of filling would read pages that have left memory again by the time they are mixed."""
        return self._ahead < self._most_ahead or not self._next_is_ready()

    def _summed_bytes(self, pieces: Iterable[Piece]) -> int:
        return input_bytes(self._jobs, (piece for piece in pieces if needs_gram(self._jobs[piece.job])))

    def _fill(self, chunk: Chunk, buffer: memoryview) -> None:
        buffer[: len(chunk.literal)] = chunk.literal
        start = address_of(buffer)
        tasks = [Filling(piece, self.sums.coefficients.get(piece.job), start + place) for piece, place in chunk.pieces]
        for task, not_finite in zip(tasks, self._processor.fill(tasks), strict=True):
            if not_finite and not self._allow_nonfinite and not self._jobs[task.piece.job].setting:
                raise self._processor.not_finite(task.piece.job)
            self._forget(task.piece)
        with self._team.changed:
            self._filled.append((chunk, buffer))
            self._team.changed.notify_all()

    def _forget(self, piece: Piece) -> None:
        job = self._jobs[piece.job]
        if job.vocabulary:  # its rows come from anywhere
            return
        for item in job.inputs:
            itemsize = item.info.dtype.itemsize
            item.checkpoint.forget(item.info.name, piece.first * itemsize, piece.count * itemsize)

    def _write(self) -> None:
        while True:
            with self._team.changed:
                while not self._filled and self._unwritten and self._team.failure is None:
                    self._team.changed.wait()
                if not self._unwritten or self._team.failure is not None:
                    return
                chunk, buffer = self._filled.popleft()
                self._unwritten -= 1
                if not self._unwritten:
                    self._team.changed.notify_all()
            file = self._files[chunk.shard]
            if file.write(chunk.offset, buffer[: chunk.nbytes]):
                file.finish()
            with self._team.changed:
                self.written += chunk.nbytes
                self._free.append(buffer)
                self._team.changed.notify_all()


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
