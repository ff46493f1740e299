"""mbarriers, and the copies by tensor maps that complete them (PTX ISA 9.7.13.15 and 9.7.9.27).

A copy lands as late as it may: when every thread waits. It reads global memory when it is issued, fills what lies
outside of the tensor with zeros, and counts all bytes of its box.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .clocks import WORD, ClockedMemory
from .formats import Array
from .phases import Phases
from .program import Address, Fault, Instruction, Unsupported
from .shared import UNIT

if TYPE_CHECKING:
    from .machine import Execute, Machine, Where


class TensorMap(NamedTuple):
    """What cuTensorMapEncodeTiled is told, the last dimension being contiguous.

    Attributes:
        base: the address of the first element.
        shape, strides: of the tensor, in elements and in bytes.
        box: elements that a copy takes.
        swizzle: bytes after which the pattern of units repeats; 16 for none.
    """

    base: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    itemsize: int
    swizzle: int


@dataclass
class _Barrier(Phases):
    """told: what those who arrived and the copies knew. complete: the same at the end of the last complete phase."""

    told: Array = field(default_factory=lambda: np.zeros(1, np.int32))
    complete: Array = field(default_factory=lambda: np.zeros(1, np.int32))


class _Copy(NamedTuple):
    block: int
    barrier: int
    words: Array
    data: Array


class Barriers:
    """The mbarriers of the blocks of a machine, by block and address, and the copies under way."""

    def __init__(self, machine: Machine, memory: ClockedMemory, seed: int) -> None:
        self._machine, self._memory = machine, memory
        self._barriers: dict[tuple[int, int], _Barrier] = {}
        self._copies: list[_Copy] = []
        self._random = np.random.default_rng(seed)

    def reset(self) -> None:
        self._barriers.clear()
        self._copies.clear()

    def initialise(self, lane: int, address: int, count: int) -> None:
        block, _ = self._actor(lane)
        lanes = np.array([lane])
        offsets = self._memory.offsets(np.array([address]), lanes, 8)
        self._memory.store(offsets, lanes, 8, 0, np.zeros(1, np.uint64))
        self._barriers[block, address] = _Barrier(count)

    def arrive(self, lane: int, address: int, count: int, size: int) -> None:
        """size: bytes that are announced before."""
        block, warp = self._actor(lane)
        barrier = self._of(lane, address)
        barrier.told = np.maximum(barrier.told, self._memory.tell(block, warp))
        if barrier.arrive(lane, count, size):
            barrier.complete = barrier.told

    def complete(self, lane: int, address: int, parity: int) -> bool:
        """Whether the phase of that parity is complete; if so, the warp of the lane knows what was told."""
        block, warp = self._actor(lane)
        barrier = self._of(lane, address)
        if not barrier.is_complete(parity):
            return False
        self._memory.learn(block, warp, barrier.complete)
        return True

    def copy(self, lane: int, place: int, tensor: TensorMap, first: Array, address: int) -> None:
        """Start to copy the box whose first element is at index `first`, the last dimension last."""
        block, warp = self._actor(lane)
        self._of(lane, address)
        self._memory.require_visible(block, warp, self._words_of(block, address), lane, "an mbarrier, used")
        box_bytes = int(np.prod(tensor.box)) * tensor.itemsize
        row_bytes = tensor.box[-1] * tensor.itemsize
        if tensor.swizzle > UNIT and row_bytes > tensor.swizzle:
            raise Fault(f"a box with rows of {row_bytes} bytes, which the swizzle does not allow", lane)
        if place % max(128, 8 * tensor.swizzle if tensor.swizzle > UNIT else 0):
            raise Fault(f"a copy to byte {place} of shared memory, which the swizzle does not allow", lane)
        grids = np.meshgrid(*(np.arange(size) for size in tensor.box), indexing="ij")
        indices = [grid.reshape(-1) + start for grid, start in zip(grids, first.tolist(), strict=True)]
        inside = np.logical_and.reduce(
            [(index >= 0) & (index < size) for index, size in zip(indices, tensor.shape, strict=True)]
        )
        addresses = tensor.base + sum(
            index.astype(np.int64) * stride for index, stride in zip(indices, tensor.strides, strict=True)
        )
        data = np.zeros(inside.size, f"u{tensor.itemsize}")
        taken = addresses[inside]
        if taken.size:
            readers = np.full(taken.size, lane)
            self._machine.memory.check(taken, tensor.itemsize)
            self._machine.owners.read(taken, readers, tensor.itemsize)
            data[inside] = self._machine.memory.load(taken, tensor.itemsize, 0)
            units = taken[:: UNIT // tensor.itemsize]
            self._machine.counts.count_global(self._machine.counts.loads, units, readers[: units.size], UNIT)
        places = place + np.arange(0, box_bytes, UNIT)
        places ^= (places >> 7 & tensor.swizzle // UNIT - 1) * UNIT
        words = self._memory.start_landing(block, warp, places, lane)
        self._copies.append(_Copy(block, address, words, data.view(np.uint8)))

    def land(self) -> bool:
        """Land one of the copies under way, if there is any."""
        if not self._copies:
            return False
        copy = self._copies.pop(self._random.integers(len(self._copies)))
        self._memory.land(copy.block, copy.words, copy.data)
        barrier = self._barriers[copy.block, copy.barrier]
        barrier.told = np.maximum(barrier.told, self._memory.tell(copy.block, self._memory.copies))
        if barrier.land(copy.data.size):
            barrier.complete = barrier.told
        return True

    def _of(self, lane: int, address: int) -> _Barrier:
        block, warp = self._actor(lane)
        barrier = self._barriers.get((block, address))
        if barrier is None:
            raise Fault(f"no mbarrier at byte {address} of shared memory", lane)
        words = self._words_of(block, address)
        self._memory.require_known(words, block, warp, lane)
        return barrier

    def _words_of(self, block: int, address: int) -> Array:
        lane = np.array([block * self._machine.program.threads])
        offset = self._memory.offsets(np.array([address]), lane, 8) // WORD
        return np.concatenate([offset, offset + 1])

    def _actor(self, lane: int) -> tuple[int, int]:
        block, thread = divmod(lane, self._machine.program.threads)
        return block, thread // 32


def _mbarrier(machine: Machine, instruction: Instruction) -> Execute:
    """mbarrier.init [a], count; mbarrier.arrive{.expect_tx} _, [a]{, count or bytes}."""
    parts, barriers = instruction.parts, machine.barriers
    *results, address, last = instruction.operands if len(instruction.operands) > 1 else (*instruction.operands, "1")
    if isinstance(last, Address):
        results, address, last = [*results, address], last, "1"
    if parts[-1] != "b64" or any(result != "_" for result in results) or "cluster" in instruction.opcode:
        raise Unsupported(instruction.opcode)
    base, offset = machine.address(address, bits=32)
    number = machine.source(last, "s32")
    kind = ".".join(parts[1:3])

    def run(lane: int, place: int, value: int) -> None:
        if kind.startswith("init"):
            barriers.initialise(lane, place, value)
        elif kind == "arrive.expect_tx":
            barriers.arrive(lane, place, 1, value)
        else:
            barriers.arrive(lane, place, value, 0)

    if kind not in ("init.shared::cta", "arrive.shared::cta", "arrive.expect_tx"):
        raise Unsupported(instruction.opcode)

    def execute(where: Where) -> None:
        for lane in machine.active(where).tolist():
            run(lane, int(base[lane]) + offset, int(number[lane]))

    return execute


def try_wait(machine: Machine, instruction: Instruction) -> Execute:
    """mbarrier.try_wait.parity p, [a], parity: gives true; the lanes whose phase is not complete wait, `ready`."""
    target = machine.target(instruction.operands[0], "pred")
    return lambda where: target(np.ones(machine.lanes, bool), where)


def ready(machine: Machine, instruction: Instruction, mask: Array) -> Array:
    """The lanes of `mask` whose phase is complete."""
    base, offset = machine.address(instruction.operands[1], bits=32)
    parity = machine.source(instruction.operands[2], "b32")
    lanes = np.flatnonzero(mask)
    asked = np.stack([lanes // 32, base[lanes].astype(np.int64) + offset, parity[lanes]], axis=1)
    # The lanes of a warp ask the same, as a rule.
    different, first, which = np.unique(asked, axis=0, return_index=True, return_inverse=True)
    complete = [
        machine.barriers.complete(int(lanes[lane]), int(address), int(phase))
        for lane, (_, address, phase) in zip(first, different, strict=True)
    ]
    result = np.zeros(machine.lanes, bool)
    result[lanes] = np.array(complete)[which.reshape(-1)]
    return result


def bulk(machine: Machine, instruction: Instruction) -> Execute:
    """cp.async.bulk.tensor.Nd.shared::cta.global.mbarrier::complete_tx::bytes [to], [map], {coordinates}, [mbarrier].

    The first coordinate is that of the last dimension.
    """
    parts = instruction.parts
    if parts[3:4] != ("tensor",) or parts[5:7] != ("shared::cta", "global") or len(instruction.operands) != 4:
        raise Unsupported(instruction.opcode)
    to, source, coordinates, barrier = instruction.operands
    assert isinstance(coordinates, tuple)
    place, place_offset = machine.address(to, bits=32)
    maps, _ = machine.address(source, bits=64)
    address, offset = machine.address(barrier, bits=32)
    indices = [machine.source(name, "s32") for name in reversed(coordinates)]

    def execute(where: Where) -> None:
        for lane in machine.active(where).tolist():
            tensor = machine.maps.get(int(maps[lane]))
            if tensor is None:
                raise Fault(f"no tensor map at {int(maps[lane]):#x}", lane)
            first = np.array([index[lane] for index in indices])
            machine.barriers.copy(lane, int(place[lane]) + place_offset, tensor, first, int(address[lane]) + offset)

    return execute


MBARRIERS = {"mbarrier": _mbarrier}
