"""Shared memory of a block whose warps meet in parts: by barriers of some threads and by mbarriers.

A warp counts the times that it told others what it did, as in FastTrack (Flanagan and Freund, PLDI 2009), and an access
to a word carries that count. Another warp may touch the word when it knows the count: by a barrier at which both were,
or by an mbarrier at which one arrived and for which the other waited. Every warp that has read a word is known. Copies
by tensor maps are an actor of their own, which tells what it wrote by the mbarrier of the copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .formats import Array
from .program import Fault, Unsupported
from .shared import UNIT, SharedMemory

WORD = 4


class ClockedMemory(SharedMemory):
    """As SharedMemory, whose bytes it has; the owners of words are kept by clocks instead of tags.

    Attributes:
        copies: the number of the copies among the actors of a block; the warps come before.
    """

    def __init__(self, blocks: int, size: int, threads: int) -> None:
        self.copies = threads // 32
        self._blocks = blocks
        super().__init__(blocks, size, threads)
        words = self._bytes.size // WORD
        # The last writer and its count; whoever made that write visible to the asynchronous proxy, and its count.
        self._wrote, self._fenced = np.empty(words, np.int8), np.empty(words, np.int8)
        self._wrote_at, self._fenced_at = np.zeros(words, np.int32), np.zeros(words, np.int32)
        self._read_at = np.empty((self.copies, words), np.int32)
        self._landing = np.empty(words, bool)
        self._known = np.empty((blocks, self.copies, self.copies + 1), np.int32)
        self._count = np.empty((blocks, self.copies + 1), np.int32)
        self._forget()

    def reset(self) -> None:
        super().reset()
        if hasattr(self, "_count"):
            self._forget()

    def _forget(self) -> None:
        for values, start in ((self._wrote, -1), (self._fenced, -1), (self._read_at, 0), (self._landing, False)):
            values.fill(start)
        self._known.fill(0)
        self._count.fill(1)

    def load(self, offsets: Array, lanes: Array | slice, itemsize: int, element: int) -> Array:
        blocks, warps = self._actors(lanes)
        for words in self._words(offsets + element * itemsize, itemsize):
            self._refuse_unknown(words, blocks, warps, "read")
            self._read_at[warps, words] = self._count[blocks, warps]
        return self._view(self._bytes, itemsize)[offsets // itemsize + element]

    def store(self, offsets: Array, lanes: Array | slice, itemsize: int, element: int, values: Array) -> None:
        blocks, warps = self._actors(lanes)
        self._refuse_held(offsets + element * itemsize)
        for words in self._words(offsets + element * itemsize, itemsize):
            self._refuse_unknown(words, blocks, warps, "written")
            self._refuse_unknown_readers(words, blocks, warps)
            self._wrote[words], self._wrote_at[words] = warps, self._count[blocks, warps]
            self._fenced[words] = -1
        self._view(self._bytes, itemsize)[offsets // itemsize + element] = values

    def meet(self, block: int, warps: Sequence[int]) -> None:
        """These warps of a block are at a barrier together."""
        known = self._known[block, warps].max(axis=0)
        known[warps] = self._count[block, warps]
        self._known[block, warps] = known
        self._count[block, warps] += 1

    def tell(self, block: int, actor: int) -> Array:
        """What an actor knows, itself included, for those who learn it from an mbarrier: [warps + 1]."""
        known = self._known[block, actor].copy() if actor < self.copies else np.zeros(self.copies + 1, np.int32)
        known[actor] = self._count[block, actor]
        self._count[block, actor] += 1
        return known

    def learn(self, block: int, warp: int, known: Array) -> None:
        np.maximum(self._known[block, warp], known, out=self._known[block, warp])

    def fence_proxy(self, active: Array) -> None:
        """fence.proxy.async makes the writes that a warp knows visible to products and copies."""
        for number in np.flatnonzero(active.reshape(-1, 32).any(axis=1)).tolist():
            block, warp = divmod(number, self.copies)
            own = slice(block * self._pitch // WORD, (block + 1) * self._pitch // WORD)
            wrote = self._wrote[own]
            known = (wrote == warp) | (self._known[block, warp, wrote] >= self._wrote_at[own])
            fresh = (wrote >= 0) & (self._fenced[own] < 0) & known
            self._fenced[own][fresh] = warp
            self._fenced_at[own][fresh] = self._count[block, warp]

    def read_by_proxy(self, addresses: Array, first: Array, warps: int) -> tuple[Array, Array]:
        bad = (addresses < 0) | (addresses + UNIT > self._size)
        if bad.any():
            group = int(bad.any(axis=1).argmax())
            address = addresses[group][bad[group]][0]
            raise Fault(f"{UNIT} bytes at {address} of shared memory, which has {self._size}", int(first[group]))
        units = (addresses + self._block[first][:, None]) // UNIT
        for group, lane in enumerate(first.tolist()):
            block, warp = divmod(lane // 32, self.copies)
            words = np.unique(units[group])[:, None] * (UNIT // WORD) + np.arange(UNIT // WORD)
            for reader in range(warp, warp + warps):
                self.require_visible(block, reader, words.reshape(-1), lane, "read by a product")
        return self._bytes.reshape(-1, UNIT)[units], units

    def release(self, units: Array, first: int, warps: int) -> None:
        self._held[units] = False
        block, warp = divmod(first // 32, self.copies)
        words = (np.unique(units)[:, None] * (UNIT // WORD) + np.arange(UNIT // WORD)).reshape(-1)
        for reader in range(warp, warp + warps):
            self._read_at[reader, words] = self._count[block, reader]

    def require_visible(self, block: int, warp: int, words: Array, lane: int, what: str) -> None:
        """Fault unless the asynchronous proxy, used by a warp, sees the last write of all words."""
        blocks, warps = np.full(words.size, block), np.full(words.size, warp)
        self._refuse_unknown(words, blocks, warps, what, lane)
        fenced = self._fenced[words]
        generic = (self._wrote[words] >= 0) & (self._wrote[words] != self.copies)
        hidden = (fenced < 0) | ((fenced != warp) & (self._known[block, warp, fenced] < self._fenced_at[words]))
        if (generic & hidden).any():
            raise Fault(f"shared memory {what} without fence.proxy.async after its write", lane)

    def require_known(self, words: Array, block: int, warp: int, lane: int) -> None:
        """Fault unless a warp knows of the last write of all words."""
        self._refuse_unknown(words, np.full(words.size, block), np.full(words.size, warp), "used", lane)

    def start_landing(self, block: int, warp: int, places: Array, lane: int) -> Array:
        """A copy of the asynchronous proxy to the units at `places`, of the block's memory, begins. Their words."""
        if ((places < 0) | (places + UNIT > self._size)).any():
            raise Fault(f"a copy behind the end of shared memory, which has {self._size} bytes", lane)
        units = (places + block * self._pitch) // UNIT
        words: Array = (units[:, None] * (UNIT // WORD) + np.arange(UNIT // WORD)).reshape(-1)
        self.require_visible(block, warp, words, lane, "written by a copy")
        self._refuse_unknown_readers(words, np.full(words.size, block), np.full(words.size, warp), lane)
        if self._held[units].any():
            raise Fault("shared memory written by a copy while a product reads it", lane)
        self._landing[words] = True
        return words

    def land(self, block: int, words: Array, data: Array) -> None:
        self._landing[words] = False
        self._wrote[words], self._wrote_at[words] = self.copies, self._count[block, self.copies]
        self._bytes.view(np.uint32)[words] = data.view(np.uint32).reshape(-1)

    def start_copy(self, offsets: Array, lanes: Array, data: Array) -> None:
        raise Unsupported("cp.async in a kernel with mbarriers")

    def read_atomically(self, offsets: Array, itemsize: int) -> Array:
        raise Unsupported("atomics of shared memory in a kernel with mbarriers")

    def _actors(self, lanes: Array | slice) -> tuple[Array, Array]:
        numbers = np.arange(self._block.size)[lanes] if isinstance(lanes, slice) else lanes
        return numbers // self._threads, numbers % self._threads // 32

    @staticmethod
    def _words(offsets: Array, width: int) -> list[Array]:
        return [offsets // WORD + number for number in range(-(-width // WORD))]

    def _refuse_unknown(self, words: Array, blocks: Array, warps: Array, what: str, lane: int | None = None) -> None:
        landing = self._landing[words]
        if landing.any():
            who = int(landing.argmax()) if lane is None else lane
            raise Fault(f"shared memory {what} while a copy to it is under way", who)
        wrote = self._wrote[words]
        unknown = (wrote >= 0) & (wrote != warps) & (self._known[blocks, warps, wrote] < self._wrote_at[words])
        if unknown.any():
            who = int(unknown.argmax()) if lane is None else lane
            raise Fault(f"shared memory {what} that another warp or a copy wrote, without waiting for it", who)

    def _refuse_unknown_readers(self, words: Array, blocks: Array, warps: Array, lane: int | None = None) -> None:
        read_at = self._read_at[:, words]
        unknown = read_at > self._known[blocks, warps, : self.copies].T
        unknown[warps, np.arange(words.size)] = False
        if unknown.any():
            who = int(unknown.any(axis=0).argmax()) if lane is None else lane
            raise Fault("shared memory written that another warp reads, without waiting for it", who)
