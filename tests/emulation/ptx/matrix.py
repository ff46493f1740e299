"""ldmatrix, stmatrix and mma.sync: tiles that the 32 lanes of a warp hold together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .formats import Array, decode
from .program import Fault, Instruction, Unsupported
from .transfers import elements_of, on_lanes

if TYPE_CHECKING:
    from .machine import Execute, Machine, Where

_ROW = 16  # bytes, of eight elements of two


def _whole_warps(where: Where, lanes: int) -> Array:
    """Which warps take part: (warps,) bool. A warp takes part as a whole."""
    active = np.broadcast_to(where, lanes).reshape(-1, 32)
    some: Array = active.any(axis=1)
    torn = some & ~active.all(axis=1)
    if torn.any():
        raise Fault("an instruction for a whole warp, run by some of its lanes", int(torn.argmax()) * 32)
    return some


def _row_lanes(warps: Array, tiles: int) -> Array:
    """Lanes that hold the addresses of rows: the first eight for the first tile, and so on."""
    return (np.flatnonzero(warps)[:, None] * 32 + np.arange(8 * tiles)).reshape(-1)


def _ldmatrix(machine: Machine, instruction: Instruction) -> Execute:
    """ldmatrix.sync.aligned.m8n8.x{1,2,4}{.trans}.shared.b16 {d, ...}, [a].

    Lane l gets elements 2 * (l % 4) and the one after it of row l // 4, or of that column with .trans.
    """
    registers, address = instruction.operands
    base, offset = machine.address(address, bits=32)
    targets = [machine.target(name, "b32") for name in elements_of(registers)]
    transposed = "trans" in instruction.parts
    shared, counts = machine.shared, machine.counts
    if "m8n8" not in instruction.parts or "b16" not in instruction.parts:
        raise Unsupported(instruction.text)

    def execute(where: Where) -> None:
        warps = _whole_warps(where, machine.lanes)
        lanes = _row_lanes(warps, len(targets))
        with on_lanes(lanes):
            offsets = shared.offsets(base[lanes].astype(np.int64) + offset, lanes, _ROW)
            rows = np.stack([shared.load(offsets, lanes, 8, half) for half in range(2)], axis=1)
        counts.count_shared(offsets, lanes, _ROW)
        tiles = rows.view(np.uint16).reshape(-1, len(targets), 8, 8)
        tiles = np.ascontiguousarray(tiles.swapaxes(2, 3) if transposed else tiles)
        result = np.zeros((len(targets), len(warps), 32), np.uint32)
        result[:, warps] = tiles.view(np.uint32).reshape(-1, len(targets), 32).swapaxes(0, 1)
        for target, values in zip(targets, result, strict=True):
            target(values.reshape(-1), where)

    return execute


def _stmatrix(machine: Machine, instruction: Instruction) -> Execute:
    """stmatrix, the other way round."""
    address, registers = instruction.operands
    base, offset = machine.address(address, bits=32)
    sources = [machine.source(name, "b32") for name in elements_of(registers)]
    transposed = "trans" in instruction.parts
    shared, counts = machine.shared, machine.counts
    if "m8n8" not in instruction.parts or "b16" not in instruction.parts:
        raise Unsupported(instruction.text)

    def execute(where: Where) -> None:
        warps = _whole_warps(where, machine.lanes)
        lanes = _row_lanes(warps, len(sources))
        values = np.stack([source.reshape(-1, 32)[warps] for source in sources], axis=1)
        tiles = values.view(np.uint16).reshape(-1, len(sources), 8, 8)
        tiles = np.ascontiguousarray(tiles.swapaxes(2, 3) if transposed else tiles)
        rows = tiles.view(np.uint64).reshape(-1, 2)
        with on_lanes(lanes):
            offsets = shared.offsets(base[lanes].astype(np.int64) + offset, lanes, _ROW)
            for half in range(2):
                shared.store(offsets, lanes, 8, half, rows[:, half])
        counts.count_shared(offsets, lanes, _ROW)

    return execute


def _mma(machine: Machine, instruction: Instruction) -> Execute:
    """mma.sync.aligned.m16n8kK.row.col.f32.A.B.f32 d, a, b, c: d = a b + c.

    Products are exact, their sum with c is taken in float64 and rounded once to float32. A GPU aligns and cuts the
    products of an instruction in a way that is not documented; it may differ in the last bits.
    """
    shape, kind = instruction.parts[3], instruction.parts[-2]
    if (shape, kind) not in _DEPTH or instruction.parts[-4] != "f32" or instruction.parts[-1] != "f32":
        raise Unsupported(instruction.opcode)
    depth = _DEPTH[shape, kind]
    d, a, b, c = map(elements_of, instruction.operands)
    a_registers, b_registers = ([machine.source(name, "b32") for name in names] for names in (a, b))
    c_registers = [machine.source(name, "f32") for name in c]
    targets = [machine.target(name, "f32") for name in d]

    def execute(where: Where) -> None:
        warps = _whole_warps(where, machine.lanes)
        # Registers of a: rows 0 to 7, rows 8 to 15, then both again for the upper half of the columns.
        parts = [elements(values, kind) for values in a_registers]
        left = np.concatenate([np.concatenate(parts[row::2], axis=2) for row in range(2)], axis=1)
        right = np.concatenate([elements(values, kind) for values in b_registers], axis=2)
        start = [np.stack(c_registers[row : row + 2], axis=1).reshape(-1, 8, 8) for row in (0, 2)]
        total = np.matmul(left, right.swapaxes(1, 2)) + np.concatenate(start, axis=1)
        result = total.astype(np.float32).reshape(-1, 2, 32, 2)
        for number, target in enumerate(targets):
            target(result[:, number // 2, :, number % 2].reshape(-1), where)
        machine.counts.mma_flops += 2 * 16 * 8 * depth * int(np.count_nonzero(warps))

    return execute


_DEPTH = {
    ("m16n8k16", "bf16"): 16,
    ("m16n8k8", "bf16"): 8,
    ("m16n8k16", "f16"): 16,
    ("m16n8k8", "f16"): 8,
    ("m16n8k8", "tf32"): 8,
    ("m16n8k4", "tf32"): 4,
}


def elements(values: Array, kind: str) -> Array:
    """(warps, 8, columns) float64: lane l holds what is in row l // 4, one or two columns of it."""
    if kind == "tf32":
        # The tensor cores look at 10 bits of the fraction.
        exact = (values & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    else:
        exact = decode(values.view(np.uint16), kind)
    return exact.reshape(values.size // 32, 8, -1)


MATRIX = {"ldmatrix": _ldmatrix, "stmatrix": _stmatrix, "mma": _mma}
