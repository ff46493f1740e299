"""Decode graphs that are kept between calls, as a capture takes as long as some twenty steps of a 2.6B."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from arcmerge.dispatch.backend import settings
from arcmerge.gemma2.runtime.decode_graph import DecodeGraph
from arcmerge.gemma2.runtime.kv_cache import KVCache

if TYPE_CHECKING:
    from arcmerge.gemma2.runtime.network import Network

T = TypeVar("T")

# Tokens of one pass: enough to keep matrix products efficient, few enough to keep the activations small (2.6B: 2,048
# tokens of 2 * 9,216 values in bf16 are 75 MB).
PASS_TOKENS = 2048
# The share of a GPU's memory that graphs and their caches may keep.
_SHARE = 1 / 8


class KeptGraphs:
    """The decode graphs of one model, and the caches of keys and values that belong to them.

    On a GPU their sizes are rounded up, so that few graphs serve calls of all sizes: sequences to a power of two or a
    multiple of 16; tokens to a power of two or a multiple of 1024. The graphs that were used last are kept, in an
    eighth of the memory. On the CPU, where a recording costs nothing, none is kept.
    """

    def __init__(self) -> None:
        self._graphs: dict[tuple[object, ...], DecodeGraph] = {}  # the one that was used last is at the end

    @property
    def nbytes(self) -> int:
        """Bytes of the GPU's memory that are kept, without those that the driver takes for the graphs themselves."""
        return sum(graph.nbytes for graph in self._graphs.values())

    def free(self) -> int:
        """Keep none of the graphs; returns the bytes that they had."""
        nbytes = self.nbytes
        self._graphs.clear()
        return nbytes

    def make_room_for(self, allocate: Callable[[], T]) -> T:
        """What `allocate` returns; if memory is too small for it, after the graphs are freed."""
        try:
            return allocate()
        except torch.OutOfMemoryError:
            if not self.free():
                raise
        return allocate()

    def take(self, network: Network, count: int, capacity: int) -> DecodeGraph:
        """A graph, and its cache, for `count` sequences of at most `capacity` tokens. The caller holds the lock."""
        weights = network.weights
        device = weights.norm.device

        def graph(rows: int, length: int) -> DecodeGraph:
            return self.make_room_for(lambda: DecodeGraph(network, cache(rows, length, device), rows))

        def cache(rows: int, length: int, place: torch.device) -> KVCache:
            return KVCache(network.config, rows, length, max(1, PASS_TOKENS // rows), weights.norm.dtype, place)

        if device.type == "cpu" or network.stepwise:
            return graph(count, capacity)
        rows, length = rounded(count, 16), min(rounded(capacity, 1024), network.config.max_position_embeddings)
        limit = _SHARE * torch.cuda.mem_get_info(device)[1]
        nbytes = cache(rows, length, torch.device("meta")).nbytes
        if nbytes > limit:
            return graph(count, capacity)
        # Memory that another stream might still use is not reused; and backends are part of what is captured.
        stream = torch.cuda.current_stream(device).cuda_stream
        key = rows, length, stream, settings()
        found = self._graphs.pop(key, None)
        if found is None:
            while self._graphs and self.nbytes + nbytes > limit:
                del self._graphs[next(iter(self._graphs))]
            found = graph(rows, length)
        self._graphs[key] = found
        return found


def rounded(count: int, step: int) -> int:
    """The next power of two up to `step`, then the next multiple of it."""
    return min(1 << (count - 1).bit_length(), -(-count // step) * step)
