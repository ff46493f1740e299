"""Memory: which global addresses a kernel may touch, and shared memory with those who wrote and read it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from .formats import Array
from .program import Fault


class _Region(NamedTuple):
    """Bytes of a tensor: runs of `run` bytes, `sizes` of them `strides` apart, the largest stride first."""

    name: str
    start: int
    end: int
    strides: tuple[int, ...]
    sizes: tuple[int, ...]
    run: int

    def holds(self, addresses: Array, width: int) -> Array:
        offsets = addresses - self.start
        inside = (offsets >= 0) & (addresses + width <= self.end)
        for stride, size in zip(self.strides, self.sizes, strict=True):
            inside &= offsets // stride < size
            offsets = offsets % stride
        return inside & (offsets + width <= self.run)


class GlobalMemory:
    """The bytes of the tensors where they lie in this process; all that lies between them is out of bounds."""

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        regions = [_region(name, tensor) for name, tensor in tensors if tensor.numel()]
        whole = sorted((region for region in regions if not region.strides), key=lambda region: region.start)
        self._regions = whole + [region for region in regions if region.strides]
        self._strided = self._regions[len(whole) :]
        self._starts = np.array([region.start for region in whole], np.int64)
        # Views of one tensor may overlap: how far the bytes go of all that start up to here.
        self._ends = np.maximum.accumulate(np.array([region.end for region in whole], np.int64))
        self._low = min((region.start for region in regions), default=0) // 64 * 64
        high = max((region.end for region in regions), default=64)
        self._views = {width: _window(self._low, high, width) for width in (1, 2, 4, 8)}

    def check(self, addresses: Array, width: int) -> None:
        """Fault, with its position in `addresses` for a lane, where one is misaligned or outside every tensor."""
        misaligned = addresses % width != 0
        if misaligned.any():
            position = int(misaligned.argmax())
            where = self._describe(int(addresses[position]))
            raise Fault(f"misaligned: {width} bytes at {where}", position)
        inside = self._inside(addresses, width)
        if not inside.all():
            position = int(inside.argmin())
            where = self._describe(int(addresses[position]))
            raise Fault(f"out of bounds, {int((~inside).sum())} lanes: {width} bytes at {where}", position)

    def load(self, addresses: Array, itemsize: int, element: int) -> Array:
        """The element with that index at addresses that were checked, as unsigned integers."""
        return self._views[itemsize][(addresses - self._low) // itemsize + element]

    def store(self, addresses: Array, itemsize: int, element: int, values: Array) -> None:
        self._views[itemsize][(addresses - self._low) // itemsize + element] = values

    def _inside(self, addresses: Array, width: int) -> Array:
        inside = np.zeros(addresses.shape, bool)
        if self._starts.size:
            nearest = np.searchsorted(self._starts, addresses, side="right") - 1
            inside = (nearest >= 0) & (addresses + width <= self._ends[nearest])
        for region in self._strided:
            if inside.all():
                break
            inside |= region.holds(addresses, width)
        return inside

    def _describe(self, address: int) -> str:
        if not self._regions:
            return f"{address:#x}, and there are no tensors"
        nearest = min(self._regions, key=lambda region: max(region.start - address, address - region.end, 0))
        return f"byte {address - nearest.start} of {nearest.name}, which has {nearest.end - nearest.start}"


def _region(name: str, tensor: torch.Tensor) -> _Region:
    run = tensor.element_size()
    strides: list[int] = []
    sizes: list[int] = []
    for elements, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        stride = elements * tensor.element_size()
        if size == 1 or stride == 0:
            continue
        if stride == run and not strides:
            run *= size
        else:
            strides.append(stride)
            sizes.append(size)
    start = tensor.data_ptr()
    end = start + run + sum(stride * (size - 1) for stride, size in zip(strides, sizes, strict=True))
    return _Region(name, start, end, tuple(reversed(strides)), tuple(reversed(sizes)), run)


class _Bytes:
    def __init__(self, low: int, high: int, width: int) -> None:
        self.__array_interface__ = {
            "data": (low, False),
            "shape": (-(-(high - low) // width),),
            "typestr": f"<u{width}",
            "version": 3,
        }


def _window(low: int, high: int, width: int) -> Array:
    """The memory of the process from `low` to `high`. Most of it may not exist: index only what was checked."""
    return np.asarray(_Bytes(low, high, width))


class _Copy(NamedTuple):
    """A cp.async under way: of lanes, to byte offsets, the data, and the number of the group of each lane."""

    lanes: Array
    offsets: Array
    data: Array
    groups: Array


_IN_FLIGHT = 255
_SEVERAL = 254


class SharedMemory:
    """The shared memory of all blocks of a machine, one after another.

    Every byte knows the warp that wrote it and the warp that read it since the last barrier of the block; another warp
    that comes to it before the next one may come too early on a GPU, and is a fault. cp.async lands when it is waited
    for, not before; reading a byte to which it is still under way is a fault.
    """

    def __init__(self, blocks: int, size: int, threads: int) -> None:
        self._size = size
        self._pitch = max(size + 15, 16) // 16 * 16
        self._bytes = np.empty(blocks * self._pitch, np.uint8)
        self._writer = np.empty_like(self._bytes)
        self._reader = np.empty_like(self._bytes)
        self._threads = threads
        lane = np.arange(blocks * threads)
        self._block = lane // threads * self._pitch
        # 1 to 32, in every byte of up to eight.
        self._tags = (lane % threads // 32 + 1).astype(np.uint64) * np.uint64(0x0101010101010101)
        self._group = np.zeros(lane.size, np.int64)
        self._copies: list[_Copy] = []
        self.reset()

    def reset(self) -> None:
        self._bytes.fill(0xFF)  # a NaN in every float
        self._writer.fill(0)
        self._reader.fill(0)
        self._group.fill(0)
        self._copies.clear()

    def offsets(self, addresses: Array, lanes: Array | slice, width: int) -> Array:
        """Addresses within the shared memory of the lanes' blocks to offsets for `load` and `store`."""
        bad = (addresses < 0) | (addresses + width > self._size) | (addresses % width != 0)
        if bad.any():
            position = int(bad.argmax())
            raise Fault(f"{width} bytes at {addresses[position]} of shared memory, which has {self._size}", position)
        return addresses + self._block[lanes]

    def load(self, offsets: Array, lanes: Array | slice, itemsize: int, element: int) -> Array:
        index = offsets // itemsize + element
        own = self._own(lanes, itemsize)
        self._refuse_others(self._writer, index, own, "read before a barrier after the write of another warp")
        readers = self._view(self._reader, itemsize)
        before = readers[index]
        readers[index] = own
        # Only one of the lanes that read a place has marked it.
        shared = (readers[index] != own) | ((before != 0) & (before != own))
        if shared.any():
            readers[index[shared]] = own.dtype.type(_spread(_SEVERAL, itemsize))
        return self._view(self._bytes, itemsize)[index]

    def store(self, offsets: Array, lanes: Array | slice, itemsize: int, element: int, values: Array) -> None:
        index = offsets // itemsize + element
        own = self._own(lanes, itemsize)
        self._refuse_others(self._reader, index, own, "written before a barrier after the read of another warp")
        self._view(self._writer, itemsize)[index] = own
        self._view(self._bytes, itemsize)[index] = values

    def read_atomically(self, offsets: Array, itemsize: int) -> Array:
        """Atomics of several warps may meet in any order."""
        return self._view(self._bytes, itemsize)[offsets // itemsize]

    def write_atomically(self, offsets: Array, itemsize: int, values: Array) -> None:
        self._view(self._bytes, itemsize)[offsets // itemsize] = values
        self._view(self._writer, itemsize)[offsets // itemsize] = _spread(_SEVERAL, itemsize)

    def start_copy(self, offsets: Array, lanes: Array, data: Array) -> None:
        """data: (lanes, bytes)."""
        targets = offsets[:, None] + np.arange(data.shape[1])
        own = self._own(lanes, 1)
        self._refuse_others(
            self._reader, targets.T, own, "written by cp.async before a barrier after the read of another"
        )
        self._writer[targets] = _IN_FLIGHT
        self._copies.append(_Copy(lanes, targets, data, self._group[lanes]))

    def commit(self, lanes: Array | slice) -> None:
        self._group[lanes] += 1

    def wait(self, active: Array, pending: int) -> None:
        """Land the copies of the lanes in `active` but those of the last `pending` groups."""
        kept = []
        for copy in self._copies:
            due = active[copy.lanes] & (copy.groups < self._group[copy.lanes] - pending)
            if due.any():
                targets = copy.offsets[due]
                self._bytes[targets] = copy.data[due]
                self._writer[targets] = self._own(copy.lanes[due], 1)[:, None]
            if not due.all():
                kept.append(_Copy(*(part[~due] for part in copy)))
        self._copies = kept

    def barrier(self, blocks: Array) -> None:
        """Blocks (indices) whose threads have all met."""
        self._reader.reshape(-1, self._pitch)[blocks] = 0
        writer = self._writer.reshape(-1, self._pitch)
        writer[blocks] = np.where(writer[blocks] == _IN_FLIGHT, np.uint8(_IN_FLIGHT), np.uint8(0))

    def _own(self, lanes: Array | slice, itemsize: int) -> Array:
        return self._tags[lanes].astype(f"u{itemsize}")

    def _view(self, values: Array, itemsize: int) -> Any:
        return values.view(f"u{itemsize}")

    def _refuse_others(self, tags: Array, index: Array, own: Array, what: str) -> None:
        found = self._view(tags, own.itemsize)[index]
        doubtful = (found != 0) & (found != own)
        if not doubtful.any():
            return
        # Some bytes may be the warp's own and others nobody's.
        pieces = found.reshape(*found.shape, 1).view(np.uint8)
        mine = (own & own.dtype.type(0xFF)).astype(np.uint8)[..., None]
        foreign = ((pieces != 0) & (pieces != mine)).any(axis=-1)
        if foreign.any():
            lane = int(foreign.reshape(-1, own.size).any(axis=0).argmax())
            if (pieces[foreign] == _IN_FLIGHT).any():
                what = "touched while a cp.async to it is under way: a wait is missing"
            raise Fault(f"shared memory {what}", lane)


def _spread(tag: int, itemsize: int) -> int:
    return int.from_bytes(bytes([tag] * itemsize), "little")
