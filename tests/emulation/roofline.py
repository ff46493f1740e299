"""The time of a launch, predicted from its compiled code: a model, not a measurement. published.py gives its errors.

A launch takes a node of a CUDA graph, the latencies of accesses to global memory that wait for one another, and the
longest of three:

    dram      the bytes of the contract, times the traffic that the interpreter counted
    l2        32-byte sectors that blocks request, 64 bytes a cycle for a multiprocessor; an atomic operation of a lane
              on global memory is taken for one, and that lanes and blocks wait for each other at an address is not
    a multiprocessor, which has stations:
        tensor    operations of matrix instructions, masked and padded ones included. Those of groups of warps read
                  their operands from shared memory meanwhile, and take the longer of the two
        shared    other passes over shared memory, one a cycle
        scalar    the longest of: results of the units of float32, float64 and special functions (ex2, rcp, rsqrt
                  ...), and instructions issued, four a cycle

A part of a block goes from station to station; while it is at one, other parts may be at the others. How well they
overlap follows from the number of parts: mean value analysis of a closed network of queues (Reiser and Lavenberg 1980).
One part takes the sum of its stations, many take the longest. The parts are the warps of a scheduler, but all warps of
a block together where groups of warps multiply, as these meet at a barrier in each iteration.

All multiprocessors share the DRAM; each has its own units for the rest, so the multiprocessor with the most blocks
decides. DRAM reaches its rate only if enough bytes are in flight (Little's law): the bytes that a block requests before
it waits, times the blocks that fit by registers, warps and shared memory (idle blocks are counted, too). DRAM and
matrix units reach the shares of their peaks that others have measured (resources.py), so no prediction can exceed
these. Counts are those of emulated blocks, of PTX, not of machine instructions. Caches are cold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from .compilation import GROUP_INSTRUCTIONS, Facts
from .ptx.counts import Counts
from .resources import Limits, Machine

LATENCY = 600e-9  # of DRAM under load, seconds; an assumption for all machines
# From kernel to kernel of a CUDA graph on an H100, seconds: "Look Ma, No Bubbles", Hazy Research, 2025-05-27.
NODE = 1.3e-6
# A call of less seconds is mostly launch and latencies, of which the model knows little: it has no share of the roof.
SHORT = 5e-6
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
    shared memory themselves (Code.operand_stretch), and one instruction does the work of many.
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
        shared=(counts.shared_wavefronts - counts.operand_wavefronts - passes) * scale,
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
class Code:
    """What decides how fast a launch does its work.

    Attributes:
        warps, registers, shared, in_flight, dependent_loads, operand_stretch: as in Facts.
        by_groups: groups of warps multiply matrices.
        parts: of a block, which work while others of them wait.
    """

    warps: int
    registers: int
    shared: int
    in_flight: int
    dependent_loads: int = 1
    operand_stretch: float = 1.0
    by_groups: bool = False
    parts: float = 1.0

    @staticmethod
    def of(facts: Facts) -> Code:
        by_groups = facts.matrix > 0 and facts.matrix_instruction in GROUP_INSTRUCTIONS.values()
        return Code(
            facts.warps,
            facts.registers,
            facts.shared,
            facts.in_flight,
            facts.dependent_loads,
            facts.operand_stretch,
            by_groups,
            parts=1.0 if by_groups else max(facts.warps / 4, 1.0),
        )


def overlapped(stations: Sequence[float], parts: float) -> float:
    """The seconds of work on stations with queues, if `parts` of it are under way at a time.

    Exact mean value analysis: a part that arrives at a station waits for those that n - 1 parts leave there on average.
    """
    waiting = [0.0] * len(stations)
    seconds = 0.0
    for number in range(1, max(1, math.floor(parts)) + 1):
        stays = [need * (1 + queue) for need, queue in zip(stations, waiting, strict=True)]
        seconds = sum(stays) / number
        waiting = [stay / seconds if seconds else 0.0 for stay in stays]
    return seconds


@dataclass(frozen=True)
class Prediction:
    """A predicted time.

    Attributes:
        seconds: of the launch and all of its work.
        bound: what takes the longest: "launch", "latency", or a resource of `needs`.
        needs: seconds that each resource is needed.
        resident: blocks on a multiprocessor at a time.
    """

    seconds: float
    bound: str
    needs: Mapping[str, float]
    resident: int


def predict(machine: Machine, code: Code, work: Work, dram_bytes: float) -> Prediction:
    """Predict one launch of code for the machine's target."""
    resident = resident_blocks(machine.limits, code.registers, code.shared, code.warps)
    if resident == 0:
        raise ValueError(f"{code} does not fit on a {machine.name}")
    under_way = min(work.blocks, resident * machine.multiprocessors) * max(code.in_flight, 1)
    # The work of all blocks is taken as that of the busiest multiprocessor, times the multiprocessors.
    busiest = math.ceil(work.blocks / machine.multiprocessors)
    cycles = machine.clock * work.blocks / busiest
    tensor = machine.tensor * work.blocks / (busiest * machine.multiprocessors)
    tensor *= (
        machine.attained_tensor / code.operand_stretch
        if code.by_groups
        else min(machine.attained_tensor, machine.by_warps)
    )
    needs = {
        "dram": dram_bytes / min(machine.attained_bandwidth * machine.bandwidth, under_way / LATENCY),
        "l2": work.l2_bytes / (64 * cycles),
        "tensor": work.tensor / tensor,
        "shared": work.shared / cycles,
        "fp32": work.fp32 / (machine.fp32_lanes * cycles),
        "fp64": work.fp64 / (machine.fp64_lanes * cycles),
        "special": work.special / (machine.special_lanes * cycles),
        "issue": work.issue / (4 * cycles),
    }
    scalar = max(needs[name] for name in ("fp32", "fp64", "special", "issue"))
    parts = min(resident, busiest) * code.parts
    multiprocessor = overlapped((needs["tensor"], needs["shared"], scalar), parts)
    # The last of the accesses that wait for one another is one of those that Little's law counts.
    latency = max(code.dependent_loads - 1, 0) * LATENCY
    seconds = NODE + latency + max(LATENCY, needs["dram"], needs["l2"], multiprocessor)
    longest = {**needs, "launch": NODE, "latency": latency + LATENCY}
    return Prediction(seconds, max(longest, key=lambda name: longest[name]), needs, resident)


def predict_call(
    machine: Machine, codes: Sequence[Code], works: Sequence[Work], dram_bytes: float
) -> tuple[float, Prediction]:
    """The seconds of all launches of a call, and the prediction of the longest. Bytes are divided by sectors."""
    asked = sum(work.l2_bytes for work in works)
    predictions = [
        predict(machine, each, work, dram_bytes * work.l2_bytes / asked)
        for each, work in zip(codes, works, strict=True)
    ]
    return sum(each.seconds for each in predictions), max(predictions, key=lambda each: each.seconds)


def roof(machine: Machine, minimum_bytes: int, operations: int) -> float:
    """The minimum seconds that the contract of an op allows, at the published peaks."""
    return max(minimum_bytes / machine.bandwidth, operations / machine.tensor)
