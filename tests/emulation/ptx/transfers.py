"""Loads, stores, atomics and asynchronous copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from . import barriers, bulk
from .arithmetic import operation
from .formats import Array, dtype_of
from .program import Address, Fault, Instruction, Operand, Unsupported

if TYPE_CHECKING:
    from .machine import Execute, Machine, Where


@contextmanager
def on_lanes(lanes: Array) -> Iterator[None]:
    """Memory tells the position of an offender among the addresses; this makes it a lane of the machine."""
    try:
        yield
    except Fault as fault:
        raise Fault(str(fault), None if fault.lane is None else int(lanes[fault.lane])) from None


def _space(parts: tuple[str, ...]) -> str:
    for part in parts:
        name = part.partition("::")[0]
        if name in ("global", "shared", "param"):
            return name
    raise Unsupported("a generic address")


def elements_of(operand: Operand) -> tuple[str, ...]:
    """The registers of {a, b}, or of a."""
    return operand if isinstance(operand, tuple) else (str(operand),)


_ORDERS = ("relaxed", "acquire", "release", "acq_rel")
Owned = Callable[[Array, Array, int], None]


def is_strong(parts: tuple[str, ...]) -> bool:
    """Whether a block may learn by an access, or by its order, what other blocks have done, or let them learn by it.

    red returns nothing, but one with a release may be what others wait for: a block may come late with it.
    """
    ordered = ("release", "acq_rel") if parts[0] == "red" else _ORDERS
    return parts[0] == "atom" or any(order in parts for order in ordered)


def _owned(machine: Machine, parts: tuple[str, ...], weak: Owned) -> Owned:
    """What an access to global memory means for its owners. weak: what it is if it has no order."""
    owners = machine.owners
    if not any(order in parts for order in _ORDERS) and parts[0] not in ("atom", "red"):
        return weak
    # Within a block, barriers order the accesses.
    acquires, releases = (
        "cta" not in parts and ("acq_rel" in parts or order in parts) for order in ("acquire", "release")
    )

    def strong(places: Array, lanes: Array, width: int) -> None:
        owners.update(places, lanes, width)
        owners.synchronise(places, lanes, acquires, releases)

    return strong


def _locator(machine: Machine, parts: tuple[str, ...], operand: Operand, width: int) -> Callable[[Array], Array]:
    """From lanes to places that were checked: addresses in global memory, offsets in shared memory."""
    if _space(parts) == "global":
        base, offset = machine.address(operand, bits=64)

        def locate(lanes: Array) -> Array:
            addresses = base[lanes] + offset
            machine.memory.check(addresses, width)
            return addresses

        return locate
    base, offset = machine.address(operand, bits=32)
    return lambda lanes: machine.shared.offsets(base[lanes].astype(np.int64) + offset, lanes, width)


def _choice(machine: Machine, address: Address, kind: str, target: Callable[[Array, Where], None]) -> Execute:
    """Load a parameter that a register chooses, by its place."""
    base, offset = machine.address(address, bits=32)

    def execute(where: Where) -> None:
        values, found = np.zeros(machine.lanes, dtype_of(kind)), np.zeros(machine.lanes, np.bool_)
        for name, value in machine.parameters.items():
            here = base + offset == machine.places[name]
            values[here], found = value, found | here
        lanes = machine.active(where)
        if not found[lanes].all():
            raise Fault("a load of a parameter from where none is", int(lanes[~found[lanes]][0]))
        target(values, where)

    return execute


def _ld(machine: Machine, instruction: Instruction) -> Execute:
    parts = instruction.parts
    kind, space = parts[-1], _space(parts)
    registers, address, *_ = instruction.operands
    if space == "param":
        assert isinstance(address, Address)
        target = machine.target(elements_of(registers)[0], kind)
        if address.base not in machine.parameters:
            return _choice(machine, address, kind, target)
        value = np.full(machine.lanes, machine.parameters[address.base]).view(dtype_of(kind))
        return lambda where: target(value, where)
    dtype = dtype_of(kind)
    targets = [machine.target(name, kind) for name in elements_of(registers)]
    width = dtype.itemsize * len(targets)
    weak = machine.owners.read_constant if "nc" in parts else machine.owners.read
    locate, owned = _locator(machine, parts, address, width), _owned(machine, parts, weak)

    def execute(where: Where) -> None:
        lanes = machine.active(where)
        with on_lanes(lanes):
            places = locate(lanes)
            if space == "global":
                owned(places, lanes, width)
                machine.counts.count_global(machine.counts.loads, places, lanes, width)
            else:
                machine.counts.count_shared(places, lanes, width)
            for element, target in enumerate(targets):
                if space == "global":
                    loaded = machine.memory.load(places, dtype.itemsize, element)
                else:
                    loaded = machine.shared.load(places, lanes, dtype.itemsize, element)
                values = loaded if where is True else _spread(loaded, lanes, machine.lanes)
                target(values.view(dtype), where)

    return execute


def _spread(values: Array, lanes: Array, size: int) -> Array:
    whole = np.zeros(size, values.dtype)
    whole[lanes] = values
    return whole


def _st(machine: Machine, instruction: Instruction) -> Execute:
    parts = instruction.parts
    kind, space = parts[-1], _space(parts)
    address, registers, *_ = instruction.operands
    bits = f"b{8 * dtype_of(kind).itemsize}"
    sources = [machine.source(name, bits) for name in elements_of(registers)]
    itemsize = dtype_of(kind).itemsize
    width = itemsize * len(sources)
    locate, owned = _locator(machine, parts, address, width), _owned(machine, parts, machine.owners.write)

    def execute(where: Where) -> None:
        lanes = machine.active(where)
        with on_lanes(lanes):
            places = locate(lanes)
            if space == "global":
                owned(places, lanes, width)
                machine.counts.count_global(machine.counts.stores, places, lanes, width)
            else:
                machine.counts.count_shared(places, lanes, width)
            for element, source in enumerate(sources):
                if space == "global":
                    machine.memory.store(places, itemsize, element, source[lanes])
                else:
                    machine.shared.store(places, lanes, itemsize, element, source[lanes])

    return execute


_ATOMICS = ("add", "min", "max", "and", "or", "xor", "exch", "cas")


def _atom(machine: Machine, instruction: Instruction) -> Execute:
    """atom.space.op.type d, [a], b{, c} and red.space.op.type [a], b: lane after lane, in order."""
    parts = instruction.parts
    kind = parts[-1]
    name = next((part for part in parts if part in _ATOMICS), None)
    if name is None or any(part in ("v2", "v4", "v8") for part in parts):
        raise Unsupported(instruction.opcode)
    target_name, address, *operands = instruction.operands if parts[0] == "atom" else ("_", *instruction.operands)
    dtype, space = dtype_of(kind), _space(parts)
    target = machine.target(target_name, kind)
    # A last operand may be a hint for the cache.
    sources = [machine.source(operand, kind) for operand in operands[: 2 if name == "cas" else 1]]
    locate, owned = _locator(machine, parts, address, dtype.itemsize), _owned(machine, parts, machine.owners.update)
    update = _update(name, kind)

    def execute(where: Where) -> None:
        lanes = machine.active(where)
        before = np.zeros(machine.lanes, dtype)
        unsigned = f"u{dtype.itemsize}"
        with on_lanes(lanes):
            places = locate(lanes)
            if space == "global":
                owned(places, lanes, dtype.itemsize)
                machine.counts.global_atomics += lanes.size
            else:
                machine.counts.count_shared(places, lanes, dtype.itemsize)
            waiting = np.arange(lanes.size)
            while waiting.size:
                # The first lane of each address; those after it see what it left.
                _, first = np.unique(places[waiting], return_index=True)
                now = waiting[first]
                own, where_to = lanes[now], places[now]
                if space == "global":
                    old = machine.memory.load(where_to, dtype.itemsize, 0).view(dtype)
                else:
                    old = machine.shared.read_atomically(where_to, dtype.itemsize).view(dtype)
                new = update(old, *(source[own] for source in sources)).astype(dtype, copy=False).view(unsigned)
                if space == "global":
                    machine.memory.store(where_to, dtype.itemsize, 0, new)
                else:
                    machine.shared.write_atomically(where_to, dtype.itemsize, new)
                before[own] = old
                waiting = np.delete(waiting, first)
        machine.counts.atomics += lanes.size
        target(before, where)

    return execute


def _update(name: str, kind: str) -> Callable[..., Array]:
    if name == "exch":
        return lambda old, value: value
    if name == "cas":
        return lambda old, expected, value: np.where(old == expected, value, old)
    known = operation((name, kind))
    assert known is not None
    return known.function


def _cp(machine: Machine, instruction: Instruction) -> Execute:
    """cp.async.{ca, cg}.shared.global [to], [from], size{, bytes to read; the rest is zero}; commit, wait."""
    parts = instruction.parts
    shared = machine.shared
    if "commit_group" in parts:
        return lambda where: shared.commit(machine.active(where))
    if "wait_group" in parts or "wait_all" in parts:
        pending = int(str(instruction.operands[0])) if "wait_group" in parts else -1
        return lambda where: shared.wait(np.broadcast_to(where, machine.lanes), pending)
    if "bulk" in parts:
        return (barriers if "tensor" in parts else bulk).bulk(machine, instruction)
    if parts[1] != "async":
        raise Unsupported(instruction.opcode)
    to, source, size, *rest = instruction.operands
    width = int(str(size), 0)
    locate_to = _locator(machine, ("shared",), to, width)
    base, offset = machine.address(source, bits=64)
    taken = machine.source(rest[0], "b32") if rest and "cache_hint" not in parts[-1] else None

    def execute(where: Where) -> None:
        lanes = machine.active(where)
        data = np.zeros((lanes.size, width), np.uint8)
        with on_lanes(lanes):
            places = locate_to(lanes)
        sizes = np.full(lanes.size, width) if taken is None else taken[lanes].astype(np.int64)
        if not ((sizes == 0) | (sizes == width)).all():
            raise Unsupported(f"a part of {width} bytes: {instruction.text}")
        reading = np.flatnonzero(sizes)
        readers = lanes[reading]
        with on_lanes(readers):
            addresses = base[readers] + offset
            machine.memory.check(addresses, width)
            machine.owners.read(addresses, readers, width)
        if readers.size:
            machine.counts.count_global(machine.counts.loads, addresses, readers, width)
            itemsize = min(width, 8)
            words = [machine.memory.load(addresses, itemsize, i) for i in range(width // itemsize)]
            data[reading] = np.stack(words, axis=1).view(np.uint8)
        with on_lanes(lanes):
            shared.start_copy(places, lanes, data)

    return execute


TRANSFERS = {"ld": _ld, "ldu": _ld, "st": _st, "atom": _atom, "red": _atom, "cp": _cp}
