"""Shared memory, with those who wrote and read each byte of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .formats import Array
from .program import Fault


class _Copy(NamedTuple):
    """A cp.async under way: of lanes, to byte offsets, the data, and the number of the group of each lane."""

    lanes: Array
    offsets: Array
    data: Array
    groups: Array


_IN_FLIGHT = 255
_SEVERAL = 254
_EVERY_WARP = np.uint32(0xFFFFFFFF)
UNIT = 16  # bytes that matrix instructions read together


class SharedMemory:
    """The shared memory of all blocks of a machine, one after another.

    Every byte knows the warp that wrote it and the warp that read it since the last barrier of the block; another warp
    that comes to it before the next one may come too early on a GPU, and is a fault. cp.async lands when it is waited
    for, not before; reading a byte to which it is still under way is a fault.

    Products of warpgroups read bytes by the asynchronous proxy. They see a byte that anything else wrote only behind a
    fence.proxy.async: of the writer, or, behind a barrier, of any warp, with a further barrier for those who did not
    run it. While such a product is under way, a write to what it reads is a fault.
    """

    def __init__(self, blocks: int, size: int, threads: int, proxies: bool = False) -> None:
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
        # Which warps have no fence yet between the last write of a byte and what they do next: a bit a warp.
        self._unfenced = np.zeros(self._bytes.size if proxies else 0, np.uint32)
        self._held = np.zeros(self._bytes.size // UNIT, bool)
        self.reset()

    def reset(self) -> None:
        self._bytes.fill(0xFF)  # a NaN in every float
        self._writer.fill(0)
        self._reader.fill(0)
        self._group.fill(0)
        self._copies.clear()
        self._unfenced.fill(0)
        self._held.fill(False)

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
        self._refuse_held(offsets + element * itemsize)
        self._view(self._writer, itemsize)[index] = own
        self._view(self._bytes, itemsize)[index] = values
        self._leave_unfenced(offsets + element * itemsize, itemsize)

    def read_atomically(self, offsets: Array, itemsize: int) -> Array:
        """Atomics of several warps may meet in any order."""
        return self._view(self._bytes, itemsize)[offsets // itemsize]

    def write_atomically(self, offsets: Array, itemsize: int, values: Array) -> None:
        self._refuse_held(offsets)
        self._view(self._bytes, itemsize)[offsets // itemsize] = values
        self._view(self._writer, itemsize)[offsets // itemsize] = _spread(_SEVERAL, itemsize)
        self._leave_unfenced(offsets, itemsize)

    def start_copy(self, offsets: Array, lanes: Array, data: Array) -> None:
        """data: (lanes, bytes)."""
        targets = offsets[:, None] + np.arange(data.shape[1])
        own = self._own(lanes, 1)
        self._refuse_others(
            self._reader, targets.T, own, "written by cp.async before a barrier after the read of another"
        )
        self._refuse_held(offsets)
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
                self._leave_unfenced(targets[:, 0], targets.shape[1])
            if not due.all():
                kept.append(_Copy(*(part[~due] for part in copy)))
        self._copies = kept

    def expect_copy(self, offset: int, lane: int, size: int) -> None:
        """A bulk copy of a lane is under way to these bytes."""
        if offset % self._pitch + size > self._size:
            raise Fault(f"a bulk copy to beyond the {self._size} bytes of shared memory", lane)
        targets = np.arange(offset, offset + size)
        own = np.repeat(self._own(np.array([lane]), 1), size)
        what = "written by a bulk copy before a barrier after the read of another warp"
        self._refuse_others(self._reader, targets, own, what)
        self._refuse_held(targets)
        self._writer[targets] = _IN_FLIGHT

    def land_copy(self, offset: int, data: Array) -> None:
        """It has landed, for all who know that its barrier's phase is complete."""
        self._bytes[offset : offset + data.size] = data
        self._writer[offset : offset + data.size] = 0

    def meet(self, block: int, warps: Sequence[int]) -> None:
        """These warps are at a barrier together: all that a block still has."""
        self.barrier(np.array([block]))

    def barrier(self, blocks: Array) -> None:
        """Blocks (indices) whose threads have all met."""
        self._reader.reshape(-1, self._pitch)[blocks] = 0
        writer = self._writer.reshape(-1, self._pitch)
        writer[blocks] = np.where(writer[blocks] == _IN_FLIGHT, np.uint8(_IN_FLIGHT), np.uint8(0))
        if self._unfenced.size:
            unfenced = self._unfenced.reshape(-1, self._pitch)
            unfenced[blocks] = np.where(unfenced[blocks] == _EVERY_WARP, _EVERY_WARP, np.uint32(0))

    # The asynchronous proxy.

    def fence_proxy(self, active: Array) -> None:
        """fence.proxy.async by the lanes in `active`: for the bytes whose last write happened before it."""
        if not self._unfenced.size:
            return
        unfenced = self._unfenced.reshape(-1, self._pitch)
        for block, warps in enumerate(active.reshape(len(unfenced), -1, 32).any(axis=2)):
            bits = np.where(warps, np.uint32(1) << np.arange(warps.size, dtype=np.uint32), np.uint32(0))
            fenced = np.zeros(256, np.uint32)  # by the tag of the writer
            fenced[0] = np.bitwise_or.reduce(bits)
            fenced[1 : 1 + warps.size] = bits
            unfenced[block] &= ~fenced[self._writer.reshape(-1, self._pitch)[block]]

    def read_by_proxy(self, addresses: Array, first: Array, warps: int) -> tuple[Array, Array]:
        """The units at addresses [groups, count] that `warps` warps read together, from lane `first` of each on.

        Returns:
            The bytes [groups, count, UNIT], and the indices of the units for `hold`.
        """
        bad = (addresses < 0) | (addresses + UNIT > self._size)
        if bad.any():
            group = int(bad.any(axis=1).argmax())
            address = addresses[group][bad[group]][0]
            raise Fault(f"{UNIT} bytes at {address} of shared memory, which has {self._size}", int(first[group]))
        units = (addresses + self._block[first][:, None]) // UNIT
        writers = self._writer.reshape(-1, UNIT)[units]
        if writers.any():
            what = "by a product before a barrier after the write of a warp"
            if (writers == _IN_FLIGHT).any():
                what = "by a product while a cp.async to it is under way: a wait is missing"
            raise Fault(f"shared memory read {what}", int(first[writers.any(axis=(1, 2)).argmax()]))
        readers = (1 << warps) - 1 << first % self._threads // 32
        unfenced = (self._unfenced.reshape(-1, UNIT)[units] & readers.astype(np.uint32)[:, None, None]).any(axis=(1, 2))
        if unfenced.any():
            what = "shared memory read by a product without fence.proxy.async after its write"
            raise Fault(what, int(first[unfenced.argmax()]))
        return self._bytes.reshape(-1, UNIT)[units], units

    def hold(self, units: Array) -> None:
        """Refuse writes to units that a product reads."""
        self._held[units] = True

    def release(self, units: Array, first: int, warps: int) -> None:
        """The product is complete for those who waited; other warps may not know it before the next barrier."""
        self._held[units] = False
        self._reader.reshape(-1, UNIT)[units] = _SEVERAL

    def _refuse_held(self, offsets: Array) -> None:
        held = self._held[offsets // UNIT]
        if held.any():
            raise Fault(
                "shared memory written while a product reads it: a wgmma.wait_group is missing", int(held.argmax())
            )

    def _leave_unfenced(self, offsets: Array, width: int) -> None:
        if self._unfenced.size:
            self._unfenced[offsets[:, None] + np.arange(width)] = _EVERY_WARP

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
