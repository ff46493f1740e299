"""Global memory: which addresses a kernel may touch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

from .formats import Array
from .program import Fault


class _Region(NamedTuple):
    """Bytes of a tensor: runs of `run` bytes, `sizes` of them `strides` apart, the largest stride first."""

    name: str
    start: int
    end: int
    element: int
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

    def extents(self) -> list[tuple[int, int, int]]:
        """(start, end, bytes of the smallest element) of all memory that is reachable, in order, none overlapping."""
        merged: list[tuple[int, int, int]] = []
        for region in sorted(self._regions, key=lambda region: region.start):
            start, end, size = region.start, region.end, region.element
            if merged and start < merged[-1][1]:
                start, end, size = merged[-1][0], max(end, merged[-1][1]), min(size, merged[-1][2])
                merged.pop()
            merged.append((start, end, size))
        return merged

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
    return _Region(name, start, end, tensor.element_size(), tuple(reversed(strides)), tuple(reversed(sizes)), run)


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
