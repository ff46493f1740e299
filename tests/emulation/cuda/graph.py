"""CUDA graphs: a capture records operations and executes none; a replay enqueues what was recorded.

A stream joins a capture by waiting for an event of it, and must return by an event that the first stream waits for. In
a replay, what the first stream has recorded is enqueued on the current stream, and the rest on hidden ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .block import Access
from .clock import Clock
from .runtime import active
from .stream import Event, Run, Stream

# Enqueues a recorded step, given the stream of the replay for each stream of the capture.
Step = Callable[[Mapping[Stream, Stream]], None]


@dataclass(eq=False)
class Capture:
    """A capture under way.

    Attributes:
        stream: the stream that it began on.
        clocks: what has happened before on each stream that takes part, counted from the beginning.
    """

    graph: CUDAGraph
    stream: Stream
    mode: str
    thread: int = field(default_factory=threading.get_ident)

    def __post_init__(self) -> None:
        self.clocks: dict[Stream, Clock] = {self.stream: Clock()}
        self._events: dict[int, Clock] = {}

    def append(self, stream: Stream, label: str, run: Run, accesses: Sequence[Access]) -> None:
        """Record an operation."""
        clock = self.clocks[stream]
        clock[stream.id] = clock.get(stream.id, 0) + 1
        enqueue = self.graph.runtime.enqueue
        self.graph.add(label, lambda streams: enqueue(streams[stream], label, run, accesses))

    def record(self, stream: Stream) -> Event:
        """Record an event; returns the one of the replays."""
        event = Event()
        self._events[id(event)] = Clock(self.clocks[stream])
        self.graph.add("an event", lambda streams: event.record(streams[stream]))
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        """Record that a stream, which takes part from now on, waits for an event."""
        self.clocks.setdefault(stream, Clock()).join(self._events[id(event)])
        self.graph.add("a wait", lambda streams: event.wait(streams[stream]))

    def end(self) -> None:
        """Raise a fault if a stream has not returned."""
        known = self.clocks[self.stream]
        for stream, clock in self.clocks.items():
            if clock.get(stream.id, 0) > known.get(stream.id, 0):
                self.graph.runtime.refuse(f"{stream} takes part in a capture, and {self.stream} does not wait for it")


class CUDAGraph:
    """torch.cuda.CUDAGraph. Memory that is allocated in the capture belongs to the graph's pool and stays there."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.runtime = active()
        self.pool_handle: object = object()
        self._steps: list[tuple[str, Step]] = []
        self._capture: Capture | None = None
        self._hidden: dict[Stream, Stream] | None = None

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
        self._capture.end()
        others = [stream for stream in self._capture.clocks if stream is not self._capture.stream]
        self._hidden = {stream: Stream(stream.device) for stream in others}

    def add(self, label: str, step: Step) -> None:
        self._steps.append((label, step))

    @property
    def operations(self) -> list[str]:
        """The names of the recorded steps."""
        return [label for label, _ in self._steps]

    def replay(self) -> None:
        """Enqueue the recorded operations on the current stream of the device of the capture."""
        if self._capture is None or self._hidden is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        stream = self.runtime.current_stream(self._capture.stream.device)
        self.runtime.counts["launches"] += 1
        for hidden in self._hidden.values():
            hidden.wait_stream(stream)
        for _, step in self._steps:
            step({self._capture.stream: stream, **self._hidden})
        for hidden in self._hidden.values():
            stream.wait_stream(hidden)

    def pool(self) -> object:
        return self.pool_handle

    def reset(self) -> None:
        self._steps.clear()
        self._hidden = None
