"""Launches of Triton kernels: operations that the interpreter executes on the memory of blocks.

What a kernel reads and writes is seen when it runs, also by addresses that it takes from a table.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder
from triton.runtime.jit import TensorWrapper
from triton.tools.tensor_descriptor import TensorDescriptor

from .block import GRANULE, Access, Block
from .fault import Fault
from .runtime import Runtime
from .tensor import CudaTensor

_thread = threading.local()


class _Watch:
    """The granules that one launch reads and writes."""

    def __init__(self, runtime: Runtime, kernel: str, device: torch.device) -> None:
        self._runtime = runtime
        self._kernel = kernel
        self._device = device
        self._touched: dict[tuple[Block, bool], list[Any]] = defaultdict(list)

    def see(self, pointers: Any, mask: Any, *, writes: bool) -> None:
        addresses = pointers.data.ravel()
        if mask is not None:
            addresses = addresses[np.broadcast_to(np.asarray(mask.data), pointers.data.shape).ravel()]
        addresses = addresses.astype(np.int64)
        while addresses.size:
            block = self._runtime.space.find(int(addresses[0]))
            if block is None or block.stream.device != self._device:
                where = "no device" if block is None else str(block.stream.device)
                raise Fault(f"{self._kernel} uses the address {addresses[0]:#x} of {where} on {self._device}")
            inside = (addresses >= block.address) & (addresses < block.address + block.nbytes)
            self._touched[block, writes].append(np.unique((addresses[inside] - block.address) // GRANULE))
            addresses = addresses[~inside]

    def accesses(self) -> list[Access]:
        return [
            Access(block, np.unique(np.concatenate(places)), writes)
            for (block, writes), places in self._touched.items()
        ]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, TensorDescriptor | TensorWrapper):
        yield from _tensors(value.base)
    elif isinstance(value, Tensor):
        yield value


def _inner(value: Any) -> Any:
    if isinstance(value, tuple):
        items = map(_inner, value)
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value.inner if isinstance(value, CudaTensor) else value


def launch(runtime: Runtime, stock: Callable[..., Any], executor: GridExecutor, *args: Any, **named: Any) -> None:
    """Append a launch to the current stream of the current device, as Triton does, whatever its tensors are."""
    tensors = [tensor for value in (*args, *named.values()) for tensor in _tensors(value)]
    if not any(isinstance(tensor, CudaTensor) for tensor in tensors):
        stock(executor, *args, **named)
        return
    kernel = executor.fn.__name__
    for tensor in tensors:
        if str(tensor.device) != f"cuda:{runtime.current_device}":
            runtime.refuse(f"{kernel} is launched on cuda:{runtime.current_device} with a tensor of {tensor.device}")
    stream = runtime.current_stream()
    inner = tuple(map(_inner, args)), {name: _inner(value) for name, value in named.items()}

    def run() -> list[Access]:
        _thread.watch = watch = _Watch(runtime, kernel, stream.device)
        try:
            stock(executor, *inner[0], **inner[1])
        except InterpreterError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, Fault):
                cause = cause.__cause__
            raise cause or error from None
        finally:
            _thread.watch = None
        return watch.accesses()

    runtime.counts["launches"] += 1
    runtime.enqueue(stream, kernel, run)


def _watched(stock: Callable[..., Any], place: int, mask: int | None, modes: tuple[bool, ...]) -> Callable[..., Any]:
    """A method of the interpreter that reports the pointers at one place of its arguments."""

    def method(builder: Any, *args: Any, **named: Any) -> Any:
        if watch := getattr(_thread, "watch", None):
            for writes in modes:
                watch.see(args[place], None if mask is None else args[mask], writes=writes)
        return stock(builder, *args, **named)

    return method


def replacements(runtime: Runtime) -> Iterator[tuple[Any, str, Any]]:
    """Owner, name and replacement of what reports launches and their accesses."""
    executor = GridExecutor.__call__
    yield GridExecutor, "__call__", lambda *args, **named: launch(runtime, executor, *args, **named)
    for name, place, mask, modes in (
        ("create_masked_load", 0, 1, (False,)),
        ("create_masked_store", 0, 2, (True,)),
        ("create_atomic_rmw", 1, 3, (False, True)),
        ("create_atomic_cas", 0, None, (False, True)),
    ):
        yield InterpreterBuilder, name, _watched(getattr(InterpreterBuilder, name), place, mask, modes)
