"""The guard of CUDA devices, which torch's C++ asks for the current device and tells to change it.

A build for the CPU has none and fails where it needs one. The guard of the device meta, whose methods do nothing, takes
its place, except for the method that tells the current device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# Places of device types in torch's table of guards.
_CUDA, _META = 1, 14
# The methods of a guard, in the order of c10/core/impl/DeviceGuardImplInterface.h: type, exchangeDevice, getDevice, ...
_METHODS, _GET_DEVICE = 32, 2


@contextmanager
def guarded(current: Callable[[], int]) -> Iterator[None]:
    """Give torch a guard of CUDA devices; `current` tells the index of the current device."""
    library = ctypes.CDLL(f"{torch.__path__[0]}/lib/libc10.so")
    guards = (ctypes.c_void_p * (_META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    stock = ctypes.cast(guards[_META], ctypes.POINTER(ctypes.POINTER(ctypes.c_void_p)))
    # c10::Device is two bytes, the type and the index.
    device = ctypes.CFUNCTYPE(ctypes.c_uint16, ctypes.c_void_p)(lambda guard: _CUDA | current() << 8)
    methods = (ctypes.c_void_p * _METHODS)(*stock[0][:_METHODS])
    methods[_GET_DEVICE] = ctypes.cast(device, ctypes.c_void_p).value
    guard = ctypes.c_void_p(ctypes.addressof(methods))
    before, guards[_CUDA] = guards[_CUDA], ctypes.addressof(guard)
    try:
        yield
    finally:
        guards[_CUDA] = before
