"""Memory of the host: which ranges are pinned, and which a pending copy reads or writes.

The host reads and writes memory in ways that nothing can intercept. Writes under a pending copy are found by comparing
the bytes at the copy's start and end. A read before the copy has ended finds poison.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .fault import Fault

if TYPE_CHECKING:
    from .runtime import Runtime

# What the host finds where a copy has not arrived.
_NOT_YET = 0xA5


class _Pending(NamedTuple):
    """A copy that has not been executed."""

    start: int
    end: int
    before: NDArray[np.uint8]
    writes: bool


class HostMemory:
    """Pinned ranges and pending copies."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._pinned: dict[int, int] = {}
        self._of_torch: set[int] = set()
        self._pending: dict[int, _Pending] = {}
        self._storages: dict[int, StorageWeakRef] = {}

    def empty(self, nbytes: int) -> Tensor:
        """Pinned bytes. As torch's allocator does, a pending copy keeps them."""
        memory = np.empty(nbytes + 1, np.uint8)
        address = memory.ctypes.data
        self.register(address, nbytes + 1)
        self._of_torch.add(address)
        weakref.finalize(memory, self._forget, address)
        return torch.from_numpy(memory)[:nbytes]

    def pinned(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor in pinned memory."""
        with torch.inference_mode(False):
            copy = self.empty(tensor.numel() * tensor.element_size()).view(tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor)

    def _forget(self, address: int) -> None:
        del self._pinned[address]
        self._of_torch.remove(address)

    def register(self, address: int, nbytes: int) -> None:
        self._pinned[address] = nbytes

    def unregister(self, address: int) -> None:
        with self._runtime.lock:
            nbytes = self._pinned.pop(address)
            self._storages.pop(address, None)
            if any(each.start < address + nbytes and address < each.end for each in list(self._pending.values())):
                self._runtime.refuse("pinned memory is unregistered while a copy from or to it is pending")

    def finish(self) -> None:
        """Raise a fault if registered memory was freed."""
        if any(storage.expired() for storage in self._storages.values()):
            self._runtime.refuse("memory of the host was freed while it was registered")

    def is_pinned(self, tensor: Tensor) -> bool:
        return self._range_of(tensor) is not None

    def pending(self, tensor: Tensor, writes: bool) -> Callable[[], Tensor]:
        """Announce a copy from or to a pinned tensor; the result, called where the copy is executed, returns it."""
        held = self._held(tensor)
        found = _bytes(tensor)
        if writes:
            found.fill(_NOT_YET)
        copy = _Pending(tensor.data_ptr(), tensor.data_ptr() + found.nbytes, found.copy(), writes)
        self._pending[id(copy)] = copy

        def end() -> Tensor:
            self._pending.pop(id(copy), None)
            tensor = held()
            if not np.array_equal(_bytes(tensor), copy.before):
                raise Fault(f"the host wrote memory while a copy {'to' if writes else 'from'} it was pending")
            return tensor

        return end

    def _held(self, tensor: Tensor) -> Callable[[], Tensor]:
        """The tensor: kept, if torch has pinned its memory; else a fault, if nothing else has kept it."""
        start = self._range_of(tensor)
        assert start is not None
        if start in self._of_torch:
            return lambda: tensor
        self._storages[start] = storage = StorageWeakRef(tensor.untyped_storage())
        layout = tensor.storage_offset(), tensor.shape, tensor.stride()
        dtype = tensor.dtype

        def held() -> Tensor:
            if storage.expired():
                raise Fault("memory of the host was freed while a copy from or to it was pending")
            return torch.empty(0, dtype=dtype).set_(torch.UntypedStorage._new_with_weak_ptr(storage.cdata), *layout)

        return held

    def _range_of(self, tensor: Tensor) -> int | None:
        """The start of the pinned range that has all elements of a tensor."""
        start = tensor.data_ptr()
        end = start + tensor.numel() * tensor.element_size()
        ranges = list(self._pinned.items())
        return next((first for first, nbytes in ranges if first <= start and end <= first + nbytes), None)

    def memmove(self, stock: Callable[..., Any], target: Any, source: Any, count: int) -> Any:
        """ctypes.memmove, which may neither read what a copy writes nor write what a copy reads."""
        with self._runtime.lock:
            for pending in list(self._pending.values()):
                for address, writes in ((target, True), (source, False)):
                    overlaps = isinstance(address, int) and pending.start < address + count and address < pending.end
                    if overlaps and (writes or pending.writes):
                        verb = "written" if writes else "read"
                        self._runtime.refuse(f"host memory is {verb} while a copy from or to it is pending")
            return stock(target, source, count)


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    return tensor.detach().view(-1).view(torch.uint8).numpy()


def memmove_of(memory: HostMemory) -> Callable[..., Any]:
    """A replacement of ctypes.memmove."""
    stock = ctypes.memmove
    return lambda target, source, count: memory.memmove(stock, target, source, count)
