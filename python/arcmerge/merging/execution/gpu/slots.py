"""Slots: pinned memory, GPU memory and a stream for the pieces that a thread works on. Pinned memory for results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from queue import SimpleQueue
from typing import TYPE_CHECKING

from arcmerge.checkpoint.writer import BLOCK
from arcmerge.dtypes import F32
from arcmerge.errors import ArcmergeError
from arcmerge.merging.execution.work_units import PIECE_ELEMENTS
from arcmerge.merging.plan.tensor_job import Job

if TYPE_CHECKING:
    import torch

# Four slots keep the bus busy in both directions. Each holds 64 MB of pinned memory or more.
_MAX_SLOTS = 4


def slot_count(threads: int) -> int:
    """The number of slots for so many threads."""
    return min(threads, _MAX_SLOTS)


def slot_bytes(jobs: Sequence[Job]) -> int:
    """The size of a slot: that of the largest piece with its inputs, and a margin for many small pieces in one slot."""
    widths = (sum(item.dtype.itemsize for item in job.inputs) + F32.itemsize for job in jobs)
    return (1 + max(widths, default=0)) * PIECE_ELEMENTS


@dataclass(frozen=True)
class Staged:
    """A range of a slot, `count` elements of `dtype` from byte `start` on, in pinned memory and in GPU memory."""

    slot: Slot
    start: int
    count: int
    dtype: torch.dtype

    @property
    def pinned(self) -> torch.Tensor:
        return self._part(self.slot.pinned)

    @property
    def gpu(self) -> torch.Tensor:
        return self._part(self.slot.gpu)

    def _part(self, memory: torch.Tensor) -> torch.Tensor:
        return memory[self.start : self.start + self.count * self.dtype.itemsize].view(self.dtype)


class Slot:
    """Pinned memory, GPU memory of the same size, and a stream, for one batch of pieces at a time.

    Each memory is allocated when it is used first: a copy of a parent needs no GPU memory of a slot, and a parent in
    pinned memory no pinned memory of a slot.
    """

    def __init__(self, device: torch.device, nbytes: int) -> None:
        import torch

        self.device = device
        self._torch = torch
        self._nbytes = nbytes
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._used = 0

    @cached_property
    def pinned(self) -> torch.Tensor:
        """The pinned memory, uint8 (nbytes,)."""
        return self._torch.empty(self._nbytes, dtype=self._torch.uint8, pin_memory=self._stream is not None)

    @cached_property
    def gpu(self) -> torch.Tensor:
        """The GPU memory, uint8 (nbytes,).

        It is allocated on the slot's stream: the allocator could give that of another stream while kernels of that
        stream still use it.
        """
        with self.stream():
            return self._torch.empty(self._nbytes, dtype=self._torch.uint8, device=self.device)

    def stream(self) -> AbstractContextManager[object]:
        """A context in which the slot's device and stream are torch's current ones."""
        return nullcontext() if self._stream is None else self._torch.cuda.stream(self._stream)

    def clear(self) -> None:
        """Wait for the slot's stream and free all memory."""
        if self._stream is not None:
            self._stream.synchronize()
        self._used = 0

    def allocate(self, count: int, dtype: torch.dtype) -> Staged:
        """The next `count` elements, at a multiple of 256 bytes. Raises ArcmergeError where the slot is full."""
        start, end = self._used, self._used + count * dtype.itemsize
        if end > self._nbytes:
            raise ArcmergeError(f"'pieces' must fit into a slot of {self._nbytes} bytes, got {end}; use --device cpu")
        self._used = -(-end // 256) * 256
        return Staged(self, start, count, dtype)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy on the slot's stream, between pinned memory and the slot's device; `clear` waits for it."""
        for tensor in (source, target):
            # A copy to another device would run on a stream of that one, for which `clear` does not wait.
            assert tensor.device in (self.device, self._torch.device("cpu")), (tensor.device, self.device)
        with self.stream():
            target.copy_(source, non_blocking=True)


class SlotPool:
    """`count` slots of `nbytes` bytes each; a thread waits if all are taken."""

    def __init__(self, device: torch.device, nbytes: int, count: int) -> None:
        self._free: SimpleQueue[Slot] = SimpleQueue()
        for _ in range(count):
            self._free.put(Slot(device, nbytes))

    @contextmanager
    def take(self) -> Iterator[Slot]:
        """A slot, with its stream in use; at the end of the block the stream is waited for and the slot freed."""
        slot = self._free.get()
        try:
            with slot.stream():
                yield slot
        finally:
            try:
                slot.clear()
            finally:
                self._free.put(slot)  # also after an error of the GPU, or other threads would wait for ever


class ResultBuffers:
    """Buffers that start at pages, to which the GPU copies results and from which files are written.

    Args:
        count: the number of buffers.
        nbytes: the size of each, whole pages.
        pinned: whether a GPU copies to them.

    Attributes:
        views: the buffers.
    """

    def __init__(self, count: int, nbytes: int, *, pinned: bool) -> None:
        import torch

        # torch rounds the size of an allocation up to a power of two, so that one is better than many.
        # Threads outside of the caller's inference mode may not write to tensors of that mode.
        with torch.inference_mode(False):
            memory = torch.empty(count * nbytes + BLOCK, dtype=torch.uint8, pin_memory=pinned)
            start = -memory.data_ptr() % BLOCK
            self._memory = memory[start : start + count * nbytes]
        self.views = [memoryview(each.numpy()) for each in self._memory.split(nbytes)]

    def at(self, address: int, nbytes: int) -> torch.Tensor:
        """The bytes at an address in one of the buffers, uint8 (nbytes,)."""
        start = address - self._memory.data_ptr()
        assert 0 <= start <= len(self._memory) - nbytes, "results must go to a buffer of this processor"
        return self._memory[start : start + nbytes]
