"""The evidence that a case gives when its launch runs in the interpreter or as emulated PTX."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor
from triton.runtime.interpreter import interpreter_builder as builder

from arcmerge.kernels import target as kernels_target
from cases import Blank, Call, Case, Random, disagreement
from cases.corners import Corner

from .compilation import short
from .traffic import Traffic

Seen = TypeVar("Seen")


@dataclass(frozen=True)
class Evidence:
    """error: the maximum error of the outputs, as a share of its tolerance. ratio: bytes moved over the minimum."""

    outputs: dict[str, Tensor]
    error: float
    ratio: float | None = None


def targets_of(case: Case, targets: Sequence[str]) -> list[str]:
    """Those of `targets` for which the launcher chooses another grid, or other constants, than for the ones before."""
    chosen: dict[tuple[Any, ...], str] = {}
    call = case.build(Blank())
    for target in targets:
        launches = [(each.kernel, each.grid, *each.constants.items()) for each in launches_of(call, target)]
        chosen.setdefault(tuple(launches), target)
    return list(chosen.values())


class Launch(NamedTuple):
    """What a launcher chooses. constants: as text; options: num_warps and so on."""

    kernel: str
    grid: tuple[int, ...]
    constants: dict[str, str]
    options: dict[str, Any]


def launches_of(call: Call, target: str) -> list[Launch]:
    """The launches of a call on a target, none of which runs."""
    launches: list[Launch] = []

    def note(executor: Any, *arguments: Any, **named: Any) -> None:
        passed = {**dict(zip(executor.arg_names, arguments, strict=False)), **named}
        grid = executor.grid(passed) if callable(executor.grid) else executor.grid
        constants = {name: short(passed[name]) for name in executor.constexprs if name in passed}
        options = {name: value for name, value in named.items() if name not in executor.arg_names}
        launches.append(Launch(executor.fn.__name__, tuple(grid), constants, options))

    with _architecture(target), mock.patch.object(GridExecutor, "__call__", note):
        call.launch()
    return launches


@contextmanager
def _architecture(target: str) -> Iterator[None]:
    with mock.patch.object(kernels_target, "architecture", return_value=target):
        yield


def interpreted(case: Case, target: str = "sm_80") -> Evidence:
    """Run a case in the interpreter of this process, which raises a fault for accesses outside of tensors.

    target: the architecture whose tiles the launcher takes.
    """
    call = case.build(Random())
    with _architecture(target):
        traffic, error = _run(call, Traffic(*call.reachable))
    moved = traffic.loaded + traffic.stored
    return Evidence(dict(call.outputs), error, moved / call.minimum_bytes if call.minimum_bytes else None)


@contextmanager
def _only(blocks: Callable[[tuple[int, int, int]], list[tuple[int, int, int]]]) -> Iterator[None]:
    """Context manager: the interpreter runs these blocks of every grid."""
    stock, set_size, set_index = GridExecutor.__call__, builder.set_grid_dim, builder.set_grid_idx

    def run(executor: Any, *arguments: Any, **named: Any) -> None:
        whole = (*executor.grid, 1, 1)[:3]
        chosen = blocks(whole)
        executor.grid = (len(chosen), 1, 1)
        size = mock.patch.object(builder, "set_grid_dim", side_effect=lambda *_: set_size(*whole))
        index = mock.patch.object(builder, "set_grid_idx", side_effect=lambda number, *_: set_index(*chosen[number]))
        with size, index:
            stock(executor, *arguments, **named)

    with mock.patch.object(GridExecutor, "__call__", run):
        yield


def interpreted_corner(corner: Corner, target: str = "sm_80") -> float:
    """The error of the last blocks of a launch, in the interpreter."""
    call = corner.build()
    with _architecture(target), _only(corner.blocks):
        return _run(call, Traffic(*call.reachable))[1]


def emulated_corner(corner: Corner, target: str) -> float:
    """The same as compiled code, in a process that does not interpret."""
    from .emulator import emulating

    call = corner.build()
    return _run(call, emulating(target, ctas=corner.blocks))[1]


def emulated(case: Case, target: str) -> Evidence:
    """Run a case as the PTX for `target`, in a process that does not interpret."""
    from .emulator import emulating

    call = case.build(Random())
    _, error = _run(call, emulating(target, reachable=call.reachable))
    return Evidence(dict(call.outputs), error)


def _run(call: Call, surroundings: AbstractContextManager[Seen]) -> tuple[Seen, float]:
    truths = call.expected()  # first, because a launch may change its inputs
    with surroundings as seen:
        call.launch()
    return seen, max(disagreement(call.outputs[name], truth) for name, truth in truths.items())


def same_values(one: Tensor, other: Tensor) -> bool:
    """Equal element for element, the sign of a zero included; a NaN equals any other."""
    if not one.is_floating_point():
        return torch.equal(one, other)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    both_nan = one.isnan() & other.isnan()
    return bool(((one.view(bits) == other.view(bits)) | both_nan).all())
