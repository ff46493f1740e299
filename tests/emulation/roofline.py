"""The minimum time of a launch, predicted from its compiled code: a roofline, not a measurement.

The time of a launch is that of the resource that it keeps busy longest:

    dram      the bytes of the contract, times the traffic that the interpreter counted
    l2        32-byte sectors that blocks request, 64 bytes a cycle for a multiprocessor; an atomic operation of a lane
              on global memory is taken for one, and that lanes and blocks wait for each other at an address is not
    tensor    operations of matrix instructions, masked and padded ones included
    fp32, fp64, special (ex2, rcp, rsqrt ...)    results of their units
    issue     instructions, four a cycle for a multiprocessor
    shared    passes over shared memory, one a cycle for a multiprocessor

All multiprocessors share the DRAM; each has its own units for the rest, so the multiprocessor with the most blocks
decides. DRAM reaches its rate only if enough bytes are in flight (Little's law): the bytes that a block requests before
it waits, times the blocks that fit by registers, warps and shared memory (idle blocks are counted, too). Counts are
those of emulated blocks, of PTX, not of machine instructions. Caches are cold; the time from host to GPU is left out
(see LAUNCH); latencies other than that of DRAM are assumed to be hidden.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from .compilation import Facts
from .ptx.counts import Counts
from .resources import Limits, Machine

# Of the published peaks; the rest of what kernels attain on machines of this kind: a copy of device memory 3.0 of
# 3.35 TB/s on an H100 and 4.3 of 4.8 on an H200, products of large matrices of bfloat16 790 of 989 TFLOP/s.
ATTAINABLE_DRAM = 0.90
ATTAINABLE_TENSOR = 0.80

LATENCY = 600e-9  # of DRAM under load, seconds; an assumption for all four machines
LAUNCH = 3e-6  # from launch to launch of a stream, seconds, where no CUDA graph is used; in no fraction
# Blocks of a launch to emulate: more if they take few warp instructions. Idle blocks are quick.
SAMPLES = (5, 25, 125, 625)
MOST_INSTRUCTIONS = 20_000

SPECIAL = ("ex2.", "lg2.", "rcp.", "rsqrt.", "sqrt.", "tanh.", "sin.", "cos.", "div.")
TILES = re.compile(r"^ldmatrix\..*\.x([124])")
ARITHMETIC = ("add.", "sub.", "mul.", "fma.", "max.", "min.", "mad.")

Block = tuple[int, int, int]


def sampled(count: int) -> Callable[[Block], Collection[Block]]:
    """A function from a grid to about `count` blocks that represent it: the middles of equal parts of each axis."""

    def blocks(grid: Block) -> Collection[Block]:
        x, y, z = grid

        def middle(part: int, size: int) -> int:
            return int((part % count + 0.5) / count * size)

        if x * y * z <= count:
            return set(product(range(x), range(y), range(z)))
        # Steps without a common divisor with `count` pair every part of an axis with every other.
        return {(middle(number, x), middle(2 * number, y), middle(3 * number, z)) for number in range(count)}

    return blocks


@dataclass(frozen=True)
class Work:
    """The work of all blocks of a launch. fp32, fp64, special: results of a thread; issue: instructions of a warp."""

    blocks: int
    l2_bytes: float
    tensor: float
    fp32: float
    fp64: float
    special: float
    issue: float
    shared: float


def work(counts: Counts, ran: int, blocks: int, by_groups: bool = False) -> Work:
    """The work of all `blocks`, from the counts of `ran` blocks that represent them.

    by_groups: the counts are of code for sm_80, but the code to predict multiplies by groups of warps: these read
    shared memory themselves, at the rate of the matrix units, and one instruction does the work of many.
    """
    scale = blocks / ran
    replaced = {
        opcode: number
        for opcode, number in counts.instructions.items()
        if by_groups and opcode.startswith(("ldmatrix.", "mma.sync"))
    }
    # ldmatrix.x4 reads four tiles of 128 bytes, a pass each.
    passes = sum(number * int(tiles[1]) for opcode, number in replaced.items() if (tiles := TILES.search(opcode)))
    classes = {"fp32": 0.0, "fp64": 0.0, "special": 0.0}
    for opcode, number in counts.instructions.items():
        if kind := _unit(opcode):
            classes[kind] += number * 32 * scale * (2 if "f32x2" in opcode else 1)
    return Work(
        blocks=blocks,
        l2_bytes=(counts.loads.sectors + counts.stores.sectors + counts.global_atomics) * 32 * scale,
        tensor=counts.mma_flops * scale,
        issue=(counts.instructions.total() - sum(replaced.values())) * scale,
        shared=(counts.shared_wavefronts - passes) * scale,
        **classes,
    )


def _unit(opcode: str) -> str | None:
    if ".f64" in opcode and opcode.startswith((*ARITHMETIC, "cvt.")):
        return "fp64"
    if opcode.startswith(SPECIAL) and ".f32" in opcode:
        return "special"
    return "fp32" if opcode.startswith(ARITHMETIC) and ".f32" in opcode else None


def resident_blocks(limits: Limits, registers: int, shared: int, warps: int) -> int:
    """Blocks that fit on a multiprocessor at a time; 0 if none fits.

    CUDA's rules: each of four partitions has 16,384 registers and gives them to a warp by 256; a block takes shared
    memory by 128 bytes and 1 KiB more, for the system.
    """
    if shared > limits.shared_block:
        return 0
    warps_by_registers = 4 * (16384 // (math.ceil(max(registers, 1) * 32 / 256) * 256))
    by_shared = limits.shared_multiprocessor // (math.ceil((shared + 1024) / 128) * 128)
    return min(warps_by_registers // warps, limits.warps // warps, by_shared, limits.blocks)


@dataclass(frozen=True)
class Prediction:
    """A predicted time.

    Attributes:
        seconds: without the time to launch.
        parts: seconds of each resource; `bound` names the one with the maximum.
        resident: blocks on a multiprocessor at a time.
    """

    seconds: float
    bound: str
    parts: Mapping[str, float]
    resident: int


def predict(machine: Machine, facts: Facts, work: Work, dram_bytes: float) -> Prediction:
    """Predict one launch of the code that `facts` describes, which is for the machine's target."""
    resident = resident_blocks(machine.limits, facts.registers, facts.shared, facts.warps)
    if resident == 0:
        raise ValueError(f"{facts} does not fit on a {machine.name}")
    under_way = min(work.blocks, resident * machine.multiprocessors) * max(facts.in_flight, 1)
    # The work of all blocks is taken as that of the busiest multiprocessor, times the multiprocessors.
    uneven = math.ceil(work.blocks / machine.multiprocessors) * machine.multiprocessors / work.blocks
    cycles = machine.clock * machine.multiprocessors / uneven
    parts = {
        "dram": max(LATENCY, dram_bytes / min(ATTAINABLE_DRAM * machine.bandwidth, under_way / LATENCY)),
        "l2": work.l2_bytes / (64 * cycles),
        "tensor": work.tensor * uneven / (ATTAINABLE_TENSOR * machine.tensor),
        "fp32": work.fp32 / (machine.fp32_lanes * cycles),
        "fp64": work.fp64 / (machine.fp64_lanes * cycles),
        "special": work.special / (machine.special_lanes * cycles),
        "issue": work.issue / (4 * cycles),
        "shared": work.shared / cycles,
    }
    bound = max(parts, key=lambda name: parts[name])
    return Prediction(parts[bound], bound, parts, resident)


def predict_call(
    machine: Machine, facts: Sequence[Facts], works: Sequence[Work], dram_bytes: float
) -> tuple[float, Prediction]:
    """The seconds of all launches of a call, and the prediction of the longest. Bytes are divided by sectors."""
    asked = sum(work.l2_bytes for work in works)
    predictions = [
        predict(machine, each, work, dram_bytes * work.l2_bytes / asked)
        for each, work in zip(facts, works, strict=True)
    ]
    return sum(each.seconds for each in predictions), max(predictions, key=lambda each: each.seconds)


def roof(machine: Machine, minimum_bytes: int, operations: int) -> float:
    """The minimum seconds that the contract of an op allows, at the published peaks."""
    return max(minimum_bytes / machine.bandwidth, operations / machine.tensor)
