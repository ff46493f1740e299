"""Slots: pinned memory, GPU memory and a stream for the pieces that a thread works on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

from arcmerge.dtypes import F32
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


class Staged(NamedTuple):
    """The same range of a slot in pinned memory and in GPU memory."""

    pinned: torch.Tensor
    gpu: torch.Tensor


class Slot:
    """Pinned memory, GPU memory of the same size, and a stream, for one batch of pieces at a time."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        import torch

        self.device = device
        cuda = device.type == "cuda"
        self._stream: torch.cuda.Stream | None = torch.cuda.Stream(device) if cuda else None
        self._pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=cuda)
        self._gpu = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._used = 0

    def stream(self) -> AbstractContextManager[object]:
        """A context in which torch uses the slot's stream."""
        import torch

        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def clear(self) -> None:
        """Wait for the slot's stream and free all memory."""
        if self._stream is not None:
            self._stream.synchronize()
        self._used = 0

    def allocate(self, count: int, dtype: torch.dtype) -> Staged:
        """The next `count` elements, at a multiple of 256 bytes."""
        start, nbytes = self._used, count * dtype.itemsize
        self._used += -(-nbytes // 256) * 256
        pinned, gpu = (memory[start : start + nbytes].view(dtype) for memory in (self._pinned, self._gpu))
        return Staged(pinned, gpu)


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
            slot.clear()
            self._free.put(slot)
