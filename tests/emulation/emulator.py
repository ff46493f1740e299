"""Compile the kernels of launchers and run the compiled PTX, on the CPU tensors that the launchers are given.

    with emulating("sm_80", reachable=tensors_that_tables_point_to) as executions:
        launcher(...)
    executions[0].counts.loads.sectors_per_request

For a process that does not interpret kernels (no TRITON_INTERPRET), because one that does cannot compile them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from .compilation import Driver
from .ptx.barriers import TensorMap
from .ptx.counts import Counts
from .ptx.machine import Block, Machine
from .ptx.memory import GlobalMemory
from .ptx.program import Program, Unsupported, parse

_SCALARS = {"fp16": np.float16, "fp32": np.float32, "fp64": np.float64}


@dataclass
class Execution:
    """One launch: its kernel, its grid, how many of its blocks ran, and counts of their instructions."""

    name: str
    grid: Block
    kernel: CompiledKernel
    blocks: int = 0
    counts: Counts = field(default_factory=Counts)


@contextmanager
def emulating(
    target: str = "sm_80",
    *,
    ctas: Callable[[Block], Collection[Block]] | None = None,
    reachable: Sequence[torch.Tensor] = (),
    edit: Callable[[str], str] | None = None,
    seed: int = 0,
) -> Iterator[list[Execution]]:
    """Context manager: launches run as PTX for `target`; yields a list, to which the execution of each is added.

    A launch raises Fault for an operation that a GPU would not do, or not reliably, and Unsupported for one that is not
    emulated.

    Args:
        ctas: takes a grid and returns the blocks to run, instead of all. Nothing then watches who owns global memory.
        reachable: tensors that kernels reach by addresses in tables; those that are passed to a launch are known.
        edit: changes the PTX, to test that a mistake is found.
        seed: of the order in which blocks run.
    """
    executions: list[Execution] = []
    compile_or_run = JITFunction.run

    def run(function: JITFunction[Any], *arguments: Any, grid: Any, warmup: bool, **named: Any) -> CompiledKernel:
        kernel = compile_or_run(function, *arguments, grid=grid, warmup=True, **named)
        bound = _bound(function, arguments, named)
        sizes = grid(bound) if callable(grid) else grid
        whole: Block = (*map(int, sizes), 1, 1)[:3]  # type: ignore[assignment]
        text = kernel.asm["ptx"]
        program = parse(edit(text) if edit else text)
        execution = Execution(kernel.metadata.name, whole, kernel)
        executions.append(execution)
        if ctas is None:
            blocks = [(x, y, z) for z, y, x in product(*map(range, reversed(whole)))]
        else:
            blocks = sorted(set(ctas(whole)), key=lambda block: block[::-1])
        if blocks:
            values = list(_values(kernel.src.signature, bound))
            bases = [(name, getattr(value, "base", value)) for name, _, value in values]
            tensors = [(name, value) for name, value in bases if isinstance(value, torch.Tensor)]
            tables = [(f"reachable tensor {number}", tensor) for number, tensor in enumerate(reachable)]
            memory = GlobalMemory([*tensors, *tables])
            parameters, maps = _parameters(program, values), _maps(program, values)
            machine = Machine(
                program,
                whole,
                parameters,
                memory,
                kernel.metadata.shared,
                execution.counts,
                len(blocks),
                owned=ctas is None,
                seed=seed,
                maps=maps,
            )
            machine.run(blocks)
            execution.blocks = len(blocks)
        return kernel

    triton.runtime.driver.set_active(Driver(target))
    with mock.patch.object(JITFunction, "run", run):
        yield executions


def _bound(function: JITFunction[Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name, without the options of the compiler."""
    signature = inspect.signature(function.fn)
    bound = signature.bind(*arguments, **{name: value for name, value in named.items() if name in signature.parameters})
    bound.apply_defaults()
    return dict(bound.arguments)


def _values(signature: dict[str, Any], bound: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(name, Triton's type, value) of all arguments at run time, tuples flattened."""

    def leaves(name: str, kind: Any, value: Any) -> Iterator[tuple[str, str, Any]]:
        if isinstance(kind, tuple):
            for number, (inner, element) in enumerate(zip(kind, value, strict=True)):
                yield from leaves(f"{name}[{number}]", inner, element)
        elif kind.startswith("tensordesc"):
            yield name, kind, value
            yield from ((f"{name}.shape", "i32", size) for size in value.shape)
            yield from ((f"{name}.strides", "i64", stride) for stride in value.strides)
        elif kind != "constexpr":
            yield name, kind, value

    for name, kind in signature.items():
        yield from leaves(f"'{name}'", kind, bound[name])


def _parameters(program: Program, values: list[tuple[str, str, Any]]) -> dict[str, Any]:
    """The parameters of the PTX as unsigned integers. Those that Triton adds for scratch memory, at the end, are 0."""
    parameters: dict[str, Any] = {}
    for (name, kind), (_, triton_type, value) in zip(program.parameters.items(), values, strict=False):
        if kind != "map":
            parameters[name] = _encoded(triton_type, value, int(kind[1:]))
    if len(values) > len(program.parameters):
        raise Unsupported(f"{program.name} has fewer parameters than arguments")
    for name, kind in list(program.parameters.items())[len(values) :]:
        parameters[name] = np.zeros((), f"u{int(kind[1:]) // 8}")[()]
    return parameters


def _maps(program: Program, values: list[tuple[str, str, Any]]) -> dict[str, TensorMap]:
    """The tensor maps that the launch would make; a copy takes as many columns as its swizzle has bytes."""
    maps = {}
    for (name, kind), (_, _, value) in zip(program.parameters.items(), values, strict=False):
        if kind == "map":
            size, swizzle = value.base.element_size(), value.layout.swizzle_byte_width
            *rows, columns = value.block_shape
            box = (*rows, min(columns, swizzle // size) if swizzle else columns)
            strides = tuple(stride * size for stride in value.strides)
            maps[name] = TensorMap(value.base.data_ptr(), tuple(value.shape), strides, box, size, max(swizzle, 16))
    return maps


def _encoded(triton_type: str, value: Any, bits: int) -> Any:
    if isinstance(value, torch.Tensor):
        code = value.data_ptr()
    elif triton_type in _SCALARS:
        scalar = np.array(value, _SCALARS[triton_type])
        code = int(scalar.view(f"u{scalar.itemsize}"))
    else:
        code = int(value)
    return np.array(code & (1 << bits) - 1, f"u{bits // 8}")[()]
