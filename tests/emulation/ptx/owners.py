"""Which warp wrote and read each element of global memory last, and what other warps know of it.

Warps are ordered by clocks, as in FastTrack (Flanagan and Freund, PLDI 2009). A warp counts its barriers and releases;
an access carries that count. Another warp may touch the element when it knows the count: by a barrier of its block, or
because it acquired what that warp, or one that knows it, released. Any other access is a fault, in whatever order the
blocks happen to run here.

A release is an atomic or a store with .release or .acq_rel, or a relaxed one after a fence; an acquire accordingly. Of
several readers of an element only the last is known. Atomics do not exclude each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .formats import Array
from .program import Fault

# Bits of a tag: whether the access was an atomic, the count of the warp, its number plus one.
_COUNT, _WARP = 1, 32


class Owners:
    """The elements of `extents`: (first address, end, bytes of an element). warps: of all blocks that will run."""

    def __init__(self, extents: Sequence[tuple[int, int, int]], warps: int, lanes: int) -> None:
        self._starts = np.array([start for start, _, _ in extents], np.int64)
        self._sizes = np.array([size for _, _, size in extents], np.int64)
        elements = np.array([-(-(end - start) // size) for start, end, size in extents], np.int64)
        self._first = np.concatenate([[0], np.cumsum(elements)]).astype(np.int64)
        # Zeros take no memory before they are written to.
        self._writer, self._reader = (np.zeros(self._first[-1], np.int64) for _ in range(2))
        running = lanes // 32
        self._number = np.zeros(running, np.int64)  # of each running warp among `warps`
        self._count = np.ones(running, np.int64)
        self._known = np.zeros((running, warps), np.int64)
        # What was released to an address; what fences released and could acquire.
        self._released: dict[int, Array] = {}
        self._fenced: dict[int, Array] = {}
        self._seen: dict[int, Array] = {}
        self._acquired = False

    def start(self, numbers: Array) -> None:
        """Other blocks run now; numbers: of their warps, fewer than before at the end of a grid."""
        self._number[: numbers.size] = numbers
        self._count.fill(1)
        self._known.fill(0)
        self._fenced.clear()
        self._seen.clear()
        self._acquired = False

    def barrier(self, warps: slice) -> None:
        """All warps of a block meet."""
        numbers = self._number[warps]
        own = slice(int(numbers[0]), int(numbers[-1]) + 1)
        columns = slice(None) if self._acquired else own
        self._known[warps, columns] = self._known[warps, columns].max(axis=0)
        self._known[warps, own] = self._count[warps]
        self._count[warps] += 1

    def read(self, addresses: Array, lanes: Array, width: int) -> None:
        elements = self._elements(addresses, width)
        self._refuse(self._writer[elements], lanes, "read", "written")
        self._reader[elements] = self._tags(lanes)[:, None]

    def read_constant(self, addresses: Array, lanes: Array, width: int) -> None:
        """By a load with .nc, which may find what a cache kept from before the launch, whoever wrote since then."""
        written = self._writer[self._elements(addresses, width)].any(axis=1)
        if written.any():
            raise Fault(
                "global memory read as a constant, with .nc, that the launch has written", int(written.argmax())
            )
        self.read(addresses, lanes, width)

    def write(self, addresses: Array, lanes: Array, width: int) -> None:
        elements = self._elements(addresses, width)
        self._refuse(self._writer[elements], lanes, "written", "written")
        self._refuse(self._reader[elements], lanes, "written", "read")
        tags = self._tags(lanes)[:, None]
        self._writer[elements] = tags
        lost = (self._writer[elements] != tags).any(axis=1)
        if lost.any():
            raise Fault("global memory written by two warps at once", int(lost.argmax()))

    def update(self, addresses: Array, lanes: Array, width: int) -> None:
        """By atomics, and by loads and stores that are as strong: these do not exclude each other."""
        elements = self._elements(addresses, width)
        writers = self._writer[elements]
        self._refuse(np.where(writers & 1, 0, writers), lanes, "updated", "written")
        self._refuse(self._reader[elements], lanes, "updated", "read")
        self._writer[elements] = (self._tags(lanes) | 1)[:, None]

    def synchronise(self, addresses: Array, lanes: Array, acquires: bool, releases: bool) -> None:
        """By atomics, and loads and stores that are as strong, warp after warp."""
        if not (releases or self._released or self._fenced):
            return
        pairs = np.unique(np.stack([lanes // 32, addresses], axis=1), axis=0)
        for warp, address in pairs.tolist():
            released = self._released.get(address)
            if released is not None:
                if acquires:
                    self._learn(warp, released)
                else:
                    self._seen[warp] = np.maximum(released, self._seen.get(warp, 0))
            if releases:
                self._publish(address, self._knowledge(warp))
                self._count[warp] += 1
            elif warp in self._fenced:
                self._publish(address, self._fenced[warp])

    def fence(self, lanes: Array) -> None:
        for warp in np.unique(lanes // 32).tolist():
            if warp in self._seen:
                self._learn(warp, self._seen.pop(warp))
            self._fenced[warp] = self._knowledge(warp)
            self._count[warp] += 1

    def _learn(self, warp: int, counts: Array) -> None:
        self._known[warp] = np.maximum(self._known[warp], counts)
        self._acquired = True

    def _knowledge(self, warp: int) -> Array:
        known: Array = self._known[warp].copy()
        known[self._number[warp]] = self._count[warp]
        return known

    def _publish(self, address: int, counts: Array) -> None:
        self._released[address] = np.maximum(counts, self._released.get(address, 0))

    def _elements(self, addresses: Array, width: int) -> Array:
        """Indices [lanes, elements] of what accesses of `width` bytes touch."""
        extent = np.searchsorted(self._starts, addresses, side="right") - 1
        size = self._sizes[extent]
        first = self._first[extent] + (addresses - self._starts[extent]) // size
        smallest = int(size.min()) if size.size else width
        # Accesses of one instruction to elements of several sizes would be to several tensors.
        return first[:, None] + np.arange(max(1, width // smallest))

    def _tags(self, lanes: Array) -> Array:
        warps = lanes // 32
        tags: Array = self._number[warps] + 1 << _WARP | self._count[warps] << _COUNT
        return tags

    def _refuse(self, tags: Array, lanes: Array, now: str, before: str) -> None:
        """Fault where the accesses with these tags [lanes, elements] were not ordered before what lanes do now."""
        others = (tags >> _WARP) - 1
        warps = lanes // 32
        foreign = (tags != 0) & (others != self._number[warps][:, None])
        if not foreign.any():
            return
        counts = tags >> _COUNT & (1 << _WARP - _COUNT) - 1
        early = foreign & (counts > self._known[warps[:, None], others])
        if early.any():
            what = f"global memory {now} that another warp has {before}, without a barrier, or a release and an acquire"
            raise Fault(f"{what}, in between", int(early.any(axis=1).argmax()))


class Nobody(Owners):
    """Watches nothing."""

    def __init__(self) -> None:
        super().__init__([], 0, 0)

    def start(self, numbers: Array) -> None:
        pass

    def barrier(self, warps: slice) -> None:
        pass

    def read(self, addresses: Array, lanes: Array, width: int) -> None:
        pass

    def read_constant(self, addresses: Array, lanes: Array, width: int) -> None:
        pass

    def write(self, addresses: Array, lanes: Array, width: int) -> None:
        pass

    def update(self, addresses: Array, lanes: Array, width: int) -> None:
        pass

    def synchronise(self, addresses: Array, lanes: Array, acquires: bool, releases: bool) -> None:
        pass

    def fence(self, lanes: Array) -> None:
        pass
