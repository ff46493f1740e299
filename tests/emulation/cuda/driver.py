"""Launches through the driver, of kernels in CUDA C++: operations that the emulator executes as PTX.

What a kernel reads and writes is seen when it runs, as for Triton's. Its parameters are copied at the launch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..driver import Driver, Launch
from ..ptx import program
from ..ptx.memory import GlobalMemory
from .block import GRANULE, Access, Block
from .fault import Fault
from .runtime import Runtime
from .stream import Stream


class _Memory(GlobalMemory):
    """The memory of one device, which notes the words of eight bytes that a launch reads and writes."""

    def __init__(self, blocks: list[Block]) -> None:
        # No kernel of csrc/cuda touches less than two bytes.
        super().__init__((str(block.stream.device), block.data.view(torch.int16)) for block in blocks)
        self._blocks = blocks
        self._touched: dict[bool, list[Any]] = defaultdict(list)

    def load(self, addresses: Any, itemsize: int, element: int) -> Any:
        self._touched[False].append(np.unique((addresses + itemsize * element) // GRANULE))
        return super().load(addresses, itemsize, element)

    def store(self, addresses: Any, itemsize: int, element: int, values: Any) -> None:
        self._touched[True].append(np.unique((addresses + itemsize * element) // GRANULE))
        super().store(addresses, itemsize, element, values)

    def accesses(self) -> Iterator[Access]:
        for writes, parts in self._touched.items():
            words = np.unique(np.concatenate(parts))
            for block in self._blocks:
                first = block.address // GRANULE
                low, high = np.searchsorted(words, (first, first + block.nbytes // GRANULE))
                if low < high:
                    yield Access(block, words[low:high].astype(np.int64) - first, writes)


class FakeDriver(Driver):
    """libcuda for the fake devices of a runtime. The context of a thread is that of its current device."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self._runtime = runtime

    def context(self) -> object:
        return self._runtime.current_device

    def launch(self, launch: Launch, stream: int) -> None:
        runtime = self._runtime
        chosen = runtime.streams[stream - 1] if stream else runtime.default_streams[runtime.current_device]
        name, device = launch.program.name, torch.device("cuda", runtime.current_device)
        if chosen.device != device:
            runtime.refuse(f"{name} is launched on {device} with a stream of {chosen.device}")
        runtime.counts["launches"] += 1
        runtime.enqueue(chosen, name, lambda: _execute(launch, chosen, runtime))


def _execute(launch: Launch, stream: Stream, runtime: Runtime) -> list[Access]:
    memory = _Memory(runtime.space.blocks_of(stream.device))
    try:
        launch.execute(memory)
    except program.Fault as fault:
        raise Fault(f"{launch.program.name} on {stream}: {fault}") from fault
    return list(memory.accesses())


def replacements(runtime: Runtime) -> Iterator[tuple[Any, str, Any]]:
    """Owner, name and replacement of the driver, and of the kernels that were loaded by another one."""
    from arcmerge.cuda import driver, slerp

    fake = FakeDriver(runtime)
    yield driver, "library", lambda: fake
    yield slerp, "_loaded", {}
