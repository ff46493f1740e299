"""The names of torch, ctypes and Triton that the fake runtime replaces."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from . import driver, launch
from .graph import CUDAGraph
from .host import memmove_of
from .runtime import Runtime
from .stream import Event, Stream
from .tensor import CudaTensor

# Functions that make tensors and can pin them.
_FACTORIES = (
    "empty",
    "zeros",
    "ones",
    "full",
    "tensor",
    "arange",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
)


def replacements(runtime: Runtime) -> Iterator[tuple[Any, str, Any]]:
    """Owner, name and replacement."""
    yield from ((torch.cuda, name, function) for name, function in _of_torch_cuda(runtime).items())
    yield torch.cuda.graph, "default_capture_stream", None
    yield torch._C, "_host_emptyCache", lambda: None
    for name in _FACTORIES:
        yield torch, name, _with_pinning(runtime, getattr(torch, name))
    yield torch.Tensor, "pin_memory", lambda tensor, *_: runtime.host_memory.pinned(tensor)
    yield torch.Tensor, "is_pinned", lambda tensor, *_: runtime.host_memory.is_pinned(tensor)
    yield ctypes, "memmove", memmove_of(runtime.host_memory)
    yield from launch.replacements(runtime)
    yield from driver.replacements(runtime)


def _of_torch_cuda(runtime: Runtime) -> dict[str, Any]:
    def allocator(device: Any = None) -> Any:
        return runtime.allocators[runtime.index_of(device)]

    def free(device: Any = None) -> tuple[int, int]:
        return runtime.memory - allocator(device).reserved, runtime.memory

    def empty_cache() -> None:
        for each in runtime.allocators:
            each.empty_cache()

    properties = SimpleNamespace(
        name="Fake GPU",
        major=8,
        minor=0,
        total_memory=runtime.memory,
        multi_processor_count=108,
        warp_size=32,
        L2_cache_size=40 << 20,
    )
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "device_count": lambda: runtime.device_count,
        "current_device": lambda: runtime.current_device,
        "set_device": lambda device: runtime.set_device(runtime.index_of(device)),
        "_exchange_device": runtime.set_device,
        "_maybe_exchange_device": runtime.set_device,
        "current_stream": runtime.current_stream,
        "default_stream": lambda device=None: runtime.default_streams[runtime.index_of(device)],
        "set_stream": runtime.set_stream,
        "synchronize": runtime.synchronize,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "graph_pool_handle": object,
        "is_current_stream_capturing": lambda: runtime.capture_of(runtime.current_stream()) is not None,
        "mem_get_info": free,
        "memory_allocated": lambda device=None: allocator(device).allocated,
        "memory_reserved": lambda device=None: allocator(device).reserved,
        "empty_cache": empty_cache,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_properties": lambda device=None: properties,
        "can_device_access_peer": lambda device, peer: device != peer,
        "cudart": lambda: _Cudart(runtime),
    }


class _Cudart:
    """The functions of the CUDA runtime that torch offers, and the codes that they return."""

    cudaError = SimpleNamespace(success=0)

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self._runtime.host_memory.register(address, nbytes)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self._runtime.host_memory.unregister(address)
        return 0


def _with_pinning(runtime: Runtime, stock: Callable[..., Any]) -> Callable[..., Any]:
    def make(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
        found = stock(*args, **kwargs)
        return runtime.host_memory.pinned(found) if pin_memory and not isinstance(found, CudaTensor) else found

    return make
