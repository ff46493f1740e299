"""Timers of work on a GPU, and on the CPU to test the same code."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

Work = Callable[[], object]

DRY = os.environ.get("ARCMERGE_DRY") == "1"
# Written between repetitions, so that none finds its inputs in the L2 cache: a B200 has 126 MB of it.
FLUSHED_BYTES = 256 << 20
# Of no GPU is the clock faster, in Hz.
CLOCK = 3e9


class Device:
    """The CPU, to test that work can be timed; the times mean nothing."""

    memory = torch.device("cpu")

    def finish(self) -> None:
        """Wait until all launches are done."""

    def once(self, work: Work) -> float:
        """Seconds by the clock of the host until all launches of `work` are done."""
        started = time.perf_counter()
        work()
        self.finish()
        return time.perf_counter() - started

    def wall_seconds(self, work: Work, budget: float = 0.3) -> list[float]:
        """As `once`, of each of several repetitions after two to warm up, for about `budget` seconds."""
        return [self.once(work)]

    def seconds(self, work: Work, budget: float = 0.3) -> list[float]:
        """As `wall_seconds`, but by the clock of the device, without the time to launch, and with a cold L2 cache."""
        return [self.once(work)]


class Gpu(Device):
    memory = torch.device("cuda")

    def __init__(self) -> None:
        self._flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=self.memory)

    def finish(self) -> None:
        torch.cuda.synchronize()

    def wall_seconds(self, work: Work, budget: float = 0.3) -> list[float]:
        count, _ = self._warm(work, budget)
        return [self.once(work) for _ in range(count)]

    def seconds(self, work: Work, budget: float = 0.3) -> list[float]:
        count, longest = self._warm(work, budget)
        events = []
        for _ in range(count):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flushed.zero_()
            # While the GPU waits the host launches, which takes less than launching and working did.
            torch.cuda._sleep(int(longest * CLOCK))
            start.record()
            work()
            end.record()
            events.append((start, end))
        self.finish()
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    def _warm(self, work: Work, budget: float) -> tuple[int, float]:
        """How often `work` is to be repeated, and the seconds that it took once it was compiled."""
        self.once(work)
        seconds = self.once(work)
        return max(10, min(int(budget / seconds), 100)), seconds
