"""Streams and events: queues of operations that wait for one another."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .block import Access
from .clock import Clock
from .runtime import active

if TYPE_CHECKING:
    from .graph import Capture

# A list of accesses that only the execution shows, or any other value.
Run = Callable[[], object]


@dataclass
class Entry:
    """An operation in a queue.

    Attributes:
        label: what it is, and the line of the program that enqueued it, for messages.
        run: does it.
        accesses: those that are known before.
        after: streams, and how far each must have come before.
        tick: the place in its stream, from 1.
        clock: everything that has happened before, and the operation itself.
        number: of the event of the runtime that appended it.
    """

    stream: Stream
    label: str
    run: Run
    accesses: Sequence[Access]
    after: Sequence[tuple[Stream, int]]
    tick: int
    clock: Clock
    number: int

    def __str__(self) -> str:
        return f"{self.label} on {self.stream}"


class Stream:
    """torch.cuda.Stream. A stream of a real GPU that torch makes does not wait for the default stream, nor does this.

    Attributes:
        queue: the operations that have not been executed.
        ticks, done: the operations that were appended, and those that were executed.
        clock: what has happened before the next operation.
    """

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.runtime = active()
        self.device = torch.device("cuda", self.runtime.index_of(device))
        self.queue: deque[Entry] = deque()
        self.ticks = self.done = 0
        self.clock = Clock()
        self.id = self.runtime.add_stream(self)

    device_index = property(lambda self: self.device.index)
    cuda_stream = stream_id = property(lambda self: self.id)

    def __str__(self) -> str:
        return f"stream {self.id} of {self.device}"

    def synchronize(self) -> None:
        """Wait for all operations."""
        self.runtime.wait(self, self.ticks, self.clock)

    def query(self) -> bool:
        return self.runtime.query(self, self.ticks, self.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        """Later operations run after the event."""
        event.wait(self)

    def wait_stream(self, stream: Stream) -> None:
        """Later operations run after those that `stream` has now."""
        self.wait_event(stream.record_event())


class Event:
    """torch.cuda.Event: a place in a stream."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.runtime = active()
        self._timing = enable_timing
        self._stream: Stream | None = None
        self._tick = 0
        self._clock = Clock()
        self._capture: Capture | None = None
        self._replayed: Event | None = None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.runtime.current_stream()
        with self.runtime.lock:
            self._stream, self._tick = stream, stream.ticks
            self._clock = Clock(stream.clock)
            self._capture = self.runtime.capture_of(stream)
            self._replayed = self._capture.record(stream) if self._capture else None

    def wait(self, stream: Stream | None = None) -> None:
        stream = stream or self.runtime.current_stream()
        if self._stream is None:
            return
        capture = self.runtime.capture_of(stream)
        if self._replayed is not None and self._capture in self.runtime.captures and capture in (None, self._capture):
            self._capture.wait(stream, self._replayed)
        elif capture is not None or self._capture is not None:
            self.runtime.refuse(f"{stream} waits for an event from the other side of a capture")
        elif self._stream is not stream:
            self.runtime.enqueue(stream, "a wait", lambda: None, after=[(self._stream, self._tick)], clock=self._clock)

    def synchronize(self) -> None:
        """Wait until the event has happened."""
        if self._stream is not None:
            self.runtime.wait(self._stream, self._tick, self._clock)

    def query(self) -> bool:
        return self._stream is None or self.runtime.query(self._stream, self._tick, self._clock)

    def elapsed_time(self, end: Event) -> float:
        """One millisecond for each operation between two events of a stream: this runtime has no clock."""
        for event in (self, end):
            if not event._timing or event._stream is None or event._stream.done < event._tick:
                raise RuntimeError("both events must be timed, recorded and completed before their time is read")
        return float(end._tick - self._tick)
