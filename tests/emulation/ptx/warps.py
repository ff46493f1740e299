"""What the lanes of a warp do together: shuffles, votes, reductions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .formats import Array, canonical, dtype_of
from .program import Fault, Instruction, Unsupported

if TYPE_CHECKING:
    from .machine import Execute, Machine, Where

_LANE = np.arange(32)


def _taking_part(machine: Machine, where: Where) -> Array:
    """(warps, 32) bool."""
    return np.broadcast_to(where, machine.lanes).reshape(-1, 32)


def _everywhere(values: Array) -> Array:
    """One value a warp, to each of its lanes."""
    return np.repeat(values, 32)


def _shfl(machine: Machine, instruction: Instruction) -> Execute:
    """shfl.sync.mode.b32 d|p, a, b, c, membermask: c holds the last lane (low five bits) and the segments (high)."""
    mode = instruction.parts[2]
    first, *operands = instruction.operands
    name, _, inside_name = str(first).partition("|")
    values, b, c = (machine.source(operand, "b32").reshape(-1, 32) for operand in operands[:3])
    target = machine.target(name, "b32")
    inside_target = machine.target(inside_name or "_", "pred")

    def execute(where: Where) -> None:
        by, clamp, segment = b.astype(np.int64) & 31, c.astype(np.int64) & 31, c.astype(np.int64) >> 8 & 31
        first_lane = _LANE & segment
        last_lane = first_lane | (clamp & ~segment)
        if mode == "up":
            lane = _LANE - by
            inside = lane >= last_lane
        else:
            lane = {"down": _LANE + by, "bfly": _LANE ^ by, "idx": first_lane | (by & ~segment)}[mode]
            inside = lane <= last_lane
        lane = np.where(inside, lane, _LANE)
        if where is not True:
            active = _taking_part(machine, where)
            silent = active & ~np.take_along_axis(active, lane, axis=1)
            if silent.any():
                raise Fault("a shuffle from a lane that does not take part", int(silent.argmax()))
        target(np.take_along_axis(values, lane, axis=1).reshape(-1), where)
        inside_target(inside.reshape(-1), where)

    return execute


def _vote(machine: Machine, instruction: Instruction) -> Execute:
    """vote.sync.{any, all, uni}.pred and vote.sync.ballot.b32."""
    mode = instruction.parts[2]
    name, operand, *_ = (str(operand) for operand in instruction.operands)
    negated = operand.startswith("!")
    values = machine.source(operand.lstrip("!"), "pred").reshape(-1, 32)
    target = machine.target(name, "b32" if mode == "ballot" else "pred")

    def execute(where: Where) -> None:
        active = _taking_part(machine, where)
        yes = active & (values != negated)
        if mode == "ballot":
            result = np.packbits(yes, axis=1, bitorder="little").view(np.uint32).reshape(-1)
        else:
            some, every = yes.any(axis=1), (yes == active).all(axis=1)
            result = {"any": some, "all": every, "uni": ~some | every}[mode]
        target(_everywhere(result), where)

    return execute


def _activemask(machine: Machine, instruction: Instruction) -> Execute:
    target = machine.target(instruction.operands[0], "b32")

    def execute(where: Where) -> None:
        active = _taking_part(machine, where)
        target(_everywhere(np.packbits(active, axis=1, bitorder="little").view(np.uint32).reshape(-1)), where)

    return execute


# Function and what a lane that takes no part counts as.
_FLOAT_REDUCTIONS = {
    ("max", False): (np.fmax, np.nan),
    ("min", False): (np.fmin, np.nan),
    ("max", True): (np.maximum, -np.inf),
    ("min", True): (np.minimum, np.inf),
}
_REDUCTIONS: dict[str, tuple[np.ufunc, Callable[[np.dtype[Any]], int]]] = {
    "add": (np.add, lambda dtype: 0),
    "or": (np.bitwise_or, lambda dtype: 0),
    "xor": (np.bitwise_xor, lambda dtype: 0),
    "and": (np.bitwise_and, lambda dtype: 0xFFFFFFFF),
    "min": (np.minimum, lambda dtype: np.iinfo(dtype).max),
    "max": (np.maximum, lambda dtype: np.iinfo(dtype).min),
}


def _redux(machine: Machine, instruction: Instruction) -> Execute:
    """redux.sync.op.type d, a, membermask."""
    name, kind = instruction.parts[2], instruction.parts[-1]
    dtype = dtype_of(kind)
    if "abs" in instruction.parts:
        raise Unsupported(instruction.opcode)
    if kind == "f32":
        function, absent = _FLOAT_REDUCTIONS[name, "NaN" in instruction.parts]
    else:
        function, neutral = _REDUCTIONS[name]
        absent = neutral(dtype)
    values = machine.source(instruction.operands[1], kind).reshape(-1, 32)
    target = machine.target(instruction.operands[0], kind)

    def execute(where: Where) -> None:
        taking_part = np.where(_taking_part(machine, where), values, dtype.type(absent))
        target(canonical(_everywhere(function.reduce(taking_part, axis=1, dtype=dtype))), where)

    return execute


def _elect(machine: Machine, instruction: Instruction) -> Execute:
    """elect.sync d|p, membermask: p for one of the lanes, here the first, whose index is d."""
    name, _, elected_name = str(instruction.operands[0]).partition("|")
    target, elected = machine.target(name, "b32"), machine.target(elected_name, "pred")

    def execute(where: Where) -> None:
        first = _everywhere(_taking_part(machine, where).argmax(axis=1).astype(np.uint32))
        target(first, where)
        elected(first == np.arange(machine.lanes) % 32, where)

    return execute


WARPS = {"elect": _elect, "shfl": _shfl, "vote": _vote, "activemask": _activemask, "redux": _redux}
