"""What a launch did, as the profiler of a GPU would count it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from .formats import Array


@dataclass
class Requests:
    """Of global memory. A request is one instruction of one warp; it takes as many 32-byte sectors as it touches."""

    requests: int = 0
    sectors: int = 0
    bytes: int = 0

    @property
    def sectors_per_request(self) -> float:
        return self.sectors / max(self.requests, 1)


@dataclass
class Counts:
    """shared_wavefronts: passes over the 32 banks of shared memory; shared_ideal: how many without conflicts;
    operand_wavefronts: those of products of warpgroups.
    instructions: executions by warps, of each opcode. divergent_branches: times that the lanes of a warp part.
    barriers: by blocks. atomics: by lanes; global_atomics: those of global memory. Global loads include those of
    cp.async.
    """

    loads: Requests = field(default_factory=Requests)
    stores: Requests = field(default_factory=Requests)
    shared_wavefronts: int = 0
    operand_wavefronts: int = 0
    shared_ideal: int = 0
    instructions: Counter[str] = field(default_factory=Counter)
    mma_flops: int = 0
    barriers: int = 0
    divergent_branches: int = 0
    atomics: int = 0
    global_atomics: int = 0

    @property
    def bank_conflicts(self) -> int:
        return self.shared_wavefronts - self.shared_ideal

    def count_global(self, requests: Requests, addresses: Array, lanes: Array, width: int) -> None:
        warps = lanes >> 5
        requests.bytes += addresses.size * width
        requests.requests += int(np.count_nonzero(np.diff(warps))) + 1
        # Aligned accesses lie within a sector each, but for those of more than 32 bytes, which no GPU has.
        first = addresses[0] & ~31
        requests.sectors += _distinct(((warps << 48) + ((addresses - first) >> 5)).tobytes())

    def count_shared(self, offsets: Array, lanes: Array, width: int) -> None:
        """A pass serves 128 bytes: 32 lanes of up to 4 bytes, 16 of 8 or 8 of 16 at a time."""
        unit = max(width, 4)
        passes = lanes // (128 // unit)
        wavefronts, ideal = _wavefronts((passes << 32 | offsets // unit).tobytes(), 128 // unit)
        self.shared_wavefronts += wavefronts
        self.shared_ideal += ideal

    def count_units(self, size: int) -> None:
        """Bytes of shared memory that a product of a warpgroup reads, without conflicts."""
        self.shared_wavefronts += size // 128
        self.shared_ideal += size // 128
        self.operand_wavefronts += size // 128


@lru_cache(maxsize=4096)
def _distinct(keys: bytes) -> int:
    """Loops come by with the same pattern again and again."""
    return int(np.unique(np.frombuffer(keys, np.int64)).size)


@lru_cache(maxsize=4096)
def _wavefronts(keys: bytes, banks: int) -> tuple[int, int]:
    """Lanes of a pass that want different words of one bank wait for each other."""
    words = np.unique(np.frombuffer(keys, np.int64))
    _, passes = np.unique(words >> 32, return_inverse=True)
    load = np.bincount(passes * banks + words % banks, minlength=(passes.max() + 1) * banks)
    return int(load.reshape(-1, banks).max(axis=1).sum()), int(passes.max()) + 1
