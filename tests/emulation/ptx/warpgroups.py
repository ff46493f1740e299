"""wgmma: products of matrices by warpgroups, which are four warps (PTX ISA 9.7.15).

A product reads shared memory when it is issued and its result lands when it is waited for, as late as it may. In
between nothing may write the bytes that it reads, nor access its registers; other products may add to its result.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .formats import Array, decode
from .matrix import elements
from .program import Fault, Instruction, Unsupported
from .shared import UNIT, SharedMemory
from .transfers import elements_of

if TYPE_CHECKING:
    from .machine import Execute, Machine, Where

WARPS = 4
LANES = 32 * WARPS
ROWS = 64
DEPTH = 32  # bytes of a row of an operand
_SIZES = {"bf16": 2, "f16": 2, "tf32": 4}
# Bytes after which the pattern of units repeats, by the upper two bits of a descriptor.
_SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}


class Fragment:
    """Registers of a warpgroup that hold a matrix. Flags are by warpgroup.

    Attributes:
        accessed: since the last wgmma.fence.
        due: the commit group of the last product that uses them; -1 if none is under way.
    """

    def __init__(self, machine: Machine, names: tuple[str, ...]) -> None:
        self.names = names
        self.registers = [machine.source(name, "b32") for name in names]
        groups = machine.lanes // LANES
        self.accessed = np.ones(groups, bool)
        self.due = np.full(groups, -1)
        self.values = np.zeros((len(names), groups, LANES), np.uint32)

    def access(self, groups: Array) -> None:
        """By any other instruction than a product."""
        early = groups & (self.due >= 0)
        if early.any():
            what = f"a register of {self.names[0]}... accessed while a product uses it: a wgmma.wait_group is missing"
            raise Fault(what, int(early.argmax()) * LANES)
        self.accessed |= groups

    def use(self, groups: Array, commit: Array) -> Array:
        """The values [registers, groups, LANES] for a product: those of the last one, if that is under way."""
        unfenced = self.accessed[groups]
        if unfenced.any():
            what = f"a product that uses {self.names[0]}... without wgmma.fence after an access to it"
            raise Fault(what, int(groups[unfenced.argmax()]) * LANES)
        fresh = groups[self.due[groups] < 0]
        if fresh.size:
            for values, register in zip(self.values, self.registers, strict=True):
                values[fresh] = register.reshape(-1, LANES)[fresh]
        self.due[groups] = commit
        return self.values[:, groups]

    def land(self, groups: Array) -> None:
        for values, register in zip(self.values, self.registers, strict=True):
            register.reshape(-1, LANES)[groups] = values[groups]
        self.due[groups] = -1


class _Read(NamedTuple):
    """Units of shared memory that a product under way reads: of one warpgroup, and its commit group."""

    group: int
    commit: int
    units: Array


class WarpGroups:
    """The products that the warpgroups of a machine have under way."""

    def __init__(self, machine: Machine, instructions: Iterable[Instruction]) -> None:
        self._machine = machine
        self._commits = np.zeros(machine.lanes // LANES, np.int64)
        self._reads: list[_Read] = []
        self.fragments: dict[tuple[str, ...], Fragment] = {}
        self._by_register: dict[str, Fragment] = {}
        for instruction in instructions:
            if instruction.parts[0] != "wgmma":
                continue
            if machine.program.threads % LANES:
                raise Unsupported(f"a warpgroup in a block of {machine.program.threads} threads: {instruction.text}")
            for operand in instruction.operands:
                if isinstance(operand, tuple) and operand not in self.fragments:
                    self._add(operand)

    def _add(self, names: tuple[str, ...]) -> None:
        fragment = self.fragments[names] = Fragment(self._machine, names)
        for name in names:
            if self._by_register.setdefault(name, fragment) is not fragment:
                raise Unsupported(f"register {name} in two fragments")

    def __bool__(self) -> bool:
        return bool(self.fragments)

    def reset(self) -> None:
        self._commits.fill(0)
        self._reads.clear()
        for fragment in self.fragments.values():
            fragment.accessed.fill(True)
            fragment.due.fill(-1)

    def watched(self, instruction: Instruction, execute: Execute) -> Execute:
        """`execute`, an instruction other than a product, with a check of the registers that it accesses."""
        names = [name for operand in instruction.operands for name in elements_of(operand)]
        fragments = {id(found): found for name in names if (found := self._by_register.get(name))}
        if not fragments:
            return execute

        def checked(where: Where) -> None:
            groups = np.broadcast_to(where, self._machine.lanes).reshape(-1, LANES).any(axis=1)
            for fragment in fragments.values():
                fragment.access(groups)
            execute(where)

        return checked

    def whole(self, where: Where) -> Array:
        """The indices of the warpgroups that take part, each as a whole."""
        active = np.broadcast_to(where, self._machine.lanes).reshape(-1, LANES)
        torn = active.any(axis=1) & ~active.all(axis=1)
        if torn.any():
            raise Fault("an instruction for a whole warpgroup, run by some of its lanes", int(torn.argmax()) * LANES)
        return np.flatnonzero(active[:, 0])

    def fence(self, where: Where) -> None:
        groups = self.whole(where)
        for fragment in self.fragments.values():
            fragment.accessed[groups] = False

    def commit(self, where: Where) -> None:
        self._commits[self.whole(where)] += 1

    def wait(self, where: Where, pending: int) -> None:
        """Land the products of all commit groups but the last `pending`."""
        groups = self.whole(where)
        complete = np.full(self._commits.size, -1)
        complete[groups] = self._commits[groups] - pending
        for fragment in self.fragments.values():
            due = np.flatnonzero((fragment.due >= 0) & (fragment.due < complete))
            if due.size:
                fragment.land(due)
        kept = [read for read in self._reads if read.commit >= complete[read.group]]
        for read in self._reads:
            if read.commit < complete[read.group]:
                self._machine.shared.release(read.units, read.group * LANES, WARPS)
        for read in kept:
            self._machine.shared.hold(read.units)
        self._reads = kept

    def read(self, groups: Array, addresses: Array) -> Array:
        """Bytes [groups, ..., UNIT] of shared memory at addresses [groups, ...], held until the product is complete."""
        shared: SharedMemory = self._machine.shared
        flat = addresses.reshape(len(groups), -1)
        data, units = shared.read_by_proxy(flat, groups * LANES, WARPS)
        shared.hold(units)
        self._reads += map(_Read, groups.tolist(), self._commits[groups].tolist(), units)
        return data.reshape(*addresses.shape, UNIT)

    def used(self, names: tuple[str, ...], groups: Array) -> tuple[Fragment, Array]:
        fragment = self.fragments[names]
        return fragment, fragment.use(groups, self._commits[groups])


def addresses(descriptors: Array, rows: int, transposed: bool) -> Array:
    """The addresses of the units of an operand of `rows` rows (or columns, of b) by DEPTH bytes.

    A descriptor has, in units, the start (bits 0 to 13), the offset of the leading dimension (16 to 29) and the stride
    (32 to 45), and the swizzle (62, 63), which combines bits 4 to 6 of an address with bits 7 to 9.

    Args:
        descriptors: [groups].
        transposed: neighbours in memory are of one column and not of one row.

    Returns:
        [groups, rows, 2]; if transposed, [groups, rows / 8, 16], where a unit has eight rows of one column.
    """
    start, leading, stride = ((descriptors >> bit & 0x3FFF) * UNIT for bit in (0, 16, 32))
    if (descriptors >> 49 & 7).any() or np.unique(descriptors >> 62).size > 1:
        raise Unsupported("a descriptor with a base offset, or of several kinds")
    width = _SWIZZLES[int(descriptors[0] >> 62 & 3)]
    across, down = (np.arange(rows // 8), np.arange(16)) if transposed else (np.arange(rows), np.arange(2))
    across, down = across[None, :, None], down[None, None, :]
    start, leading, stride = (part[:, None, None] for part in (start, leading, stride))
    if transposed and width == UNIT:
        places = start + across * stride + down % 8 * UNIT + down // 8 * leading
    elif transposed:
        units = width // UNIT
        places = start + across % units * UNIT + across // units * leading + down % 8 * width + down // 8 * stride
    else:
        places = start + across % 8 * width + across // 8 * stride + down * (leading if width == UNIT else UNIT)
    swizzled: Array = places ^ (places >> 7 & width // UNIT - 1) * UNIT
    return swizzled


def _matrix(data: Array, kind: str, transposed: bool) -> Array:
    """[groups, rows, columns] in float64, from the bytes at `addresses`."""
    if transposed:
        groups, eights, columns, _ = data.shape
        codes = data.view(np.uint16).swapaxes(2, 3).reshape(groups, eights * 8, columns)
    else:
        codes = data.reshape(*data.shape[:2], DEPTH).view(f"u{_SIZES[kind]}")
    return _decoded(codes, kind)


def _decoded(codes: Array, kind: str) -> Array:
    if kind == "tf32":
        return (codes & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    return decode(codes, kind)


def _wgmma(machine: Machine, instruction: Instruction) -> Execute:
    parts, groups = instruction.parts, machine.warpgroups
    if parts[1] == "fence":
        return groups.fence
    if parts[1] == "commit_group":
        return groups.commit
    if parts[1] == "wait_group":
        pending = int(str(instruction.operands[0]))
        return lambda where: groups.wait(where, pending)
    return _mma_async(machine, instruction)


def _mma_async(machine: Machine, instruction: Instruction) -> Execute:
    """wgmma.mma_async.sync.aligned.m64nNkK.f32.T.T d, a, b, scale_d, scale_a, scale_b{, transposed a}{, transposed b}.

    d = scale_a scale_b a b + scale_d d: a [64, K] is in registers or in shared memory, b [K, N] in shared memory. Sums
    are rounded as those of mma, see matrix.py.
    """
    *_, shape, accumulator, kind, other = instruction.parts
    size = _SIZES.get(kind)
    if size is None or other != kind or accumulator != "f32" or not shape.startswith("m64n"):
        raise Unsupported(instruction.opcode)
    columns, depth = map(int, shape[4:].split("k"))
    if depth * size != DEPTH or columns % 8 or columns > 256:
        raise Unsupported(instruction.opcode)
    d, a, b, scale_d, *immediates = instruction.operands
    by_register = isinstance(a, tuple)
    factor, *transposes = _factor_and_transposes(immediates)
    transposes = [False] * (2 - len(transposes)) + transposes
    if any(transposes) and size != 2:
        raise Unsupported(f"a transposed operand: {instruction.text}")
    names, groups_of = elements_of(d), machine.warpgroups
    adding = machine.source(scale_d, "pred").reshape(-1, LANES)
    descriptors = {
        number: machine.source(operand, "b64")
        for number, operand in enumerate((a, b))
        if not isinstance(operand, tuple)
    }

    def operand(groups: Array, number: int) -> Array:
        if number == 0 and by_register:
            _, codes = groups_of.used(elements_of(a), groups)
            # Each warp has 16 rows, in the layout of mma.
            pieces = [elements(codes[i].reshape(-1), kind) for i in range(4)]
            halves = [np.concatenate(pieces[row::2], axis=2) for row in range(2)]
            return np.concatenate(halves, axis=1).reshape(len(groups), ROWS, depth)
        found = descriptors[number].reshape(-1, LANES)[groups]
        if (found != found[:, :1]).any():
            raise Fault("lanes of a warpgroup with different descriptors", int(groups[0]) * LANES)
        transposed, rows = transposes[number], columns if number else ROWS
        places = addresses(found[:, 0].astype(np.int64), rows, transposed)
        return _matrix(groups_of.read(groups, places), kind, transposed)

    def execute(where: Where) -> None:
        groups = groups_of.whole(where)
        product = factor * np.matmul(operand(groups, 0), operand(groups, 1).swapaxes(1, 2))
        fragment, before = groups_of.used(names, groups)
        total = _as_fragment(product).reshape(before.shape)
        added = np.where(adding[groups], before.view(np.float32), np.float32(0))
        fragment.values[:, groups] = (total + added).astype(np.float32).view(np.uint32)
        machine.counts.mma_flops += 2 * ROWS * columns * depth * len(groups)
        machine.counts.count_units(len(groups) * (columns + (0 if by_register else ROWS)) * DEPTH)

    return execute


def _factor_and_transposes(immediates: list[object]) -> tuple[int, ...]:
    scale_a, scale_b, *transposes = (int(str(operand), 0) for operand in immediates)
    return scale_a * scale_b, *map(bool, transposes)


def _as_fragment(product: Array) -> Array:
    """[groups, 64, columns] to [registers, groups * LANES].

    Register 4 j + 2 h + c of lane l of warp w holds row 16 w + 8 h + l // 4 and column 8 j + 2 (l % 4) + c.
    """
    groups, _, columns = product.shape
    split = product.reshape(groups, WARPS, 2, 8, columns // 8, 4, 2)
    return split.transpose(4, 2, 6, 0, 1, 3, 5).reshape(columns // 2, -1)


WGMMA = {"wgmma": _wgmma}
