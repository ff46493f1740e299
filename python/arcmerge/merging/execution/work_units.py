"""The units of work that threads take: pieces of tensors and chunks of files.

Units depend on the plan alone, never on the number of threads, so that a merge has the same bits on every machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from arcmerge.checkpoint.layout import Shard

# 16 MB of two bf16 inputs take about a millisecond: long compared with taking a task, short compared with a tensor.
PIECE_ELEMENTS = 1 << 22
# The size of one direct write. Larger writes gained nothing; writes of 2 MB took a tenth longer.
CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Piece:
    """Elements first to first + count of the output tensor of jobs[job]."""

    job: int
    first: int
    count: int


@dataclass(frozen=True)
class Chunk:
    """Bytes offset to offset + nbytes of a shard.

    Attributes:
        shard: index of the shard.
        literal: the part of the shard's header that lies in the chunk, at its start.
        pieces: the pieces of tensors that follow, each with its offset in the chunk, in bytes.
    """

    shard: int
    offset: int
    nbytes: int
    literal: bytes
    pieces: tuple[tuple[Piece, int], ...]


def cut(job: int, count: int, row: int = 1) -> list[Piece]:
    """The `count` elements of a job's tensor as pieces of whole rows, as near to PIECE_ELEMENTS as rows allow."""
    step = max(PIECE_ELEMENTS // row, 1) * row
    return [Piece(job, first, min(step, count - first)) for first in range(0, count, step)]


def batches_of(pieces: Iterable[Piece]) -> Iterator[tuple[Piece, ...]]:
    """Pieces as batches of up to PIECE_ELEMENTS elements: many small tensors, or one piece of a large tensor."""
    batch: list[Piece] = []
    room = PIECE_ELEMENTS
    for piece in pieces:
        if batch and piece.count > room:
            yield tuple(batch)
            batch, room = [], PIECE_ELEMENTS
        batch.append(piece)
        room -= piece.count
    if batch:
        yield tuple(batch)


def file_chunks(shards: Sequence[Shard], job_of: dict[str, int]) -> Iterator[Chunk]:
    """The chunks of all shards, in the order of the files.

    Args:
        shards: the files to write.
        job_of: the index of the job of each tensor name.
    """
    for index, shard in enumerate(shards):
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
                    pieces.append((Piece(job_of[entry.tensor.name], first, count), start - offset))
                if entry.offset + entry.nbytes > end:
                    break
                entry = next(entries, None)
            yield Chunk(index, offset, end - offset, shard.header[offset:end], tuple(pieces))
