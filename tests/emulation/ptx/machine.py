"""Execution: blocks of threads side by side in numpy vectors, a lane a thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .arithmetic import counterpart, operation
from .barriers import MBARRIERS, Barriers, TensorMap, ready, try_wait
from .bulk import COPY_BARRIERS, CopyBarriers, needs_clocks, proxy_fence
from .clocks import ClockedMemory
from .counts import Counts
from .formats import Array, dtype_of
from .matrix import MATRIX
from .memory import GlobalMemory
from .owners import Nobody, Owners
from .program import Address, Fault, Instruction, Operand, Program, Unsupported
from .schedule import WARP, Group, Schedule
from .shared import SharedMemory
from .transfers import TRANSFERS, is_strong
from .warpgroups import WGMMA, WarpGroups
from .warps import WARPS

Block = tuple[int, int, int]
# Which lanes execute: True for all, or a bool for each.
Where = Any
Execute = Callable[[Where], None]

# Lanes at once: beyond this numpy's time goes with the lanes and no longer with the calls.
LANES = 1024
# A kernel that waits for what another block must do first waits for ever here.
ENDLESS = 20_000_000
# Where the parameters seem to be.
PARAMETERS = 1 << 20

_NOTHING_TO_DO = {"membar", "fence", "nanosleep", "griddepcontrol", "prefetch", "createpolicy", "setmaxnreg"}


class Machine:
    """Runs the blocks of one launch, several at a time. owned: watch who owns global memory. seed: of the order."""

    def __init__(
        self,
        program: Program,
        grid: Block,
        parameters: dict[str, Any],
        memory: GlobalMemory,
        shared_bytes: int,
        counts: Counts,
        blocks: int,
        owned: bool = True,
        seed: int = 0,
        maps: Mapping[str, TensorMap] | None = None,
    ) -> None:
        self.program, self.parameters, self.memory, self.counts = program, parameters, memory, counts
        self.blocks = min(blocks, max(1, LANES // program.threads))
        self.lanes = self.blocks * program.threads
        self._registers = {
            name: np.empty(self.lanes, self._register_type(kind)) for name, kind in program.registers.items()
        }
        lane = np.arange(self.lanes, dtype=np.uint32)
        thread = lane % np.uint32(program.threads)
        self._block_of = (lane // np.uint32(program.threads)).astype(np.int64)
        zero = np.zeros(self.lanes, np.uint32)
        self._special = {"%tid.x": thread, "%tid.y": zero, "%tid.z": zero, "%laneid": thread % np.uint32(WARP)}
        self._special |= {"%warpid": thread // np.uint32(WARP), "%ntid.x": zero + np.uint32(program.threads)}
        self._special |= {"%ntid.y": zero + np.uint32(1), "%ntid.z": zero + np.uint32(1)}
        for axis, size in zip("xyz", grid, strict=True):
            self._special[f"%ctaid.{axis}"] = np.zeros_like(lane)
            self._special[f"%nctaid.{axis}"] = zero + np.uint32(size)
        self.owners = Owners(memory.extents(), blocks * program.threads // WARP, self.lanes) if owned else Nobody()
        self._schedule = Schedule(self._block_of, seed)
        self.warpgroups = WarpGroups(self, program.instructions)
        if needs_clocks(program):
            clocked = ClockedMemory(self.blocks, shared_bytes, program.threads)
            self.shared: SharedMemory = clocked
            self.barriers = Barriers(self, clocked, seed)
        else:
            self.shared = SharedMemory(self.blocks, shared_bytes, program.threads, proxies=bool(self.warpgroups))
        self.copy_barriers = CopyBarriers(self)
        self._clocked = needs_clocks(program)
        # Parameters of which the address is taken have one here.
        self.places = {name: PARAMETERS + 128 * number for number, name in enumerate(program.parameters)}
        self.maps = {self.places[name]: tensor for name, tensor in (maps or {}).items()}
        self._running: Sequence[Block] = ()
        self._issued = [0] * len(program.instructions)
        self._code = [self._decode(instruction) for instruction in program.instructions]

    def run(self, blocks: Sequence[Block]) -> None:
        """Run all `blocks`."""
        warps = self.program.threads // WARP
        order = self._schedule.order(len(blocks))
        for first in range(0, len(blocks), self.blocks):
            chosen = order[first : first + self.blocks]
            self._running = [blocks[number] for number in chosen]
            self.owners.start((chosen[:, None] * warps + np.arange(warps)).reshape(-1))
            self._start()
        for instruction, issued in zip(self.program.instructions, self._issued, strict=True):
            if issued:
                self.counts.instructions[instruction.opcode] += issued

    # Operands, for those who make closures of instructions. Arrays are live: they show what registers hold later.

    def source(self, operand: Operand, kind: str) -> Array:
        """The values of an operand, as a type: (lanes,)."""
        dtype = dtype_of(kind)
        if not isinstance(operand, str):
            raise Unsupported(f"the operand {operand}")
        values = self._registers.get(operand, self._special.get(operand))
        if values is None:
            return np.full(self.lanes, _constant(str(self.places.get(operand, operand)), dtype), dtype)
        if values.dtype == np.bool_ or dtype == np.bool_:
            if values.dtype != dtype:
                raise Unsupported(f"predicate and number in one: {operand}")
            return values
        # A register may be wider than the type: the low bytes are meant.
        return values.view(dtype)[:: values.itemsize // dtype.itemsize]

    def target(self, operand: Operand, kind: str) -> Callable[[Array, Where], None]:
        """What writes values of a type to a register. A wider register is filled up by zeros or by the sign."""
        dtype = dtype_of(kind)
        if operand == "_":
            return lambda values, where: None
        assert isinstance(operand, str)
        register = self._registers[operand]
        if register.dtype == np.bool_:
            view = register
        elif register.itemsize == dtype.itemsize:
            view = register.view(dtype)
        else:
            view = register.view(f"{dtype.kind}{register.itemsize}")
        return lambda values, where: np.copyto(view, values, where=where)

    def address(self, operand: Operand, *, bits: int) -> tuple[Array, int]:
        """Base, int64 or int32, and offset of [base + offset]."""
        assert isinstance(operand, Address)
        return self.source(operand.base, f"s{bits}"), operand.offset

    def active(self, where: Where) -> Array:
        """`where` as indices."""
        return np.arange(self.lanes) if where is True else np.flatnonzero(where)

    @staticmethod
    def _register_type(kind: str) -> np.dtype[Any]:
        dtype = dtype_of(kind)
        return dtype if dtype == np.bool_ else np.dtype(f"u{dtype.itemsize}")

    def _decode(self, instruction: Instruction) -> tuple[str, Any, Array | None, bool]:
        """(kind, what to do, predicate, whether it is negated)."""
        predicate = self._registers[instruction.predicate] if instruction.predicate else None
        mnemonic = instruction.parts[0]
        action: Any = None
        if mnemonic == "bra":
            kind, action = "branch", self.program.labels[str(instruction.operands[0])]
        elif mnemonic in ("ret", "exit"):
            kind = "exit"
        elif mnemonic in ("bar", "barrier") and "warp" not in instruction.parts:
            if instruction.parts[1] != "sync" and instruction.parts[1:3] != ("cta", "sync"):
                raise Unsupported(instruction.text)
            if predicate is not None or (len(instruction.operands) > 1 and not self._clocked):
                raise Unsupported(f"a barrier for some of the threads: {instruction.text}")
            kind, action = "barrier", [int(str(operand), 0) for operand in instruction.operands]
        elif self._clocked and instruction.parts[:3] == ("mbarrier", "try_wait", "parity"):
            kind, action = "wait", try_wait(self, instruction)
        else:
            kind, action = "plain", self._plain(instruction)
            if mnemonic in TRANSFERS and "global" in instruction.parts and is_strong(instruction.parts):
                kind = "strong"
            if mnemonic != "wgmma":
                action = self.warpgroups.watched(instruction, action)
        return kind, action, predicate, instruction.negated

    def _plain(self, instruction: Instruction) -> Execute:
        parts = instruction.parts
        try:
            for special in (WARPS, TRANSFERS, MATRIX, WGMMA, MBARRIERS if self._clocked else COPY_BARRIERS):
                if parts[0] in special:
                    return special[parts[0]](self, instruction)
            if parts[:2] == ("fence", "mbarrier_init") or parts[:3] == ("fence", "proxy", "async"):
                return proxy_fence(self, instruction)
            if parts[0] in ("fence", "membar") and not {"cta", "proxy"} & set(parts):
                return lambda where: self.owners.fence(self.active(where))
            if parts[0] in _NOTHING_TO_DO or parts[:2] == ("bar", "warp"):
                return lambda where: None
            if parts[0] == "mov" and any(isinstance(operand, tuple) for operand in instruction.operands):
                return self._packed_move(instruction)
            known = operation(parts)
        except (Unsupported, KeyError, IndexError) as problem:
            raise Unsupported(f"`{instruction.text}`: {problem}") from problem
        if known is None:
            raise Unsupported(f"the opcode {instruction.opcode}: `{instruction.text}`")
        function, result, kinds = known
        first, *operands = instruction.operands
        kinds += kinds[-1:] * (len(operands) - len(kinds))
        sources = [self._source(operand, kind) for operand, kind in zip(operands, kinds, strict=False)]
        # setp may give a second result: p|q.
        name, _, opposite = str(first).partition("|")
        target = self.target(name, result)
        if not opposite:
            return lambda where: target(function(*(source() for source in sources)), where)
        if len(operands) > 2:
            raise Unsupported(f"a combination and its counterpart: {instruction.text}")
        other, second = self.target(opposite, result), counterpart(parts)

        def execute(where: Where) -> None:
            values = [source() for source in sources]
            target(function(*values), where)
            other(second(*values), where)

        return execute

    def _source(self, operand: Operand, kind: str) -> Callable[[], Array]:
        if isinstance(operand, str) and operand.startswith("!"):
            values = self.source(operand[1:], kind)
            return lambda: ~values
        values = self.source(operand, kind)
        return lambda: values

    def _packed_move(self, instruction: Instruction) -> Execute:
        """mov.b32 {a, b}, c and mov.b32 c, {a, b}; the first element is the lowest."""
        kind = instruction.parts[-1]
        first, second = instruction.operands
        elements = first if isinstance(first, tuple) else second
        assert isinstance(elements, tuple)
        part = f"b{dtype_of(kind).itemsize * 8 // len(elements)}"
        if isinstance(first, tuple):
            whole = self.source(second, kind).view(dtype_of(part)).reshape(self.lanes, len(elements))
            targets = [self.target(element, part) for element in elements]

            def unpack(where: Where) -> None:
                for values, target in zip(whole.T.copy(), targets, strict=True):
                    target(values, where)

            return unpack
        sources = [self.source(element, part) for element in elements]
        target = self.target(first, kind)
        return lambda where: target(np.stack(sources, axis=1).view(dtype_of(kind)).reshape(-1), where)

    # Control flow.

    def _start(self) -> None:
        for register in self._registers.values():
            register.view(np.uint8).fill(register.dtype != np.bool_ and 0xFF)  # numbers start as NaN
        for number, block in enumerate(self._running):
            for axis, index in zip("xyz", block, strict=True):
                self._special[f"%ctaid.{axis}"][self._block_of == number] = index
        self.shared.reset()
        self.warpgroups.reset()
        if self._clocked:
            self.barriers.reset()
        groups = [Group(0, self._block_of < len(self._running))]
        steps = 0
        with np.errstate(all="ignore"):
            while groups:
                if not any(group.running for group in groups):
                    groups = self._go_on(groups)
                    continue
                group, groups, bound = self._schedule.next_of(groups)
                try:
                    steps += self._advance(group, len(self._code) if bound is None else bound, groups)
                except Fault as fault:
                    raise self._located(fault, group.counter) from None
                if steps >= ENDLESS:
                    raise Fault(f"{self.program.name} does not end")

    def _advance(self, group: Group, bound: int, groups: list[Group]) -> int:
        """Run `group` until it splits, waits, ends, or comes to where another one is; append what is left to `groups`.

        How many instructions that were.
        """
        steps = 0
        whole = group.size == self.lanes
        while group.counter < bound and steps < ENDLESS:
            kind, action, predicate, negated = self._code[group.counter]
            self._issued[group.counter] += group.warps
            steps += 1
            if kind == "strong" and self._schedule.holds(group, groups):
                return steps
            if kind in ("plain", "strong"):
                if predicate is None:
                    action(True if whole else group.mask)
                else:
                    lanes = group.mask & ~predicate if negated else group.mask & predicate
                    size = int(np.count_nonzero(lanes))
                    if size:
                        action(True if size == self.lanes else lanes)
                group.counter += 1
                group.due = group.due and kind != "strong"
            elif kind == "wait":
                stuck = group.mask & ~ready(self, self.program.instructions[group.counter], group.mask)
                going = group.part(~stuck)
                if going.size:
                    action(going.mask)
                    going.counter += 1
                    groups.append(going)
                if stuck.any():
                    groups.append(replace(group, mask=stuck, parked=True))
                return steps
            elif kind == "barrier":
                group.counter += 1
                group.waiting = True
                group.barrier, group.count = (*action, 0, 0)[:2]
                break
            else:
                if predicate is None:
                    taken, size = group.mask, group.size
                else:
                    taken = group.mask & ~predicate if negated else group.mask & predicate
                    size = int(np.count_nonzero(taken))
                if size == group.size:
                    if kind == "exit":
                        return steps
                    group.counter = action
                elif size == 0:
                    group.counter += 1
                else:
                    rest = group.mask & ~taken
                    warps = taken.reshape(-1, WARP).any(axis=1) & rest.reshape(-1, WARP).any(axis=1)
                    self.counts.divergent_branches += int(np.count_nonzero(warps))
                    if kind == "branch":
                        groups.append(Group(action, taken))
                    groups.append(Group(group.counter + 1, rest))
                    return steps
        groups.append(group)
        return steps

    def _go_on(self, groups: list[Group]) -> list[Group]:
        """Every group waits: open what is complete; if nothing is, land a copy."""
        woken = [group for group in groups if group.parked and self._is_ready(group)]
        for group in woken:
            group.parked = False
        if woken:
            return groups
        waiting, others = self._schedule.stopped(groups)
        running = [group for group in others if group.running]
        opened, waiting = self._release(waiting, groups)
        if not (opened or running) and not (self._clocked and self.barriers.land()):
            lane = int(groups[0].mask.argmax())
            what = "threads wait for ever: a barrier that not all threads of the block come to"
            raise self._located(Fault(what, lane), groups[0].counter - groups[0].waiting)
        return opened + waiting + others

    def _is_ready(self, group: Group) -> bool:
        return bool(ready(self, self.program.instructions[group.counter], group.mask).any())

    def _release(self, waiting: list[Group], groups: list[Group]) -> tuple[list[Group], list[Group]]:
        """Open the barriers at which all of their threads are: those that go on, and those that still wait."""
        opened: list[Group] = []
        warps = self.program.threads // WARP
        for block in range(len(self._running)):
            own = self._block_of == block
            alive = sum(int(np.count_nonzero(group.mask & own)) for group in groups)
            here = [group for group in waiting if (group.mask & own).any()]
            for number in sorted({group.barrier for group in here}):
                meeting = [group.part(own) for group in here if group.barrier == number]
                present = sum(group.size for group in meeting)
                if any(present != (group.count or alive) for group in meeting):
                    continue
                places = {group.counter for group in meeting}
                first = self.program.instructions[min(places) - 1]
                if len(places) > 1 and first.parts[0] == "bar":
                    lane = block * self.program.threads
                    what = "a barrier that not all threads of the block come to"
                    raise self._located(Fault(what, lane), min(places) - 1)
                mask = np.any([group.mask for group in meeting], axis=0)
                met = np.flatnonzero(mask.reshape(-1, WARP).any(axis=1))
                self.counts.barriers += 1
                self.shared.meet(block, (met - block * warps).tolist())
                self.owners.barrier(slice(int(met[0]), int(met[-1]) + 1))
                opened += [replace(group, waiting=False) for group in meeting]
                waiting = [part for group in waiting if (part := group.part(~mask)).size]
                here = [part for group in here if (part := group.part(~mask)).size]
        return opened, waiting

    def _located(self, fault: Fault, counter: int) -> Fault:
        place = f"{self.program.name}, instruction {counter} `{self.program.instructions[counter].text}`"
        if fault.lane is not None and self._running:
            block = self._running[fault.lane // self.program.threads]
            place += f", block {block}, thread {fault.lane % self.program.threads}"
        return Fault(f"{fault} ({place})", fault.lane)


def _constant(text: str, dtype: np.dtype[Any]) -> Any:
    """A literal of PTX, or the address of the shared memory, which starts at zero."""
    if text == "global_smem":
        return 0
    try:
        # 0f and 0d: the bits of a float, in hexadecimal digits.
        value = int(text[2:], 16) if text[:2].lower() in ("0f", "0d") else int(text.rstrip("U"), 0)
    except ValueError:
        raise Unsupported(f"the operand {text}") from None
    if dtype == np.bool_:
        return value != 0
    code = value & (1 << 8 * dtype.itemsize) - 1
    return np.array(code, f"u{dtype.itemsize}").view(dtype)
