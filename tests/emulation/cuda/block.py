"""Blocks: the memory of a fake device, and for each eight bytes of it the last accesses.

An access races with an earlier one if neither has happened before the other. The last write of a granule, and its last
read by each stream, are kept as ticks of streams, which the clock of the next access must have reached.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .fault import Fault

if TYPE_CHECKING:
    from .stream import Entry, Stream

# Neighbours that two streams may use at once are at least so many bytes apart.
GRANULE = 8
# What memory holds before anything is written to it: NaN in every format, and -1.
POISON = 0xFF
Places = slice | NDArray[np.int64]


class Access(NamedTuple):
    """Granules of a block that an operation reads or writes."""

    block: Block
    places: Places
    writes: bool


@dataclass(eq=False)
class Block:
    """Memory that the allocator hands out as a whole.

    Attributes:
        stream: the stream that was current at the allocation; its next allocation may get the block again.
        data: the bytes, uint8 on the CPU.
        lives: when the block was handed out and when it was returned, as numbers of events of the runtime.
        recorded: the ticks of other streams that must have passed before the block is handed out again.
        pool: of a graph, which keeps the block; None outside of captures.
    """

    stream: Stream
    data: Tensor
    lives: list[list[float]] = field(default_factory=list)
    recorded: dict[int, int] = field(default_factory=dict)
    pool: object = None

    def __post_init__(self) -> None:
        self.address = self.data.data_ptr()
        self.nbytes = self.data.numel()
        granules = self.nbytes // GRANULE
        self._writer = np.zeros(granules, np.int32), np.zeros(granules, np.int32)
        self._readers: dict[int, NDArray[np.int32]] = {}
        self._labels: dict[tuple[int, int], str] = {}

    def at(self, address: int, nbytes: int) -> slice:
        """The granules of some bytes."""
        return slice((address - self.address) // GRANULE, -(-(address + nbytes - self.address) // GRANULE))

    def lived(self, number: float) -> bool:
        """Whether the block was handed out at an event of the runtime."""
        return self.pool is not None or any(start <= number <= end for start, end in self.lives)

    def check(self, entry: Entry, access: Access, streams: int) -> None:
        """Raise Fault if an access races with an earlier one, then remember it."""
        if not self.lived(entry.number):
            raise Fault(f"{entry}: the memory was freed before")
        known, places = entry.clock.array(streams), access.places
        stream, tick = (part[places] for part in self._writer)
        self._refuse(entry, access, stream, tick, known, "written")
        if not access.writes:
            ticks = self._readers.setdefault(entry.stream.id, np.zeros(len(self._writer[0]), np.int32))
            ticks[places] = entry.tick
        else:
            for reader, ticks in self._readers.items():
                self._refuse(entry, access, np.int32(reader), ticks[places], known, "read")
            for part, value in zip(self._writer, (entry.stream.id, entry.tick), strict=True):
                part[places] = value
        self._labels[entry.stream.id, entry.tick] = str(entry)

    def _refuse(self, entry: Entry, access: Access, stream: Any, tick: Any, known: Any, verb: str) -> None:
        late = tick > known[stream]
        if late.any():
            where = int(np.flatnonzero(late)[0])
            other = int(np.broadcast_to(stream, late.shape)[where]), int(tick[where])
            raise Fault(
                f"{entry} {'writes' if access.writes else 'reads'} memory that was {verb} by "
                f"{self._labels.get(other, other)}, and no event or synchronization orders the two"
            )


class AddressSpace:
    """All blocks of all devices, by address."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._starts: list[int] = []
        self._blocks: list[Block] = []

    def add(self, block: Block) -> None:
        with self._lock:
            place = bisect_right(self._starts, block.address)
            self._starts.insert(place, block.address)
            self._blocks.insert(place, block)

    def find(self, address: int) -> Block | None:
        """The block that has an address."""
        with self._lock:
            place = bisect_right(self._starts, address) - 1
            block = self._blocks[place] if place >= 0 else None
        return block if block is not None and address < block.address + block.nbytes else None

    def blocks_of(self, device: torch.device) -> list[Block]:
        """All blocks of a device, in order."""
        with self._lock:
            return [block for block in self._blocks if block.stream.device == device]

    def access(self, tensor: Tensor, writes: bool) -> Iterator[Access]:
        """The access to all elements of a tensor on the CPU that lies in a block."""
        if not tensor.numel():
            return
        itemsize = tensor.element_size()
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        block = self.find(tensor.data_ptr())
        assert block is not None
        places: Places = block.at(tensor.data_ptr(), extent * itemsize)
        if extent > tensor.numel():
            elements = torch.arange(extent).as_strided(tensor.shape, tensor.stride()).flatten().numpy() * itemsize
            places = np.unique((elements + tensor.data_ptr() - block.address) // GRANULE)
        yield Access(block, places, writes)
