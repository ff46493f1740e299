"""cp.async.bulk from global to shared memory, and the barriers in shared memory that count its bytes (mbarrier).

A copy lands when someone asks whether its barrier's phase is complete, and nothing but copies is missing: as late as
it may. It reads global memory then. Until it has landed, an access to the bytes that it writes is a fault, and so is a
copy to bytes that another warp has read since the last barrier of the block. A phase that no copy can complete is a
fault. A warp that does not wait is not noticed if another one did.

A barrier is initialised by a store to shared memory: other warps see it behind a barrier of the block, and copies see
it behind a fence, of the thread that stored.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .formats import Array
from .phases import Phases
from .program import Fault, Instruction, Program, Unsupported

if TYPE_CHECKING:
    from .machine import Execute, Machine, Where

UNIT = 16  # bytes of which sizes and addresses are multiples
_PATIENCE = 1000  # how often a phase that lacks arrivals is asked for in vain before it counts as never complete


class _Copy(NamedTuple):
    """Bytes under way from an address to an offset of shared memory; lane: which started it."""

    lane: int
    address: int
    offset: int
    size: int


@dataclass
class _Barrier(Phases):
    """A barrier of copies.

    Attributes:
        lane: the lane that initialised it.
        visible: whether copies see it: after a fence of that lane.
        asked: how often the current phase was asked for while arrivals were missing.
        copies: those under way.
    """

    lane: int = 0
    visible: bool = False
    asked: int = 0
    copies: list[_Copy] = field(default_factory=list)


class CopyBarriers:
    """The barriers in the shared memory of a machine, by their offsets."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._barriers: defaultdict[int, _Barrier | None] = defaultdict(lambda: None)

    def start(self, offset: int, lane: int, expected: int) -> None:
        self._machine.shared.store(np.array([offset]), np.array([lane]), 8, 0, np.zeros(1, np.uint64))
        self._barriers[offset] = _Barrier(expected, lane=lane)

    def fence(self, active: Array) -> None:
        """The lanes in `active` show copies the barriers that they have initialised."""
        for barrier in self._barriers.values():
            if barrier is not None:
                barrier.visible |= bool(active[barrier.lane])

    def arrive(self, offset: int, lane: int, announced: int) -> None:
        self._of(offset, lane).arrive(lane, 1, announced)

    def copy(self, barrier_offset: int, copy: _Copy) -> None:
        """Start a copy whose bytes the barrier counts."""
        machine, units = self._machine, np.arange(copy.size // UNIT)
        addresses, lanes = copy.address + UNIT * units, np.full(units.size, copy.lane)
        try:
            machine.memory.check(addresses, UNIT)
            machine.owners.read(addresses, lanes, UNIT)
            machine.shared.expect_copy(copy.offset, copy.lane, copy.size)
        except Fault as fault:
            raise Fault(str(fault), copy.lane) from None
        machine.counts.count_global(machine.counts.loads, addresses, lanes, UNIT)
        machine.counts.shared_wavefronts += copy.size // 128
        machine.counts.shared_ideal += copy.size // 128
        barrier = self._of(barrier_offset, copy.lane)
        if not barrier.visible:
            raise Fault("a barrier for a copy without a fence after it was initialised", copy.lane)
        barrier.copies.append(copy)

    def complete(self, offset: int, lane: int, parity: int) -> bool:
        """Whether the phase of this parity is complete, now that someone waits for it."""
        barrier = self._of(offset, lane)
        if barrier.is_complete(parity):
            return True
        if barrier.missing:
            barrier.asked += 1
            if barrier.asked > _PATIENCE:
                raise Fault(f"a phase of a barrier for which {barrier.missing} arrivals never come", lane)
            return False
        coming = sum(copy.size for copy in barrier.copies)
        if coming != barrier.bytes:
            raise Fault(f"a phase of a barrier that expects {barrier.bytes} bytes, of which {coming} come", lane)
        barrier.asked = 0
        for copy in barrier.copies:
            self._machine.shared.land_copy(copy.offset, self._read(copy))
            barrier.land(copy.size)
        barrier.copies.clear()
        return True

    def _read(self, copy: _Copy) -> Array:
        words = copy.address + 8 * np.arange(copy.size // 8)
        return np.ascontiguousarray(self._machine.memory.load(words, 8, 0)).view(np.uint8)

    def _of(self, offset: int, lane: int) -> _Barrier:
        barrier = self._barriers[offset]
        if barrier is None:
            raise Fault("a barrier that was not initialised", lane)
        return barrier

    def require_visible(self, offsets: Array, lanes: Array) -> None:
        """Lanes use the barriers at these offsets: they must see that these were initialised."""
        try:
            self._machine.shared.load(offsets, lanes, 8, 0)
        except Fault as fault:
            raise Fault(str(fault), int(lanes[fault.lane or 0])) from None


def needs_clocks(program: Program) -> bool:
    """Whether warps of a program meet in parts, by mbarriers for more than bulk copies without a tensor map."""
    kinds = {each.parts[:4] for each in program.instructions if each.parts[0] in ("mbarrier", "cp")}
    copies = any(parts[:3] == ("cp", "async", "bulk") and parts[3] != "tensor" for parts in kinds)
    return not copies and any(parts[0] == "mbarrier" for parts in kinds)


def proxy_fence(machine: Machine, instruction: Instruction) -> Execute:
    """fence.proxy.async, and fence.mbarrier_init, which is for barriers alone."""

    def execute(where: Where) -> None:
        active = np.broadcast_to(where, machine.lanes)
        machine.copy_barriers.fence(active)
        if "proxy" in instruction.parts:
            machine.shared.fence_proxy(active)

    return execute


def bulk(machine: Machine, instruction: Instruction) -> Execute:
    """cp.async.bulk, mbarrier.init, mbarrier.arrive.expect_tx and mbarrier.try_wait.parity, within a block."""
    parts, operands = instruction.parts, instruction.operands
    barriers = machine.copy_barriers

    def offsets(operand: object, lanes: Array, width: int) -> list[int]:
        base, offset = machine.address(operand, bits=32)  # type: ignore[arg-type]
        places = base[lanes].astype(np.int64) + offset
        found: list[int] = machine.shared.offsets(places, lanes, width).tolist()
        return found

    if parts[:2] == ("mbarrier", "init"):
        count = machine.source(operands[1], "b32")

        def initialise(where: Where) -> None:
            lanes = machine.active(where)
            places = offsets(operands[0], lanes, 8)
            for offset, lane, expected in zip(places, lanes.tolist(), count[lanes].tolist(), strict=True):
                barriers.start(offset, lane, expected)

        return initialise
    if parts[:3] == ("mbarrier", "arrive", "expect_tx") and operands[0] == "_":
        announced = machine.source(operands[2], "b32")

        def arrive(where: Where) -> None:
            lanes = machine.active(where)
            for offset, lane in zip(offsets(operands[1], lanes, 8), lanes.tolist(), strict=True):
                barriers.arrive(offset, lane, int(announced[lane]))

        return arrive
    if parts[:3] == ("mbarrier", "try_wait", "parity"):
        parities, target = machine.source(operands[2], "b32"), machine.target(operands[0], "pred")

        def wait(where: Where) -> None:
            lanes = machine.active(where)
            done = np.zeros(machine.lanes, bool)
            places = np.array(offsets(operands[1], lanes, 8))
            barriers.require_visible(places, lanes)
            asked = np.stack([places, parities[lanes]], axis=1)
            kinds, first, inverse = np.unique(asked, axis=0, return_index=True, return_inverse=True)
            answers = [
                barriers.complete(int(offset), int(lanes[place]), int(parity))
                for (offset, parity), place in zip(kinds, first, strict=True)
            ]
            done[lanes] = np.array(answers)[inverse.reshape(-1)]
            target(done, where)

        return wait
    if parts[:3] == ("cp", "async", "bulk") and "mbarrier::complete_tx::bytes" in parts and "global" in parts:
        to, source, size, barrier = operands
        addresses, offset = machine.address(source, bits=64)
        sizes = machine.source(size, "b32")

        def copy(where: Where) -> None:
            lanes = machine.active(where)
            targets, places = offsets(to, lanes, UNIT), offsets(barrier, lanes, 8)
            for lane, start, place in zip(lanes.tolist(), targets, places, strict=True):
                if sizes[lane] % UNIT:
                    raise Fault(f"a bulk copy of {sizes[lane]} bytes, which is no multiple of {UNIT}", lane)
                barriers.copy(place, _Copy(lane, int(addresses[lane]) + offset, start, int(sizes[lane])))

        return copy
    raise Unsupported(instruction.opcode)


COPY_BARRIERS = {"mbarrier": bulk}
