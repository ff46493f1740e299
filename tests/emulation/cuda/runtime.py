"""The state of the fake runtime, and the order in which it executes operations."""

from __future__ import annotations

import random
import re
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .allocator import Allocator
from .block import Access, AddressSpace
from .clock import Clock
from .fault import Fault
from .host import HostMemory

if TYPE_CHECKING:
    from .graph import Capture
    from .stream import Entry, Run, Stream

ORDERS = ("latest", "earliest", "random")
# Files between an operation and the program that wants it.
_BESIDE = re.compile(r"/emulation/|/site-packages/(torch|triton)/|/kernels/|/contextlib\.py|<")
_active: list[Runtime] = []


def active() -> Runtime:
    """The runtime that replaces CUDA now."""
    if not _active:
        raise RuntimeError("no fake CUDA runtime is active")
    return _active[-1]


class Runtime:
    """Devices, streams and what the host knows of them.

    Args:
        devices: their number.
        order: "latest" executes an operation when something waits for it, "earliest" when it is enqueued, "random" at
            any time between.
        seed: of the random order.
        memory: of each device, in bytes.

    Attributes:
        host: what the host has waited for. Threads share it, because a wait that one thread has ended was over for all.
        faults: all that were found, also those that the program has swallowed.
        counts: of launches and of waits of the host.
        copied: bytes over the bus, "to devices" and "to the host".
    """

    def __init__(self, devices: int, order: str, seed: int, memory: int) -> None:
        assert order in ORDERS, order
        self.device_count = devices
        self.memory = memory
        self.lock = threading.RLock()
        self.space = AddressSpace()
        self.host = Clock()
        self.host_memory = HostMemory(self)
        self.faults: list[Fault] = []
        self.counts: Counter[str] = Counter()
        self.copied: Counter[str] = Counter()
        self.captures: list[Capture] = []
        self.streams: list[Stream] = []
        self._order = order
        self._random = random.Random(seed)
        self._numbers = count(1)
        self._threads = threading.local()

    def open(self) -> None:
        """Make the default streams and the allocators; the runtime is active."""
        from .stream import Stream

        self.default_streams = [Stream(index) for index in range(self.device_count)]
        self.allocators = [Allocator(self, index) for index in range(self.device_count)]

    def next_number(self) -> int:
        """The number of an event: an operation that is enqueued, memory that is handed out or returned."""
        return next(self._numbers)

    # ---- devices and streams of a thread

    @property
    def current_device(self) -> int:
        return getattr(self._threads, "device", 0)

    def set_device(self, index: int) -> int:
        """Returns the device that was current; a negative index changes nothing."""
        before = self.current_device
        if index >= self.device_count:
            raise RuntimeError(f"CUDA error: invalid device ordinal {index}")
        if index >= 0:
            self._threads.device = index
        return before

    def index_of(self, device: Any) -> int:
        """The index of a device as torch.cuda takes it: None, an int, a name or a torch.device."""
        if device is None:
            return self.current_device
        if not isinstance(device, int):
            device = torch.device(device)
            if device.type != "cuda":
                raise ValueError(f"Expected a cuda device, but got: {device}")
            device = self.current_device if device.index is None else device.index
        if not 0 <= device < self.device_count:
            raise RuntimeError(f"CUDA error: invalid device ordinal {device}")
        return int(device)

    def current_stream(self, device: Any = None) -> Stream:
        index = self.index_of(device)
        return self._current_streams().get(index) or self.default_streams[index]

    def set_stream(self, stream: Stream) -> None:
        self.set_device(stream.device.index)
        self._current_streams()[stream.device.index] = stream

    def _current_streams(self) -> dict[int, Stream]:
        return self._threads.__dict__.setdefault("streams", {})

    def add_stream(self, stream: Stream) -> int:
        """The id of a new stream, from 1."""
        with self.lock:
            self.streams.append(stream)
            return len(self.streams)

    def refuse(self, message: str) -> None:
        """Raise a fault, and remember it in case the program swallows it."""
        self.faults.append(Fault(message))
        raise self.faults[-1]

    # ---- captures

    def capture_of(self, stream: Stream) -> Capture | None:
        return next((capture for capture in self.captures if stream in capture.clocks), None)

    def refuse_in_capture(self, action: str, stream: Stream | None = None) -> None:
        """Raise a fault if a capture forbids an action: one of its own thread, or of any if its mode is "global"."""
        for capture in self.captures:
            own = capture.thread == threading.get_ident() and capture.mode != "relaxed"
            if own or capture.mode == "global" or stream in capture.clocks:
                self.refuse(f"{action} in the capture of a graph on {capture.stream}, mode {capture.mode}")

    # ---- operations

    def enqueue(
        self,
        stream: Stream,
        label: str,
        run: Run,
        accesses: Sequence[Access] = (),
        after: Sequence[tuple[Stream, int]] = (),
        clock: Clock | None = None,
    ) -> None:
        """Append an operation to a stream; `clock`: what has happened before it, apart from what the stream knows."""
        from .stream import Entry

        with self.lock:
            if capture := self.capture_of(stream):
                capture.append(stream, label, run, accesses)
                return
            stream.clock.join(self.host)
            stream.clock.join(clock or {})
            stream.ticks += 1
            stream.clock[stream.id] = stream.ticks
            label = f"{label} ({_line_of_the_program()})"
            stream.queue.append(
                Entry(stream, label, run, accesses, after, stream.ticks, Clock(stream.clock), self.next_number())
            )
            if self._order == "earliest":
                self._run_until(stream, stream.ticks)
            elif self._order == "random":
                for _ in range(self._random.choice((0, 0, 1, 2, 4))):
                    self._run_one()

    def wait(self, stream: Stream, tick: int, clock: Clock) -> None:
        """The host waits for a place in a stream, of which `clock` knows everything that has happened before."""
        self.refuse_in_capture("the host waits", stream)
        with self.lock:
            self.counts["waits"] += 1
            self._run_until(stream, tick)
            self.host.join(clock)

    def query(self, stream: Stream, tick: int, clock: Clock) -> bool:
        """Whether a place has been reached. A program may ask until it has, so that one operation runs after a no."""
        self.refuse_in_capture("the host asks for the state of a stream", stream)
        with self.lock:
            if stream.done >= tick:
                self.host.join(clock)
                return True
            self._run_until(stream, stream.done + 1)
            return False

    def synchronize(self, device: Any = None) -> None:
        """Wait for all streams of a device."""
        index = self.index_of(device)
        for stream in [stream for stream in self.streams if stream.device.index == index]:
            self.refuse_in_capture("the host waits", stream)
            with self.lock:
                self._run_until(stream, stream.ticks)
                self.host.join(stream.clock)
        self.counts["waits"] += 1

    def finish(self) -> None:
        """Execute everything that is left."""
        with self.lock:
            for stream in self.streams:
                self._run_until(stream, stream.ticks)
            self.host_memory.finish()

    def _run_one(self) -> None:
        """Execute the first operation of a random stream, and what it waits for."""
        if waiting := [stream for stream in self.streams if stream.queue]:
            stream = self._random.choice(waiting)
            self._run_until(stream, stream.done + 1)

    def _run_until(self, stream: Stream, tick: int) -> None:
        while stream.done < tick:
            entry = stream.queue[0]
            for other, place in entry.after:
                self._run_until(other, place)
            stream.queue.popleft()
            stream.done = entry.tick
            self._execute(entry)

    def _execute(self, entry: Entry) -> None:
        try:
            self.check(entry, entry.accesses)
            with torch.inference_mode():
                found = entry.run()
            self.check(entry, found if isinstance(found, list) else [])
        except Fault as fault:
            if fault not in self.faults:
                self.faults.append(fault)
            raise

    def check(self, entry: Entry, accesses: Any) -> None:
        """Check accesses of an operation, the reads first: an operation may write what it reads."""
        for access in sorted(accesses, key=lambda access: access.writes):
            access.block.check(entry, access, len(self.streams))


def _line_of_the_program() -> str:
    """The innermost line that is neither of this runtime nor of torch, triton or a launcher."""
    frame = sys._getframe(2)
    while frame.f_back is not None and _BESIDE.search(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
