"""Count the bytes that kernels ask of memory under the interpreter, and refuse those they have no business with.

    with Traffic(*tensors) as traffic:
        launcher(...)
    traffic.loaded, traffic.stored, traffic.launches

Lanes that are masked off count nothing. `tensors` are those that kernels reach by addresses from a table; what is
passed to a launch is added by itself. An access outside all of them raises AssertionError.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder


class Traffic:
    """loaded, stored: bytes. launches: number of kernel launches. atomics: atomic read-modify-writes of one element."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.loaded = self.stored = self.launches = self.atomics = 0
        self._reachable = [_range(tensor) for tensor in tensors if tensor.numel()]
        self._patches = ExitStack()

    def __enter__(self) -> Traffic:
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
        atomic, launch = InterpreterBuilder.create_atomic_rmw, GridExecutor.__call__

        def counted_load(builder: InterpreterBuilder, pointers: Any, mask: Any, *rest: Any) -> Any:
            self.loaded += self._bytes(pointers, mask)
            return load(builder, pointers, mask, *rest)

        def counted_store(builder: InterpreterBuilder, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.stored += self._bytes(pointers, mask)
            return store(builder, pointers, value, mask, *rest)

        def counted_atomic(
            builder: InterpreterBuilder, kind: Any, pointers: Any, value: Any, mask: Any, *rest: Any
        ) -> Any:
            self.atomics += self._bytes(pointers, mask) // value.data.itemsize
            return atomic(builder, kind, pointers, value, mask, *rest)

        def counted_launch(executor: GridExecutor, *arguments: Any, **named: Any) -> Any:
            self.launches += 1
            tensors = [value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor)]
            reachable = self._reachable
            self._reachable = reachable + [_range(tensor) for tensor in tensors if tensor.numel()]
            try:
                return launch(executor, *arguments, **named)
            finally:
                self._reachable = reachable

        for owner, name, counted in (
            (InterpreterBuilder, "create_masked_load", counted_load),
            (InterpreterBuilder, "create_masked_store", counted_store),
            (InterpreterBuilder, "create_atomic_rmw", counted_atomic),
            (GridExecutor, "__call__", counted_launch),
        ):
            self._patches.enter_context(mock.patch.object(owner, name, counted))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def _bytes(self, pointers: Any, mask: Any) -> int:
        itemsize = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
        if addresses.size:
            self._require_reachable(addresses, itemsize)
        return int(addresses.size) * itemsize

    def _require_reachable(self, addresses: NDArray[np.int64], itemsize: int) -> None:
        inside = np.zeros(addresses.shape, dtype=bool)
        for first, last in self._reachable:
            inside |= (addresses >= first) & (addresses + itemsize <= last)
            if inside.all():
                return
        stray = addresses[~inside]
        nearest = min(self._reachable, key=lambda ends: min(abs(stray[0] - ends[0]), abs(stray[0] - ends[1])))
        raise AssertionError(
            f"{stray.size} accesses of {itemsize} bytes lie outside every tensor, the first of them "
            f"{stray[0] - nearest[0]} bytes from the start of a tensor of {nearest[1] - nearest[0]} bytes"
        )


def _range(tensor: torch.Tensor) -> tuple[int, int]:
    assert tensor.is_contiguous(), "a strided tensor has gaps that a kernel must not touch either"
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
