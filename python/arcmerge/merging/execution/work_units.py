"""How a plan is cut into the units that threads take: stretches of tensors to sum, stretches of files to fill.

Both cuts depend on the plan alone, never on the number of threads, so the result has the same bits on any machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from arcmerge.checkpoint.layout import Shard
from arcmerge.merging.plan.tensor_job import Job

# 16 MB of a bf16 pair, about a millisecond of work: long against the cost of handing it out, short against a tensor.
GRAM_ELEMENTS = 1 << 22
# What one direct write takes. Larger ones gained nothing, writes of 2 MB took a tenth longer.
CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Piece:
    """Elements first .. first + count of the tensor of jobs[job]."""

    job: int
    first: int
    count: int


@dataclass(frozen=True)
class Chunk:
    """Bytes offset .. offset + nbytes of a shard: a part of its header, then pieces, each at its place in the chunk."""

    shard: int
    offset: int
    nbytes: int
    literal: bytes
    pieces: tuple[tuple[Piece, int], ...]


def gram_batches(jobs: Sequence[Job], order: Iterable[int]) -> Iterator[tuple[Piece, ...]]:
    """The Gram pass of the jobs in `order`, in batches of up to GRAM_ELEMENTS: many small tensors or a part of a large.

    A job whose vectors have matrices of their own is one piece, however large.
    """
    batch: list[Piece] = []
    room = GRAM_ELEMENTS
    for number in order:
        job = jobs[number]
        step = GRAM_ELEMENTS if job.along is None else job.count
        for first in range(0, job.count, step):
            piece = Piece(number, first, min(step, job.count - first))
            if batch and piece.count > room:
                yield tuple(batch)
                batch, room = [], GRAM_ELEMENTS
            batch.append(piece)
            room -= piece.count
    if batch:
        yield tuple(batch)


def file_chunks(shards: Sequence[Shard], numbers: dict[str, int]) -> Iterator[Chunk]:
    """All shards as chunks, in the order of the files. numbers: the job of each tensor name."""
    for position, shard in enumerate(shards):
        entries = iter(shard.entries)
        entry = next(entries, None)
        for offset in range(0, shard.nbytes, CHUNK_BYTES):
            end = min(offset + CHUNK_BYTES, shard.nbytes)
            pieces = []
            while entry is not None and entry.offset < end:
                itemsize = entry.tensor.dtype.itemsize
                start = max(entry.offset, offset)
                stop = min(entry.offset + entry.nbytes, end)
                if stop > start:
                    first, count = (start - entry.offset) // itemsize, (stop - start) // itemsize
                    pieces.append((Piece(numbers[entry.tensor.name], first, count), start - offset))
                if entry.offset + entry.nbytes > end:
                    break
                entry = next(entries, None)
            yield Chunk(position, offset, end - offset, shard.header[offset:end], tuple(pieces))
