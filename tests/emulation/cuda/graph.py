"""CUDA graphs: a capture records operations and executes none; a replay is one operation of a stream."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .block import Access
from .runtime import active
from .stream import Run, Stream


@dataclass(eq=False)
class Capture:
    """A capture under way."""

    graph: CUDAGraph
    stream: Stream
    mode: str
    thread: int = field(default_factory=threading.get_ident)


class CUDAGraph:
    """torch.cuda.CUDAGraph. Memory that is allocated in the capture belongs to the graph's pool and stays there."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.runtime = active()
        self.pool_handle: object = object()
        self._operations: list[tuple[str, Run, Sequence[Access]]] = []
        self._capture: Capture | None = None
        self._ready = False

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global", **_: Any) -> None:
        stream = self.runtime.current_stream()
        if stream in self.runtime.default_streams:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        self.pool_handle = pool or self.pool_handle
        self._capture = Capture(self, stream, capture_error_mode)
        self.runtime.captures.append(self._capture)

    def capture_end(self) -> None:
        assert self._capture is not None
        self.runtime.captures.remove(self._capture)
        self._ready = True

    def append(self, label: str, run: Run, accesses: Sequence[Access]) -> None:
        """Record an operation."""
        self._operations.append((label, run, accesses))

    @property
    def operations(self) -> list[str]:
        """The names of the recorded operations."""
        return [label for label, *_ in self._operations]

    def replay(self) -> None:
        """Enqueue the recorded operations on the current stream of the device of the capture."""
        if not self._ready:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        assert self._capture is not None
        stream = self.runtime.current_stream(self._capture.stream.device)
        self.runtime.counts["launches"] += 1

        def run() -> list[Access]:
            found = []
            for _, operation, accesses in self._operations:
                shown = operation()
                found += [*accesses, *(shown if isinstance(shown, list) else ())]
            return found

        self.runtime.enqueue(stream, f"a graph of {len(self._operations)} operations", run)

    def pool(self) -> object:
        return self.pool_handle

    def reset(self) -> None:
        self._operations.clear()
        self._ready = False
