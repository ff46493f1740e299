"""Count the bytes that kernels move under the interpreter, and refuse accesses that no correct kernel makes.

    with Traffic(*tensors) as traffic:
        launcher(...)
    traffic.loaded, traffic.stored, traffic.launches

`tensors` are those that kernels reach by addresses from a table; tensors that are passed to a launch are known. Lanes
that are masked off count nothing. A byte that is loaded, or stored, several times in a launch counts once, as if caches
were infinite. Fault is raised for:

- an access outside the elements of these tensors, gaps of strided ones included (but neighbours in memory look like
  one tensor);
- a byte that two programs of a launch store, with any values, unless by atomics;
- a pointer that is not as aligned or contiguous as the kernel promises (tl.multiple_of with tl.max_contiguous);
- a load of what another program stored, unless it was released and acquired (visibility.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle, interpreter_builder
from triton.runtime.jit import TensorWrapper
from triton.tools.tensor_descriptor import TensorDescriptor

from .intervals import Intervals, of_accesses, union
from .visibility import Visibility

Program = tuple[int, int, int]


class Fault(AssertionError):
    """An access that no correct kernel makes."""


@dataclass
class Launch:
    """One launch. loaded, stored: bytes, each once. requested_*: bytes of all lanes. atomics: read-modify-writes."""

    kernel: str
    programs: int = 0
    loaded: int = 0
    stored: int = 0
    requested_loaded: int = 0
    requested_stored: int = 0
    atomics: int = 0


class Traffic:
    """Counts of all launches. kernels: the record of each. The other attributes are their sums."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.kernels: list[Launch] = []
        self._table = [(f"table tensor #{number}", tensor) for number, tensor in enumerate(tensors)]
        self._patches = ExitStack()

    loaded = property(lambda self: sum(launch.loaded for launch in self.kernels))
    stored = property(lambda self: sum(launch.stored for launch in self.kernels))
    requested_loaded = property(lambda self: sum(launch.requested_loaded for launch in self.kernels))
    requested_stored = property(lambda self: sum(launch.requested_stored for launch in self.kernels))
    atomics = property(lambda self: sum(launch.atomics for launch in self.kernels))
    launches = property(lambda self: len(self.kernels))

    def __enter__(self) -> Traffic:
        def watch(owner: type, name: str, watching: Callable[..., Any]) -> None:
            if stock := getattr(owner, name, None):
                watched = lambda *arguments, **named: watching(stock, *arguments, **named)  # noqa: E731
                self._patches.enter_context(mock.patch.object(owner, name, watched))

        watch(GridExecutor, "__call__", self._launch)
        watch(InterpreterBuilder, "create_masked_load", self._load)  # also loads without a mask and by descriptor
        watch(InterpreterBuilder, "create_masked_store", self._store)
        watch(InterpreterBuilder, "create_atomic_rmw", self._atomic)
        watch(InterpreterBuilder, "create_atomic_cas", self._compare_and_swap)
        watch(InterpreterBuilder, "create_barrier", self._barrier)
        watch(TensorHandle, "set_attr", self._promise)
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def _launch(self, stock: Callable[..., Any], executor: GridExecutor, *arguments: Any, **named: Any) -> None:
        passed = {**dict(zip(executor.arg_names, arguments, strict=False)), **named}
        tensors = [*self._table, *(found for name, value in passed.items() for found in _tensors(name, value))]
        self._reach = _Reach([(name, tensor) for name, tensor in tensors if tensor.numel()])
        self._loads: list[Intervals] = []
        self._stores: dict[Program, list[Intervals]] = defaultdict(list)
        self._visibility = Visibility()
        self.kernels.append(Launch(executor.fn.__name__))
        try:
            stock(executor, *arguments, **named)
        except InterpreterError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, Fault):
                cause = cause.__cause__
            if cause is None:
                raise
            raise cause from None
        self._finish(self.kernels[-1])

    def _finish(self, launch: Launch) -> None:
        launch.programs = int(np.prod(interpreter_builder.grid_dim))
        launch.loaded = union(self._loads).bytes()
        written = {program: union(stores) for program, stores in self._stores.items()}
        launch.stored = union(list(written.values())).bytes()
        if launch.stored < sum(intervals.bytes() for intervals in written.values()):
            raise Fault(f"{launch.kernel}: {self._first_race(written)}")
        if launch.stored and union(self._loads).shared(union(list(written.values()))):
            for reader, writer, intervals in self._visibility.early():
                place = self._reach.place(int(intervals.starts[0]))
                what = f"program {reader} reads what {writer} stored, not released and acquired, near {place}"
                raise Fault(f"{launch.kernel}: {what}")

    def _first_race(self, written: dict[Program, Intervals]) -> str:
        programs = list(written)
        owners = np.repeat(np.arange(len(programs)), [len(written[program].starts) for program in programs])
        starts = np.concatenate([intervals.starts for intervals in written.values()])
        ends = np.concatenate([intervals.ends for intervals in written.values()])
        order = np.argsort(starts, kind="stable")
        starts, ends, owners = starts[order], ends[order], owners[order]
        second = 1 + int(np.flatnonzero(starts[1:] < np.maximum.accumulate(ends)[:-1])[0])
        first = int(np.argmax(ends[:second]))
        return (
            f"programs {programs[owners[first]]} and {programs[owners[second]]} both store "
            f"{self._reach.place(int(starts[second]))}"
        )

    def _load(self, stock: Callable[..., Any], builder: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        requested, intervals = self._access("load", builder, pointers, mask)
        self.kernels[-1].requested_loaded += requested
        self._loads.append(intervals)
        self._visibility.load(builder.grid_idx, intervals)
        return stock(builder, pointers, mask, *rest, **named)

    def _store(self, stock: Callable[..., Any], builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        requested, intervals = self._access("store", builder, pointers, mask)
        self.kernels[-1].requested_stored += requested
        self._stores[builder.grid_idx].append(intervals)
        self._visibility.store(builder.grid_idx, intervals)
        return stock(builder, pointers, value, mask, *rest)

    def _atomic(
        self, stock: Callable[..., Any], builder: Any, kind: Any, pointers: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        requested, touched = self._access("atomic", builder, pointers, mask)
        self.kernels[-1].atomics += requested // value.data.itemsize
        self._visibility.atomic(builder.grid_idx, touched, rest[0])
        return stock(builder, kind, pointers, value, mask, *rest)

    def _compare_and_swap(
        self, stock: Callable[..., Any], builder: Any, pointers: Any, expected: Any, value: Any, *rest: Any
    ) -> Any:
        requested, touched = self._access("atomic", builder, pointers, None)
        self.kernels[-1].atomics += requested // value.data.itemsize
        self._visibility.atomic(builder.grid_idx, touched, rest[0])
        return stock(builder, pointers, expected, value, *rest)

    def _barrier(self, stock: Callable[..., Any], builder: Any) -> Any:
        self._visibility.barrier(builder.grid_idx)
        return stock(builder)

    def _promise(self, stock: Callable[..., Any], handle: Any, name: str, values: Any) -> None:
        stock(handle, name, values)
        known = [handle.attr.get(f"tt.{each}") for each in ("divisibility", "contiguity")]
        if None in known or handle.data.ndim != 1:
            return
        (divisor,), (length,) = known
        size = handle.get_element_ty().primitive_bitwidth // 8 if hasattr(handle.dtype, "element_ty") else 1
        runs = handle.data.astype(np.int64).reshape(-1, length)
        if (runs[:, 0] % divisor != 0).any() or (np.diff(runs) != size).any():
            raise Fault(f"{self.kernels[-1].kernel}: not runs of {length}, aligned to {divisor}, as promised")

    def _access(self, kind: str, builder: InterpreterBuilder, pointers: Any, mask: Any) -> tuple[int, Intervals]:
        """The bytes of all lanes, and their addresses. Raises Fault for bytes outside of all tensors."""
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = pointers.data.ravel()
        if mask is not None:
            addresses = addresses[np.broadcast_to(np.asarray(mask.data), pointers.data.shape).ravel()]
        addresses = addresses.astype(np.int64)
        intervals = of_accesses(addresses, itemsize)
        if stray := self._reach.stray(intervals, addresses, itemsize):
            raise Fault(f"{kind} by program {builder.grid_idx} of {self.kernels[-1].kernel}: {stray}")
        return addresses.size * itemsize, intervals


class _Reach:
    """The bytes of the elements of some tensors."""

    def __init__(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        self._elements = {name: _elements(tensor) for name, tensor in tensors}
        self._all = union(list(self._elements.values()))

    def stray(self, intervals: Intervals, addresses: NDArray[np.int64], itemsize: int) -> str | None:
        if self._holds(intervals).all():
            return None
        lanes = addresses[~self._holds(Intervals(addresses, addresses + itemsize))]
        return f"{lanes.size} lanes outside every tensor, the first at {self.place(int(lanes[0]))} ({itemsize} bytes)"

    def _holds(self, intervals: Intervals) -> NDArray[np.bool_]:
        if not self._all.starts.size:
            return np.zeros(intervals.starts.shape, bool)
        number = np.searchsorted(self._all.starts, intervals.starts, side="right") - 1
        return (number >= 0) & (intervals.ends <= self._all.ends[number])

    def place(self, address: int) -> str:
        """`address` in words, relative to the nearest tensor."""
        if not self._elements:
            return f"address {address:#x}, and no tensor was passed"

        def distance(elements: Intervals) -> int:
            return max(int(elements.starts[0]) - address, address - int(elements.ends[-1]) + 1, 0)

        name, elements = min(self._elements.items(), key=lambda item: distance(item[1]))
        first, last = int(elements.starts[0]), int(elements.ends[-1])
        return f"byte {address - first} of {name}, which spans {last - first} bytes and has {elements.bytes()}"


def _tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, tuple):
        for number, item in enumerate(value):
            yield from _tensors(f"{name}[{number}]", item)
    elif isinstance(value, TensorDescriptor | TensorWrapper):
        yield from _tensors(name, value.base)
    elif isinstance(value, torch.Tensor):
        yield f"'{name}'", value


def _elements(tensor: torch.Tensor) -> Intervals:
    """The bytes of a tensor's elements; inner dimensions without gaps are one range."""
    run = tensor.element_size()
    starts = np.array([tensor.data_ptr()])
    steps = [stride * tensor.element_size() for stride in tensor.stride()]
    for step, size in sorted(zip(steps, tensor.shape, strict=True)):
        if step == run:
            run *= size
        elif step and size > 1:
            starts = (np.arange(size)[:, None] * step + starts).ravel()
    return union([Intervals(starts, starts + run)])
