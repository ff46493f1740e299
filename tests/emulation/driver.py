"""The functions of libcuda that arcmerge.cuda.driver calls: modules, functions, occupancy, cooperative launches."""

from __future__ import annotations

import ctypes
import re
from abc import ABC, abstractmethod
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from .ptx import machine
from .ptx.counts import Counts
from .ptx.memory import GlobalMemory
from .ptx.program import Program, parse

# Several times what tests launch. Loops over a table that is not yet there would take hours.
_ENDLESS = 50_000
_INVALID_HANDLE, _NOT_FOUND = 400, 500
_ERRORS = {_INVALID_HANDLE: b"invalid resource handle", _NOT_FOUND: b"named symbol not found"}


class Launch(NamedTuple):
    """A cooperative launch of one-dimensional blocks. The driver has copied the parameters."""

    program: Program
    blocks: int
    parameters: dict[str, Any]
    shared: int

    def execute(self, memory: GlobalMemory, seed: int = 0) -> Counts:
        """Run all blocks side by side in the emulator."""
        counts, lanes = Counts(), self.blocks * self.program.threads
        with mock.patch.multiple(machine, LANES=lanes, ENDLESS=_ENDLESS):
            runner = machine.Machine(
                self.program, (self.blocks, 1, 1), self.parameters, memory, self.shared, counts, self.blocks, seed=seed
            )
            runner.run([(block, 0, 0) for block in range(self.blocks)])
        return counts


class Driver(ABC):
    """libcuda. A handle is the place in a list, from 1.

    Attributes:
        launches: (blocks, threads, bytes of shared memory, stream) of each launch.
    """

    def __init__(self) -> None:
        self._modules: list[tuple[Program, object]] = []
        self.launches: list[tuple[int, int, int, int]] = []

    @abstractmethod
    def launch(self, launch: Launch, stream: int) -> None:
        """Execute a launch, or enqueue it on a stream; 0 is the default stream of the current device."""

    def context(self) -> object:
        """The current context, in which a module is loaded and to which its functions belong."""
        return None

    def cuModuleLoadData(self, module: Any, image: ctypes.c_char_p) -> int:
        assert image.value is not None
        self._modules.append((_parsed(image.value.decode()), self.context()))
        module._obj.value = len(self._modules)
        return 0

    def cuModuleGetFunction(self, function: Any, module: ctypes.c_void_p, name: ctypes.c_char_p) -> int:
        function._obj.value = module.value
        return 0 if name.value == self._of(module)[0].name.encode() else _NOT_FOUND

    def cuOccupancyMaxActiveBlocksPerMultiprocessor(
        self, count: Any, function: ctypes.c_void_p, threads: ctypes.c_int, shared: ctypes.c_size_t
    ) -> int:
        count._obj.value = 3
        return 0

    def cuGetErrorString(self, status: ctypes.c_int, text: Any) -> int:
        text._obj.value = _ERRORS[status.value]
        return 0

    def cuLaunchCooperativeKernel(self, function: ctypes.c_void_p, *rest: Any) -> int:
        x, y, z, threads, _, _, shared, stream, pointers = rest
        program, context = self._of(function)
        self.launches.append((x.value, threads.value, shared.value, stream.value or 0))
        assert (y.value, z.value, threads.value) == (1, 1, program.threads)
        parameters = {}
        for (name, kind), pointer in zip(program.parameters.items(), pointers, strict=True):
            size = int(kind[1:]) // 8
            parameters[name] = np.frombuffer(ctypes.string_at(pointer, size), f"u{size}")[0]
        if context != self.context():
            return _INVALID_HANDLE
        self.launch(Launch(program, x.value, parameters, shared.value), stream.value or 0)
        return 0

    def _of(self, handle: ctypes.c_void_p) -> tuple[Program, object]:
        assert handle.value is not None
        return self._modules[handle.value - 1]


@cache
def _parsed(text: str) -> Program:
    # nvcc states the number of threads as a maximum; a launch of these kernels always has it.
    text = re.sub(r"\.maxntid (\d+)[^\n]*", r".reqntid \1", text)
    return parse(re.sub(r"\.minnctapersm[^\n]*", "", text))
