"""The caching allocator: memory that is returned is handed out again at once to the stream that it came from.

As torch's allocator does not wait for pending work, memory that another stream still uses must have been announced by
`Tensor.record_stream`. Handing out counts as a write by the current stream, so that a use on another stream needs an
event between the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .block import GRANULE, POISON, Access, Block

if TYPE_CHECKING:
    from .runtime import Runtime
    from .stream import Stream

# torch rounds sizes up to this.
_ROUND = 512


@dataclass(eq=False)
class Allocation:
    """Keeps a block handed out while a tensor, or a view of it, lives."""

    allocator: Allocator
    block: Block

    def __del__(self) -> None:
        self.allocator.free(self.block)


class Allocator:
    """The memory of one device."""

    def __init__(self, runtime: Runtime, index: int) -> None:
        self._runtime = runtime
        self._device = torch.device("cuda", index)
        self._free: list[Block] = []
        self.reserved = 0
        self.allocated = 0

    def allocate(self, nbytes: int) -> Allocation:
        """Memory for the current stream of the device."""
        runtime = self._runtime
        stream = runtime.current_stream(self._device)
        with runtime.lock:
            size = max(1, -(-nbytes // _ROUND)) * _ROUND
            capture = runtime.capture_of(stream)
            pool = None if capture is None else capture.graph.pool_handle
            old = self._cached(size, stream, pool)
            block = old or self._new(size, stream, pool)
            block.lives.append([runtime.next_number(), float("inf")])
            self.allocated += block.nbytes
            everything = Access(block, slice(0, block.nbytes // GRANULE), True)
            fill = (lambda: block.data.fill_(POISON)) if old else lambda: None
            runtime.enqueue(stream, "an allocation", fill, [everything])
            return Allocation(self, block)

    def free(self, block: Block) -> None:
        """Return a block; pending work of its own stream still uses it, as what follows there comes later."""
        with self._runtime.lock:
            block.lives[-1][1] = self._runtime.next_number()
            for stream in self._runtime.streams:
                if stream.id in block.recorded:
                    block.recorded[stream.id] = stream.ticks
            self.allocated -= block.nbytes
            self._free.append(block)

    def empty_cache(self) -> None:
        """Give cached blocks back to the device, which waits for it: the bytes exist as long as the runtime."""
        if any(block.pool is None for block in self._free):
            self._runtime.synchronize(self._device)
        self.reserved -= sum(block.nbytes for block in self._free if block.pool is None)
        self._free = [block for block in self._free if block.pool is not None]

    def _cached(self, size: int, stream: Stream, pool: object) -> Block | None:
        fitting = [
            block
            for block in self._free
            if size <= block.nbytes <= 2 * size
            and block.stream is stream
            and block.pool is pool
            and all(self._runtime.streams[other - 1].done >= tick for other, tick in block.recorded.items())
        ]
        if not fitting:
            return None
        block = min(reversed(fitting), key=lambda block: block.nbytes)
        self._free.remove(block)
        for other, tick in block.recorded.items():  # the allocator has seen their events
            self._runtime.host.join({other: tick})
        block.recorded.clear()
        return block

    def _new(self, size: int, stream: Stream, pool: object) -> Block:
        if self.reserved + size > self._runtime.memory:
            self.empty_cache()
        if self.reserved + size > self._runtime.memory:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size} bytes on {self._device}, which has "
                f"{self._runtime.memory} bytes, {self.reserved} of them in use"
            )
        self.reserved += size
        with torch.inference_mode(False):
            block = Block(stream, torch.full((size,), POISON, dtype=torch.uint8), pool=pool)
        self._runtime.space.add(block)
        return block
