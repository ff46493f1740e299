"""The part of CUDA's driver interface that loads PTX and launches a cooperative kernel.

Called through ctypes, without torch's C++ interface. The functions use the current context, which is torch's once it
has used the device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

from arcmerge.errors import ArcmergeError

LIBRARY = "libcuda.so.1"


@cache
def library() -> Any:
    """The driver. Raises ArcmergeError on a machine without one."""
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise ArcmergeError(f"'{LIBRARY}' must be installed, got {error}; install NVIDIA's driver") from error


class Kernel:
    """A kernel of a PTX module, for the device of the current context."""

    def __init__(self, driver: Any, ptx: bytes, name: str) -> None:
        """Compile PTX for the device. Raises ArcmergeError with the driver's reason if that fails."""
        self._driver, self.name = driver, name
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(self._module), ctypes.c_char_p(ptx))
        self._call("cuModuleGetFunction", ctypes.byref(self._function), self._module, ctypes.c_char_p(name.encode()))

    def resident_blocks(self, threads: int, shared: int) -> int:
        """Blocks that fit on a multiprocessor at a time. shared: bytes of dynamic shared memory of a block."""
        count = ctypes.c_int()
        self._call(
            "cuOccupancyMaxActiveBlocksPerMultiprocessor",
            ctypes.byref(count),
            self._function,
            ctypes.c_int(threads),
            ctypes.c_size_t(shared),
        )
        return count.value

    def launch_cooperative(
        self, blocks: int, threads: int, shared: int, stream: int, arguments: Sequence[ctypes._SimpleCData[Any]]
    ) -> None:
        """Launch blocks that may wait for one another, all of which must fit on the device."""
        pointers = (ctypes.c_void_p * len(arguments))(
            *(ctypes.cast(ctypes.byref(argument), ctypes.c_void_p) for argument in arguments)
        )
        sizes = [ctypes.c_uint(size) for size in (blocks, 1, 1, threads, 1, 1, shared)]
        self._call("cuLaunchCooperativeKernel", self._function, *sizes, ctypes.c_void_p(stream), pointers)

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._driver, function)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(ctypes.c_int(status), ctypes.byref(text))
            reason = text.value.decode() if text.value else "no description"
            raise ArcmergeError(
                f"'{function}' must succeed for the kernel '{self.name}', got error {status}, {reason}; "
                "see that the driver is new enough for the PTX"
            )
